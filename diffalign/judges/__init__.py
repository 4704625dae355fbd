"""Language models that judge responses."""
