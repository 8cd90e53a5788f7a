"""Grammars: JSON, JSON schemas and calls of tools as constraints of a text."""
