"""What things cost, as ratios to the plain dense path in the same run: ``python -m benchmarks``."""
