"""Tests of the service under overload and faults at full size: `python -m benchmarks.endurance`."""
