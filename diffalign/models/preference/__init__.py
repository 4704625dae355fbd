"""Networks that are trained to score images."""
