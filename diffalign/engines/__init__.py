"""Who does the blocks of a job: processes of this machine, or actors of a Ray cluster."""
