"""A world of small images with exact ground truth, and the tiny models that live in it."""
