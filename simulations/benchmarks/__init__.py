"""Benchmarks: each with a floor or a peer beside it in the same run, reported as ratios."""
