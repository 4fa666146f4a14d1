"""Measurements, a module each: ``python -m benchmarks.kernels.step`` and others, from the root of the repository."""
