"""Batch scoring, file to file: what `engine-health score` does. Knows files and the model, no HTTP and no database."""
