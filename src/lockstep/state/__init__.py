"""Stage 2, initialise: one shared copy of parameters and optimizer state on each host.

It is in four segments that all workers map: *state* (parameters, buffers, optimizer state),
*snapshot* (an earlier committed state to roll back to), *slots* (one gradient slot per shard) and
*control* (progress words, the lease, the ring buffer of step records).

shared_state        SharedState: parameters, buffers and optimizer state, one copy a host
private_state       the same views in memory of one worker
host_memory         HostMemory: the mapped segments of a host that is set up
allocation          where each tensor goes: in the state segment, and in each slot
control_segment     the words that workers and their agent share between messages
shard_outcomes      a shard's loss and what the task logs beside it, in the control segment
logged_values       what a task logs beside the loss, as means over a shard's samples
snapshot            Snapshot: the committed state of a few steps ago, to roll back to
gradient_slots      a shard's gradient slot: views into shared memory
optimizer_state     the optimizer state's keys, and its values in shared memory
state_form          how what an undivided optimizer remembers is made of tensors and numbers
embedding_tables    large embedding tables: which, and a shard's touched rows in a slot
gradient_codecs     codecs that compress a gradient for a slow link
buffer_rules        how what shards left in a buffer becomes one value: declared, or known
exported_tensors    the plain module's state dict, joined from slices where there are some
module_state        buffers and training modes, which a forward pass may change
fingerprint         digests of tensors and of the whole state
fault_injection     scripted faults, for tests: a worker harms itself at a step and phase
"""
