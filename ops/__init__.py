"""Monitoring of the service: Prometheus, its rules and alerts, and the dashboard."""
