"""Data sets of preferences looked at before anybody trains on them."""
