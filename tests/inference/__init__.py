"""Tests of model loading, admission, batching and prediction."""
