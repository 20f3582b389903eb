"""Benchmarks: every figure is a ratio of contenders timed in turn in one run."""
