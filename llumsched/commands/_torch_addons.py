"""Companions of torch that would keep vLLM from loading a model, found before vLLM is imported.

vLLM for CPU requires torchvision, torchaudio and torchcodec, and a package index without their CPU
builds supplies those for CUDA, which cannot be imported beside a CPU torch. transformers imports
them where it finds them, so that a text model then fails to load. None of them is needed here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata

from llumsched.commands import CommandError

ADDONS = ("torchvision", "torchaudio", "torchcodec")
CPU_BUILD = "+cpu"


def check_torch_addons(
    version_of: Callable[[str], str] = metadata.version,
    load: Callable[[str], object] = importlib.import_module,
) -> None:
    """See that each companion of a CPU torch that is not of its build can be loaded.

    Args:
        version_of: the version of an installed distribution; raises ``PackageNotFoundError``.
        load: imports a module.

    Raises:
        CommandError: for those that cannot, with the one command that removes them.
    """
    if CPU_BUILD not in (_version(version_of, "torch") or ""):
        return
    broken = []
    for name in ADDONS:
        version = _version(version_of, name)
        if version is None or CPU_BUILD in version:
            continue
        try:
            load(name)
        except Exception:  # whatever a library of another build raises
            broken.append(name)
    if broken:
        raise CommandError(
            f"{', '.join(broken)} cannot be loaded beside the CPU build of torch, and then vLLM"
            " cannot load a model. They are not needed:"
            f" python -m pip uninstall --yes {' '.join(broken)}"
        )


def _version(version_of: Callable[[str], str], name: str) -> str | None:
    try:
        return version_of(name)
    except metadata.PackageNotFoundError:
        return None
