"""Prompts, seeds and models -> images or responses, resumable."""
