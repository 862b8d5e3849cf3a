"""Batch scoring of files to files (`engine-health score`).

Does not import the API or SQL; import-linter verifies this.
"""
