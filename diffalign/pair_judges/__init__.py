"""Judges of two images next to each other: the probability that the first is the preferred one."""
