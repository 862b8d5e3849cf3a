"""Benchmarks that produce the tables of the README, the docs and the model card."""
