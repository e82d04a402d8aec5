"""Sources of clips, captions and dialogues, and their way into arrays."""
