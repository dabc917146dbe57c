"""Training of the embedded model: `python -m latentrt.benchmarks.training`."""
