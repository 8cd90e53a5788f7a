"""Heads of other projects and engines: read, written, shared. One file a format."""
