"""Measuring this machine: the train step, the loop around it, decoding, and the same work by the libraries others use."""
