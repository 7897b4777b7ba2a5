"""Where the label and the mask of an image come from, a source of truth a file."""
