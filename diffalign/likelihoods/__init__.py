"""How probable a model finds a sample: one number per row and view."""
