"""How much each token of a response counts: one module a kind."""
