"""Settings of every test."""

from hypothesis import settings

# How long an example takes says more about what else the machine is doing.
settings.register_profile("llumsched", deadline=None)
settings.load_profile("llumsched")
