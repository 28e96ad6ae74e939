"""The Ray cluster of a pool: one that runs already, or a local one."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray

logger = logging.getLogger(__name__)


RAY_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # Its own warning about GPU masks does not concern a CPU actor.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # It starts its workers at low priority, meant for machines that also serve people.
        "RAY_worker_niceness": "0",
        # When a machine is nearly full it ends its own workers, whichever program fills it. An
        # instance has all the memory that it will have when it has booted: ending it helps another
        # program alone, and the next one is ended as well.
        "RAY_memory_monitor_refresh_ms": "0",
        # It would have the kernel end its workers before any other process.
        "RAY_worker_oom_score_adjustment": "0",
        # It starts a worker for each CPU before anybody asks. An instance, whose environment is its
        # own, takes none of them; each costs seconds of a core to start, and idles for ever after.
        "RAY_prestart_worker_first_driver": "0",
        # It measures every process for a dashboard that is not served: every five seconds, which
        # takes half a hundredth of a core.
        "REPORTER_UPDATE_INTERVAL_MS": "60000",
    }
)
"""Environment of a Ray cluster that is started here; what the user has set holds."""


MISMATCH = "Version mismatch"
TOKEN_WARNINGS = "ray._private.authentication.authentication_token_setup"


class LaunchError(Exception):
    """The pool cannot be started; the message says why and what to change."""


def start_ray(address: str | None, *, num_cpus: int) -> bool:
    """Attach to a Ray cluster, or start a local one.

    Args:
        address: as ``ray.init`` takes it; ``None`` attaches to the cluster that ``RAY_ADDRESS``
            or this machine's latest ``ray start`` names, and else starts one.
        num_cpus: logical CPUs of a cluster that is started.

    Returns:
        whether a local one was started, which ends with this process.

    Raises:
        LaunchError: if there is no cluster at ``address``, or one of another version.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    named = address or os.environ.get("RAY_ADDRESS")
    found = named or _latest_ray_start()
    if found is not None:
        try:
            ray.init(address=found, **quiet)
            return False
        except ConnectionError as error:
            if named is not None:
                raise LaunchError(
                    f"There is no Ray cluster at {named}. Start one with 'ray start --head', or "
                    "leave --ray-address and RAY_ADDRESS out to have a local one started."
                ) from error
            logger.warning("The Ray cluster last started, at %s, is gone.", found)
        except RuntimeError as error:
            # Ray says so of another version, of itself or of Python.
            if MISMATCH not in str(error):
                raise
            ray.shutdown()
            of = _versions(str(error))
            if named is not None:
                raise LaunchError(
                    f"The Ray cluster at {named} is not of the same versions as this Ray ({of})."
                    " Install those of the cluster here, or leave --ray-address and RAY_ADDRESS"
                    " out to have a local one started."
                ) from error
            logger.warning(
                "The Ray cluster last started, at %s, is of other versions (%s): a local one is"
                " started.",
                found,
                of,
            )
    # Ray asks for a token whoever connects to a local cluster, and else takes one that it keeps in
    # a file for all clusters of this user.
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # It warns that it asks for one, and how to have it ask no more.
        logging.getLogger(TOKEN_WARNINGS).setLevel(logging.ERROR)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    return True


def attach(address: str) -> None:
    """Attach to the Ray cluster at an address, of which a node runs on this machine.

    Raises:
        LaunchError: if that cannot be.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise LaunchError(
            f"There is no Ray cluster at {address}: give the address of the server's, which "
            "'ray start' names on its head."
        ) from error
    except (RuntimeError, ValueError) as error:
        ray.shutdown()
        if MISMATCH in str(error):
            raise LaunchError(
                f"The Ray cluster at {address} is not of the same versions as this Ray "
                f"({_versions(str(error))}). Install those of the cluster here."
            ) from error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LaunchError(
            f"This machine is not part of the Ray cluster at {address} ({said}): run 'ray start "
            f"--address={address}' here first."
        ) from error


def _versions(mismatch: str) -> str:
    """Versions on both sides: "cluster: Ray 2.55.0, Python 3.11.7; here: Ray 2.60.0, ..."."""
    pairs = re.findall(r"\b(Ray|Python): ?(\S+)", mismatch)
    half = len(pairs) // 2
    sides = [", ".join(" ".join(pair) for pair in side) for side in (pairs[:half], pairs[half:])]
    return f"cluster: {sides[0]}; here: {sides[1]}" if half else " ".join(mismatch.split())


def _latest_ray_start() -> str | None:
    """The address that the last ``ray start`` on this machine wrote down, if any.

    Not Ray's "auto", which also finds the private clusters of other programs and would end
    with them.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    path = Path(folder) / "ray" / "ray_current_cluster"
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def cluster_resources() -> Mapping[str, float]:
    """All that the cluster has, by Ray's name of the resource."""
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


def in_words(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs, for a sentence."""
    named = {name: resources[name] for name in ("CPU", "GPU") if name in resources}
    return " and ".join(f"{amount:g} {name}" for name, amount in named.items()) or "nothing"
