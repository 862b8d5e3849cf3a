"""Batch scoring of files to files (`engine-health score`). Independent of HTTP and of the store."""
