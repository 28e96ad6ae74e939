"""How many examples hypothesis tries.

``LLUMSCHED_EXAMPLES=100 pytest tests/simulator/test_modes.py`` tries a hundred times as many, and
new ones each time; without it every run tries the same.
"""

import os

FACTOR = int(os.environ.get("LLUMSCHED_EXAMPLES", "1"))


def examples(num_examples: int) -> int:
    """As many as a test asks for, or that many times as many."""
    return num_examples * FACTOR
