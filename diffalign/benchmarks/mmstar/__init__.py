"""MMStar, and other multiple choice."""
