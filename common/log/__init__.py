"""The log: a Merkle tree over canonical entries, signed checkpoints, and what witnesses sign.

`entries` says what can stand in it, `merkle` is the tree, `note` the signed text of a checkpoint, `store` the log on a
disk.
"""
