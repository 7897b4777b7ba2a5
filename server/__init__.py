"""The coordinator: Flower ServerApp, round engine, strategies, checkpoints."""
