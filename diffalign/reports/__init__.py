"""One page of a training run, two runs side by side, and a browser of many."""
