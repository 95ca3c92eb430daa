"""Speed, measured and never asserted: `make bench`, or `python -m benchmarks -k mixing`."""
