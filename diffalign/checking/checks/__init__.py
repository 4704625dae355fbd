"""What is looked for in a data set: one check a file."""
