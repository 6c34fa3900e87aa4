"""Devices: where a worker computes, and what it and its host's shared memory give each other.

The *home* of a worker is the memory in which it computes: its own view of parameters, optimizer
state and gradient slots, laid out as the host's segments are. What it has made for others is
*stored* in the segments, what others have made is *loaded* from them, and both are done when it has
*settled*. Where homes are the segments themselves, nothing is moved.

device              Device: the contract, and what follows each call
shared              homes that are the host's segments: CPU workers, by default
apart               homes of the workers' own on the CPU: moves as for a GPU, seen by any test
staged              homes in the memory of a torch device, moved through pinned memory
cuda                a GPU for each worker: written, and not run yet
staging             runs of bytes on their way between a GPU and a segment, in pinned memory
placement           a batch's tensors on a device
determinism         what makes a GPU's bits repeatable, and when a result is refused
choice              the device that a plan names
"""
