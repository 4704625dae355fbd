"""Preferences between responses: records, the mappings of published formats, and their source."""
