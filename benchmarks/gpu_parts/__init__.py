"""The sections of `benchmarks/gpu.py`: each is a generator of rows, importable without a GPU."""
