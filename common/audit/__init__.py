"""What a reviewer does with a bundle, without network and without torch: verify, compare, read."""
