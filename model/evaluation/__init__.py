"""Evaluation: calibration, drift, conformal sets, explanations."""
