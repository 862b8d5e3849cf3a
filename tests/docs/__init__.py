"""Tests of documents and their generators against the code."""
