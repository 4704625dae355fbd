"""Published sets of prompts, with their categories: one set a file."""
