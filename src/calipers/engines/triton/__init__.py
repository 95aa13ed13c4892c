"""The Triton engine: kernels on CUDA devices, compiled where they are first called."""
