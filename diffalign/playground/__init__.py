"""A world of small pictures with exact ground truth, and the tiny models that live in it."""
