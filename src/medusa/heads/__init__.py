"""Medusa heads: their configuration, the module, the files."""
