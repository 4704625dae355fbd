"""Pairs of images."""
