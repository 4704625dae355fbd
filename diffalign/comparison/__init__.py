"""Scores of images, and models compared by them."""
