"""Measuring: how long a step takes, and what the machine could do at best."""
