"""Measurements: bench.run on a GPU, bench.cpu on the CPU. No row from a red test."""
