"""What the benchmarks of both pools and of the transfer measure where models run on a GPU."""
