"""Training of the network, from recordings to a checkpoint."""
