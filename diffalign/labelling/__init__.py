"""Preferences of people: what they are asked, what they answer, and the files made of it."""
