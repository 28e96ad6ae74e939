"""The policies that ship: one module a policy, named here once.

`BUILT_IN` is what `setup.py` registers under the entry-point group `llumsched.policies`. Nothing of
ours is imported here: a policy is loaded when it is asked for.
"""

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        # Bundles
        "latency": "llumsched.policies.latency:bundle",
        # Dispatch
        "freeness": "llumsched.policies.freeness:Freeness",
        "round_robin": "llumsched.policies.round_robin:RoundRobin",
        # Migration
        "freeness_pairs": "llumsched.policies.freeness_pairs:FreenessPairs",
        # Victims
        "low_priority_short": "llumsched.policies.low_priority_short:LowPriorityShort",
    }
)
"""Name -> `module:attribute`, where the attribute is a policy class or a function that returns a
`PolicyBundle`."""
