"""Speed and memory of this library and of the reference, measured side by side: `python -m benchmarks --help`."""
