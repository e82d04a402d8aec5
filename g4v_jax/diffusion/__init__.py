"""Flow matching and its samplers, as pure functions."""
