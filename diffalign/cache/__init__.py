"""Values computed once, kept on disk, and used by any number of runs."""
