"""`lockstep up` and `lockstep join`: a cluster of hosts that wait for jobs."""
