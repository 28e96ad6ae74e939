"""The Ray host of the core: the scheduler's actor, the instances, and what moves requests."""
