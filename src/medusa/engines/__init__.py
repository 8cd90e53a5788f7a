"""What runs a model: the protocol, and the engines that keep it."""
