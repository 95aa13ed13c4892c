"""What makes a search fast: it knows tensors and number formats, and no search.

`dispatch` chooses an engine and runs it, `kernels` says what engines know how to do, `strides` how
kernels read groups of values where they lie. `native` is C++ on the CPU, `triton` runs on CUDA.
"""
