"""A check of Medusa on a GPU, and its times there, in minutes and without a network: see `scripts/gpu-check`."""
