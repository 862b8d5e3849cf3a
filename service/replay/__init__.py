"""Replay of a fleet to a running service, as a data collector sends it: flights, then failures.

Does not import the API; import-linter verifies this.
"""
