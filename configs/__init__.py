"""Plans and site files that run as they are."""
