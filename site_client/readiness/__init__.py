"""A site's measured answer to a plan's contract."""
