"""Stored predictions, flights and labels: the use cases. SQL is in the package sql only."""
