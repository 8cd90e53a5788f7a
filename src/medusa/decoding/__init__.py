"""Draft, verify, accept, keep: the decoding loop and its parts, free of any model."""
