"""What is measured: `python -m benchmarks.NAME --json FILE`; `results/` holds such files."""
