"""The simulated pool: instances, moves and the scheduler on one clock."""
