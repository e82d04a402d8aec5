"""The safety set: harmful requests and their harmless lookalikes, in words and about clips, and a card that tells of it."""
