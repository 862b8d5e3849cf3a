"""Tests of the public API, over the wire."""
