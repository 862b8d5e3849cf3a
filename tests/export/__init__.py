"""Tests of the export and of attached models."""
