"""The parts of the comparison of a simulation with the real system."""
