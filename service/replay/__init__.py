"""Sends a fleet to a running service, as a data collector would: flight by flight, then its ends."""
