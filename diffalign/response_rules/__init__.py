"""Rules that hold a response against the truth: pure functions of its text."""
