"""Sources that sample from the model in training: rounds of sampling, scoring and pairing."""
