"""Tests of parsers and serialisers."""
