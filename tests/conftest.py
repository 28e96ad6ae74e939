"""Settings of every test."""

import os

from hypothesis import settings

# How long an example takes says more about what else the machine is doing.
# The examples of every run are the same, so that a change is judged by what it changed; whoever
# looks for new ones asks for them: see `tests.campaigns`.
settings.register_profile(
    "llumsched", deadline=None, derandomize="LLUMSCHED_EXAMPLES" not in os.environ
)
settings.load_profile("llumsched")

# Otherwise the first request with logprobs waits for a compiler, in every engine.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
