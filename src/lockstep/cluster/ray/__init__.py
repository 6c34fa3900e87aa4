"""Ray: the nodes of a Ray cluster become the hosts of a job.

The *driver* is a process of its own that uses Ray; an *actor* on each node starts the agent there.

launcher          starts a driver, and asks it for hosts
driver            keeps an agent on every node; the one module that imports Ray
actor             what Ray runs on each node
node_agents       pure: which nodes have an agent, and which get another one
placement_groups  how Ray keeps CPUs for agents
"""
