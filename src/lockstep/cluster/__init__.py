"""From machines to agents: what starts an agent on each host of a cluster, and offers it jobs.

A *head* (`lockstep up`) enrols hosts and knows which are there. A *node* (`lockstep join`) is a
host that waits for jobs, and starts an agent process for each. A *launcher* brings agents to the
hosts of one job: of such a cluster, of Ray, or processes that torchrun or SLURM starts (*ranks*).

daemon/        `lockstep up` and `lockstep join`
ray/           the nodes of a Ray cluster
ranks/         processes that torchrun, SLURM or people start, one on each host
state_folder   what a host keeps of who it is, and of which cluster
token_file     join tokens in files and on stdin
"""
