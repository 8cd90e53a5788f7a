"""Medusa inside `generate` of transformers."""
