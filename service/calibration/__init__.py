"""Calibration of labelled predictions: statistics, reports and fits of the temperature."""
