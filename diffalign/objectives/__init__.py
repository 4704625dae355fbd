"""Losses of preferences: pure functions of per-view likelihoods."""
