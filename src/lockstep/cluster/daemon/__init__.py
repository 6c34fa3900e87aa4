"""`lockstep up` and `lockstep join`: a cluster of hosts that wait for jobs.

head               `up`: enrols hosts, and tells them of jobs
registry           pure: which hosts and jobs there are, and who is to be told what
host_certificates  the CA's part of `up`: hosts' certificates are signed, renewed, revoked
control_socket     the Unix socket on which `up` takes requests of its machine
cluster_messages   what all of these say to each other
node               `join`: waits for jobs, and has an agent process for each
reconnecting_line  a connection to `up` that is opened again when it is lost
certificate_renewal  a host's part: its certificate is renewed while it is connected
admission          pure: which jobs a host takes
restart_policy     pure: whether a job gets another agent where one has died
agent_processes    starts, watches and ends agent processes
agent_main         what runs in such a process
launcher           asks a cluster for hosts, for `lockstep run --on`
"""
