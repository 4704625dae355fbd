"""One short module per verb of the command line."""
