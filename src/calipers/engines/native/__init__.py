"""The native engine: loops in C++ over values as they lie in memory, on all of torch's threads.

`build` compiles the sources once for a machine, `abi` hands tensors over and spreads the work.
Every other module calls what the header of its name declares.
"""
