"""Tests of the image, Compose, Kubernetes, alerts and benchmarks."""
