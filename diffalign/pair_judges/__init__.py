"""Judges of two images beside each other: the probability that the first is the preferred one."""
