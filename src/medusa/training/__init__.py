"""Training heads: text to learn from, the model's features at each position, the training itself."""
