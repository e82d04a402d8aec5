"""Measuring a trained model on a held-out split: captions, rendered clips, refusals, and the report of all three."""
