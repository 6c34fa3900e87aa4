"""Stage 3, compute: the forkserver, the worker processes, and a step of training.

The *forkserver* is the process that has loaded torch and the task; each *worker* is a fork of it.
A *claim* is a worker's right to compute a shard that others have not begun. An *audit* computes a
sample of the shards again, and compares. A *pristine* fork is one in which nothing has been
computed: what it makes of a shard shows whether others' results depend on what they did before.

forkserver         the forkserver: preloads torch and the task, then forks workers in milliseconds
forkserver_loop    its entry point, and the loop that hears agent and children
fork_setup         what a fork of it does before it is a worker, a clone or a check
load_task          what it loads: the task, its model and data sets, and the facts for the plan
device_facts       what a device is and computes, found by a fork
build_state        builds the shared state, once a host
main               a worker process: messages from its agent, steps between them
context            what a worker process keeps while memberships change
moves              what a worker's home and its host's segments give each other in a step
home_moves         the same for homes of the workers' own: sums, parameters, and what is due
native_step        what follows a worker's shards, as one native call where that fits
train_step         one step: compute, meet, reduce, update, meet again; that commits it
loss_capture       a loss as a graph of operations, and when the graph may stand for it
traced_shard       a shard as one list of kernels
direct_calls       less Python around these kernels
shard_tracer       which shards are run so, and the comparison with the plain way
kernel_cache       machine code that was compiled earlier
compiled_shard     a shard as machine code, where the job asks for it
forward_backward   loss and gradient of one shard, into its slot
lone_samples       a shard of one sample, on which BatchNorm cannot train: told at the first step
gradient_hooks     gradients on their way from autograd into the slot
sparse_autograd    large embeddings in sparse form, with a fallback to dense
pristine           computes shards in a fork in which nothing has been computed before
purity_check       before the first step: a shard is computed after two histories, and compared
purity_watch       while a job runs: shards are computed again by pristine forks, and compared
job_measurement    forks that compute shards and steps for a moment, for the planner
measuring_forks    starts and ends these forks
shard_claims       which worker computes which shard, when there are more shards than workers
team_work          a member's part in the shards that a team of workers computes together
evaluate           held-out batches and predictions, computed without learning
audit              recomputes shards and digests blocks, to find silent corruption
model_checks       which models are taken, and why others are refused
error_report       errors as messages; the user's traceback from the user's frame on
"""
