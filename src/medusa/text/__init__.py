"""Text around the model: chat templates, streams of tokens, turns."""
