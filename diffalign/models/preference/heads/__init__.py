"""Heads of reward models: from features of an image and its prompt to a score, one kind a file."""
