"""Answers to declarative counts, suppressed under the least cell size and remembered."""
