"""Stage 1, decompose: from a job and the facts about it to a plan, by arithmetic alone.

Every function is pure; torch and numpy are never imported. A *shard* is a fixed slice of the global
batch (not FSDP's shard of the parameters). A *block* is a run of one parameter's elements on a
fixed grid, and its *owner* is the worker that updates it. The *reduction tree* is the balanced
binary tree over shard indices along which gradients are summed; a *subtree* of it is what one host
sums before hosts exchange anything. A *slot* is where a shard's gradients are stored.

plan                 Plan: hosts, workers, threads and shards, each decision with its reason
core_split           ways to split the cores into workers and threads; V, where it is left open
job_profile          what a shard, an update and a meeting cost on a machine, and the memory
candidates           the ways to run a job that change no bit: how many workers on which hosts
step_prediction      how long a step takes in such a way, of what parts, and how much memory
ranking              predictions from the best to the worst, and the choice
variations           settings that change a job's numbers and may make it faster
host_split           how many workers each host gets, and the plan over all hosts
sampling             from a step to its shards, and from these to spans of the sample order
data_partition       which host has how much of the data (`data: local`), and so which shards
metric_decisions     from held-out metrics to which state is best, and when to stop
eval_batches         held-out batches, and how their sums become metrics
reduction_tree       the balanced binary tree over shards: subtrees, order, depth
teams                which workers compute a shard together, and which slices each of them does
shard_placement      which host computes which shards, as complete subtrees
ownership            which host keeps and updates what: replicated, sharded, servers, slices
host_role            HostRole: what one host computes, sums, updates and keeps
assignment           Assignment: what one worker does while the membership lasts
step_phases          phases of a step as one word that only grows: the barrier's protocol
worker_messages      what an agent and a worker of its host say to each other
forkserver_messages  what an agent and its forkserver say to each other
memory_layout        where every tensor is in the shared segments
blocks               parameters cut into blocks, and blocks given to owners
byte_ranges          byte ranges: merged, cut evenly, intersected
slot_map             where gradients are in a slot, and the buckets that hosts send
digest_sample        which bytes of the state the ledger digests at each step
"""
