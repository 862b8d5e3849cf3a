"""Replay of a fleet to a running service, as a data collector sends it: flights, then failures."""
