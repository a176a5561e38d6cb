"""What does the gateway cost? Benchmarks beside nginx and beside no proxy; not in the wheel."""
