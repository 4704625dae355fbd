"""How sure a preference is: from votes, from a gap of scores, or as the data says it."""
