"""Process groups of an instance share a gloo device; in a process of its own, for they stay."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import pathlib
import torch
import torch.distributed as dist
from llumsched.engine.vllm.gloo_device import share_gloo_device

share_gloo_device()
share_gloo_device()
dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
groups = [dist.new_group([0], backend="gloo") for _ in range(5)]
total = torch.ones(3)
for group in groups:
    dist.all_reduce(total, group=group)
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(total.tolist(), names.count("gloo_tcp_loop"))
"""


def test_many_groups_have_one_thread_that_listens() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        check=True,
    )
    assert done.stdout.split("\n")[0] == "[1.0, 1.0, 1.0] 1"
