"""Marks of tests by what they start, given by the folder or the file that they are in.

engine   a vLLM engine core, in this process or another
ray      a Ray cluster
chaos    faults injected into real instances
slow     seconds of computing, though it starts nothing
"""

from __future__ import annotations

MARKS: dict[str, tuple[str, ...]] = {
    "tests/e2e": ("engine", "ray"),
    "tests/chaos": ("engine", "ray", "chaos"),
    "tests/migration": ("engine",),
    "tests/migration/test_destination.py": (),
    "tests/migration/test_rate_limit.py": (),
    "tests/contract": ("engine",),
    "tests/project/test_gpu_check.py": ("slow",),
    "tests/project/test_packaging.py": ("slow",),
    "tests/config/test_writing_a_policy.py": ("slow",),
    "tests/frontend/test_clients_left_out.py": ("slow",),
}
"""Folder or file -> marks; what is nearest to a test counts."""

ALL = ("engine", "ray", "chaos", "slow")


def marks_of(path: str) -> tuple[str, ...]:
    """The marks of a test file.

    Args:
        path: from the root of the checkout, with slashes.
    """
    places = [place for place in MARKS if path == place or path.startswith(f"{place}/")]
    return MARKS[max(places, key=len)] if places else ()
