"""Coordinate: one coordinator per job decides how far to go, and with which hosts.

It runs in the process that called `lockstep.run`, beside the agent code of its own host, and never
imports torch. A *lease* is the step up to which workers may run without asking. *Rendezvous* is how
hosts come to a job: compared, planned for, set up. *Host membership* decides, purely, which hosts
take part and from which step a new *generation* of them goes on.

coordinator        the loop: grants leases, records steps, evaluates and writes checkpoints
stop_schedule      at which steps a run pauses, and for what
host_group         the hosts of a job: their links, and the I/O of host membership
host_membership    pure: which hosts take part, and what becomes of a step when one dies or joins
rendezvous         hosts come, are compared, get the plan, become ready
open_job           a job on several hosts before it begins: offered, joined, planned
divergence_check   digests of the same steps on several hosts, compared
run_control        requests to a running job: from signals, from Python, from a Unix socket
launcher           Launcher: what brings agents to hosts (a protocol)
"""
