"""Image grids, scores and paired comparisons."""
