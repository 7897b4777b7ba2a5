"""Training and evaluation inside the worker process."""
