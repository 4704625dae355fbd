"""Readers of image pairs: one module a format."""
