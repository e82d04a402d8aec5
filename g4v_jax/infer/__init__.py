"""Using a trained model: answers, clips, chat."""
