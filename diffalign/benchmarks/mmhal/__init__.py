"""MMHal-Bench."""
