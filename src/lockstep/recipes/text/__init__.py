"""Text generation, for the recipes `translate` and `summarise`.

A *source* is the text to read, its *target* the text to write. A *token* is a subword's number.
*Packing* puts rows of different lengths end to end, without padding.

rewriting    the task that both recipes share
vocabulary   subwords by byte pair encoding
encoded      pairs of texts as tokens, and batches of them
packing      rows of tokens without padding
attention    multi-head attention over packed rows
transformer  an encoder-decoder with a pointer-generator
beam         beam search
neighbours   nearest neighbours by TF-IDF, a baseline
rouge        the ROUGE scores
"""
