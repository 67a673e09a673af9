"""The project's own stopwatch: `make bench`, or `python -m benchmarks GROUP ... --seconds 3`."""
