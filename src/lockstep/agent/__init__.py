"""Supervise: one agent per host starts the workers, watches them and replaces them.

An agent never computes and never imports torch. Its *worker group* is the workers of its host; a
*worker_id* names one of them for the job, its *rank* is its number among the members of now. A
*heartbeat* is a sign of progress in the control segment; a worker is *stalled* when it
has none for longer than the stall policy allows. *Membership* decides who works, *recovery* from
which step; both are pure. The *epoch* of membership grows whenever the set of workers changes.

agent               takes part in a job on another host than the coordinator's
local_host          this host: its forkserver, its workers and its shared memory
worker_group        a host's workers, led through starts, steps, deaths and regroups
followed_part       a host's part in a job whose coordinator is on another host
host_regroup        one host's part when the hosts of a job are regrouped
forkserver_client   the forkserver as its owner sees it: a process that answers over a channel
preload             preloaded(): keeps a forkserver with torch for many runs
profiling           what a job costs on this host: measured in a clone, or from the cache
membership          pure: who works, who joins, who is replaced
recovery            pure: where to go on after a death
stall_policy        how long a worker may show no heartbeat
failure_log         deaths: who, where, and what they cost; when to stop for good
failure_detector    kills workers that show no heartbeat
step_log            committed steps, from the ring buffer to the observer, in order
time_sampler        what a host's workers spend their time on, told once a second
last_state          what a failed run has committed last, for a checkpoint
evaluation_rounds   held-out batches given to workers, and their answers collected
observer            RunObserver: what is done with commits, events, evaluations, checkpoints
job_offer           what a host has to know in order to take part in a job
host_messages       what the agents of a job and its coordinator say to each other
regroup_messages    HostStatus and RegroupOrder: what hosts and coordinator say in a regroup
answer_chunks       answers to held-out batches, as messages of bounded length
"""
