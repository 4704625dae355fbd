"""Published formats of responses: one module a format."""
