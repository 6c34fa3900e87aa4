"""From machines to agents: what starts an agent on each host of a cluster, and tells it of jobs.

state        the folder in which a host keeps who it is, and of which cluster
board        pure: who is there, which jobs are open, who is to be told what
counter      a Unix socket on which `up` takes requests of this machine
up           `lockstep up`: enrols hosts and tells them of jobs
line         a connection to `up` that comes back when it was lost
admission    pure: which jobs a host takes
agents       the processes that take part in jobs, one for each
agent        what runs in such a process
member       `lockstep join`: a host that waits for jobs
launcher     `lockstep run --on up`: asks `up` for hosts
environment  pure: what torchrun and SLURM say of a process's place
launched     a job whose processes torchrun or SLURM starts
commands     the commands of all this
"""
