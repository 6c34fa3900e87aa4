"""Coordinate: one coordinator per job decides how far to go, and with which hosts.

It runs in the process that called `lockstep.run`, beside the agent code of its own host, and never
imports torch. A *lease* is the step up to which workers may run without asking. *Rendezvous* is how
hosts come to a job: compared, planned for, set up. *Host membership* decides, purely, which hosts
take part and from which step a new *generation* of them goes on.

coordinator               the loop: grants leases, records steps, evaluates, writes checkpoints
stop_schedule             at which steps a run pauses, and for what
metric_watch              a run's evaluations, and what follows from them
checkpoint_timer          when a checkpoint is due by time, and what they may cost
host_group                HostGroup: the hosts of a run (the contract)
single_host_group         a host group of one: this host alone
network_host_group        several hosts, paused and resumed together: the I/O of host membership
host_membership           pure: which hosts take part, and what becomes of a step on a change
host_inbox                messages of other hosts, handled at once or kept until they can be
open_hosts                the hosts of a job before it runs: they load the task, and are set up
rendezvous                hosts come, are compared, get the plan, become ready
network_evaluation_share  validation batches divided among hosts, and their answers collected
parts_collector           parts of the state that only single hosts have, collected at the master
divergence_check          digests of the same steps on several hosts, compared
run_control               requests to a running job: from signals, from Python, from a Unix socket
launcher                  Launcher: what brings agents to hosts (a protocol)
"""
