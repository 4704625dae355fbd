"""Sources that sample from the model in training: rounds of sampling, judging and pairing."""
