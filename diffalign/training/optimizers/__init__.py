"""What moves the weights: one optimiser a file."""
