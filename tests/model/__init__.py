"""Tests of data, training and evaluation."""
