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
launcher     `lockstep run --on`: asks `up`, or a driver of Ray, for hosts
on_ray       `lockstep run --on ray`: starts such a driver
ray_driver   what runs in it, the one module that imports Ray
ray_places   where Ray keeps room for agents
ray_agent    what Ray runs on each node
seats        pure: which of Ray's nodes have an agent, and which get another one
environment  pure: what torchrun and SLURM say of a process's place
launched     a job whose processes torchrun or SLURM starts
commands     the commands of all this
"""
