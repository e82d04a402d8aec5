"""Losses: pure functions from outputs and batch to `Term`s, and how terms combine.

Each objective has two functions: `terms` (sums and counts of one micro-batch) and `counts` (the counts alone,
which depend on the batch's masks only, so that they are known for the whole batch before any gradient is taken).
"""
