"""Latent diffusion models: one module a backbone."""
