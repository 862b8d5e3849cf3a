"""Helpers of tests: processes, connections, bodies, models, files."""
