"""The whole Medusa step on one device: static tensors, captured as a CUDA graph; eager, the same code runs anywhere."""
