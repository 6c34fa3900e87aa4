"""Data: from sample indices to batches, on every host alike.

A *sample* is an item of a data set, a *batch* what the task's `collate` makes of samples. A
*loader* is a process that fetches batches for one worker. A *record* is a row of a file to predict
from.

sample_order      the samples of each data epoch, a pure function of the seed
order_rules       weighted and length-grouped sampling
fetching          from steps and shards to sample indices, and to batches
loader            a worker's batches, fetched by itself or by loader processes
loader_ipc        tensors from loader processes, in anonymous shared memory
user_datasets     the data sets that a task builds, and what they must be
dataset_digest    a digest of a data set, to compare hosts
dataset_shipping  data sets sent to other hosts (`data: ship`)
sample_codec      one sample as bytes, without pickle
records           rows of JSONL and Parquet files, by number
user_files        the bytes and the text of a user's file
"""
