"""The command line: `lockstep COMMAND`. Results go to stdout, everything else to stderr.

main              the commands that work on jobs and runs, and how errors end a command
job_options       an option for each setting of a job
task_options      options for the arguments of a recipe or task, read from its source
task_help         `lockstep run RECIPE --help`
rank_command      `lockstep rank`: one process of a job that torchrun or SLURM starts
cluster_commands  the commands of a cluster: up, token, hosts, join, pack, secret
launchers         the launcher that `--on` names
doctor            `lockstep doctor`: the checks of this machine
"""
