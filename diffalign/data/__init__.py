"""Preference records, their readers, and the batches made of them."""
