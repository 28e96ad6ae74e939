"""How much is tried: enough for every change, or as much as there is time for.

``LLUMSCHED_EXAMPLES=100 pytest tests/simulator/test_modes.py`` tries a hundred times as many, and
new ones each time; without it every run tries the same.
"""

import os

# Every state, every round, every fault on real engines; without it a choice of them.
THOROUGH = os.environ.get("LLUMSCHED_THOROUGH") == "1"
FACTOR = int(os.environ.get("LLUMSCHED_EXAMPLES", "1"))


def examples(num_examples: int) -> int:
    """As many as a test asks for, or that many times as many."""
    return num_examples * FACTOR
