"""Pairs from scores: which images of a prompt are preferred to which others, one rule a file."""
