"""Rewards of responses about images: one number a response, higher is better, one kind a file."""
