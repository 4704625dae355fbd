"""Scorers of images: one float per image and prompt, higher is better."""
