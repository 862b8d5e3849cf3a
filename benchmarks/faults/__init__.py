"""Injection of faults around the service: responses, lost flights and time to recovery."""
