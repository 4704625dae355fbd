"""What looks at a run while it trains: one hook a file."""
