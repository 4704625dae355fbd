"""Detectors of objects in images: one module a kind."""
