"""Adapter for models of Hugging Face transformers.

A *column* is a named value of each sample. A *collator* makes a batch of samples.

task           `from_transformers`, and the task that it returns
columns        the columns that a model takes
hf_datasets    checks of data sets of the package `datasets`
token_metrics  metrics over labelled tokens
predictions    rows of `lockstep predict`, by the kind of model
"""
