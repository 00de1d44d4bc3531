"""The problems: a network, its data, loss, optimizer, learning rate and test."""
