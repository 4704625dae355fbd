"""Object HalBench."""
