"""Instances that share a GPU boot one after the other.

vLLM measures the memory that is free when it begins to boot, and again when it has loaded the
model; what another process takes or gives back meanwhile it would count as its own. A turn is a
lock on a file for each GPU, which the kernel undoes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# Where Ray writes which GPUs a process has.
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@contextlib.contextmanager
def gpu_turn(environment: Mapping[str, str], folder: Path | None = None) -> Iterator[None]:
    """While this lasts, no other process of this user has its turn at the same GPU.

    Args:
        environment: names the GPU.
        folder: where the locks are, the same for all processes of the machine.
    """
    gpu = next((environment[name] for name in VISIBLE_DEVICES if environment.get(name)), "all")
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"llumsched-gpus-{os.getuid()}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            file = stack.enter_context((folder / re.sub(r"[^\w-]", "-", gpu)).open("ab"))
        except OSError as error:  # booting may still go well
            logger.warning("Takes no turn at GPU %s: %s cannot be used: %s", gpu, folder, error)
        else:
            _lock(file, gpu)
        yield


def _lock(file: IO[bytes], gpu: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("Waits for another instance on GPU %s to boot", gpu)
        fcntl.flock(file, fcntl.LOCK_EX)
