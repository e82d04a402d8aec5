"""State, optimizer, step, loop, checkpoints and metrics."""
