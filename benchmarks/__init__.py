"""The programs behind the published tables: `python -m benchmarks NAME`."""
