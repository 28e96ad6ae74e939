"""Write ``simulator/data/example.csv``: the trace that ships, for a first simulation.

Half an hour's worth of chats in two minutes, with shared system prompts, a tenth of them of high
priority. It is made by our own generator, so nobody's traffic is in it, and small enough to read.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from llumsched.simulator.results.export import write_trace
from llumsched.simulator.traces.generators import GeneratorOptions, generate
from llumsched.simulator.traces.trace import Trace

PATH = Path(__file__).parents[1] / "simulator" / "data" / "example.csv"
_HIGH_SHARE = 0.1
# A hash covers everything before it, so every fourth one is the hash of a block four times as long.
_COARSER = 4


def example_trace() -> Trace:
    """The trace, the same every time."""
    options = GeneratorOptions(rate_rps=4.0, cv=1.5, num_requests=400, seed=0)
    trace = generate("sessions", options).with_priorities(_HIGH_SHARE, seed=0)
    assert trace.prefix_hashes is not None
    return dataclasses.replace(
        trace,
        arrival_s=(trace.arrival_s - trace.arrival_s[0]).round(3),
        prefix_hashes=tuple(row[_COARSER - 1 :: _COARSER] for row in trace.prefix_hashes),
        hash_block_size=trace.hash_block_size * _COARSER,
    )


def main() -> int:
    """Write the file."""
    write_trace(example_trace(), PATH)
    print(f"written: {PATH}, {PATH.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
