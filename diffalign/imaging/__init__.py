"""Images as files, in captioned grids and in strips."""
