"""What the service promises under strain, each promise tried at full size: `python -m benchmarks.endurance`."""
