"""Slices: matrices of a model cut into T fixed pieces, each a parameter of its own.

A batch is cut into fixed shards, a matrix into fixed *slices*. What is computed depends on T, never
on who computes a slice: partial results are summed along a fixed tree over the slices.
*Column*: each slice gives some of the outputs. *Row*: each slice takes some of the inputs, and the
partial outputs are summed. *Heads*: each slice has some of the heads of an attention. *Width*: each
slice has some of the columns of an embedding. A *chain* is a column cut and a row cut with nothing
but elementwise functions between, which then run slice by slice.

cuts            pure: which modules are cut and how, and the reason for each that is not
structure       what can be proved of a module: that it may be cut, that a function is elementwise
words           cuts in the words of transformers' `base_model_tp_plan`
cut_parameter   a parameter and its slices: cut, and joined again
slicing         cuts a model in place, and says where its plain state dict lies
summing         sums over slices along the tree, and their gradients
slice_random    dropout with random numbers of each slice's own
linear          linear layers and embeddings in slices
attention       multi-head attention in slices of heads
chains          containers that run a chain slice by slice
exchanges       what slices have in common: computed alone, or exchanged in a team
team            a member's view of the workers that compute a shard together
board           words and buffers in shared memory, over which a team exchanges
board_memory    where these lie, and the form of what is shown
shown_tensors   tensors in such a buffer
"""
