"""Stage 4, synchronise: barriers, sums in one fixed order, and what hosts exchange.

A *partial sum* is the sum of one subtree of the reduction tree. Within a host, gradients are summed
where they are, in shared memory; between hosts, partial sums travel, and every host adds them in
the same order. A *generation* is the time between two regroupings of the hosts.

barrier                the meeting of a host's workers: progress words, a short spin, then a futex
gradient_presence      which shards of a step have a gradient for which parameter
tree_sum               gradients summed, and buffers merged, along the reduction tree
subtree_sum            a host's partial sums for other hosts
table_sum              sums of large embedding tables, by touched rows
grad_norm              the global gradient norm and its limit, as `clip_grad_norm_`
gradient_compression   what one group of shards gives the others, compressed, with residuals
exchange_plan          what goes from host to host in a step, and where in memory it belongs
exchange_thread        the agent's thread that sends and receives it
board_relay            carries a team's boards over to the other hosts of the team
host_mesh              a host's connections of one generation, its exchange thread, its state
state_transfer         the state, or a part of it, from one host to another
"""
