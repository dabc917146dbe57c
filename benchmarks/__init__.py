"""Benchmarks: workloads, timing, baselines, the image oracle and the records they leave."""
