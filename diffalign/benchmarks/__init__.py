"""Benchmarks of responses about images: one folder a kind."""
