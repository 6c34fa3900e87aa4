"""The command line: `lockstep COMMAND`. Results go to stdout, everything else to stderr.

main                 run, plan, doctor and data, and how errors end a command
run_folder_commands  the commands on a run's folder: resume, scale, stop, verify, evaluate, ...
watch_commands       the commands that show runs: watch, runs, status, compare
cluster_commands     the commands of a cluster: up, token, hosts, join, pack, secret
native_command       `lockstep build-native`: compiles what runs without the interpreter
rank_command         `lockstep rank`: one process of a job that torchrun or SLURM starts
job_options          an option for each setting of a job
task_options         options for the arguments of a recipe or task, read from its source
task_help            `lockstep run RECIPE --help`
shared_options       options of several commands
output               results on stdout, notes on stderr
plan_tables          what was considered for a plan, as tables and as JSON
launchers            the launcher that `--on` names
doctor               `lockstep doctor`: the checks of this machine
"""
