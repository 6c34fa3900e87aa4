"""The user's optimizer, run on blocks of the parameters.

Each block is updated by its owner alone, with the user's own `torch.optim` class. A class that is
not known to allow it is undivided: one owner updates all parameters.
A *row update* touches only the rows of a table that have a gradient.
A *local SGD round* is several optimizer steps between two exchanges.

introspection      the user's optimizer taken apart: groups, options, the state that it keeps
known_optimizers   which classes may be divided among owners
undivided_trial    what other classes keep, found by stepping a copy
undivided_update   these others: one owner updates all parameters
sliced_parameters  the optimizer over slices, and which parameters it lets be cut
remembered         an optimizer's options and attributes
probes             whether options allow a known class's tensors to be cut
update_groups      blocks that are updated together, with their gradients and state
block_owner        an owner's part of a step: sum its blocks' gradients and update them
direct_update      fused kernels, called with lists of tensors that are kept
row_update         optimizer steps on touched rows only
chained            several optimizers as one: `lockstep.Together`
lr_schedule        the learning-rate schedule, which can go back with the state
local_sgd          local SGD as a task: several local steps of a shard as one
local_rounds       a worker's local steps of each shard, and their state
"""
