"""Native: parts of a step without the interpreter, in C++, which a compiler on the machine builds.

They call PyTorch's own kernels, in the same order as the Python that they stand for: no bit depends
on whether they are there. The Python is always there, and does whatever they do not (see
`worker.traced_shard` and `worker.train_step`).

build        compiles the C++ files beside it, into the user's cache: `lockstep build-native`
library      finds and loads what was compiled, or says why not
sources      the C++ files, and the name of what is made of them
lowering     a traced graph as a native list of kernels
step_tail    a step's meetings, sums and updates as one native call
"""
