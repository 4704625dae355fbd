"""Replacements of the images of a response: one module a kind."""
