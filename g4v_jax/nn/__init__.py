"""Layers every tower is made of; the only place that wraps Flax layers."""
