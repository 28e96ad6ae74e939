"""One gloo device for all process groups of an instance.

vLLM makes a gloo group for every kind of parallelism, also where each has one member; on a CPU that
is a dozen. torch gives each a device of its own, with a thread that wakes a hundred times a second
whether anything is sent or not. Groups can share one: connections are kept apart by the groups.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed.distributed_c10d as c10d


def share_gloo_device() -> None:
    """Have every gloo group that this process makes from now on use one device.

    torch offers no parameter for it where vLLM makes its groups, so the class that it makes them
    of is replaced. A torch without gloo has no such class, and nothing to share.
    """
    module: Any = c10d
    if not c10d.is_gloo_available() or getattr(module.ProcessGroupGloo, "shares_device", False):
        return
    original: Any = module.ProcessGroupGloo
    devices: list[Any] = []

    class ProcessGroupGloo(original):  # type: ignore[misc]
        """A gloo group on the device of all others."""

        shares_device = True

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if not devices:
                # Made with the first group, when the interface that it is to use has been chosen.
                devices.append(original.create_default_device())
            options = original._Options()
            options._devices = devices
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    module.ProcessGroupGloo = ProcessGroupGloo
