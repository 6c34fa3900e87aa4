"""Ranks: a job whose processes are started elsewhere, one on each host; rank 0 is the master.

rank_environment  what torchrun and SLURM say of a process: its rank, how many, where rank 0 is
cluster_spec      the same from a job file that lists the cluster's processes
launcher          lets the other ranks in, and tells them of the job
"""
