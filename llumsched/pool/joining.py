"""A pool of a Ray cluster, as it is found by a frontend that wants to join it.

The global scheduler is a Ray actor with a name, and has the invitation of the launcher: what the
frontend must know to be one, keys and all. Whoever may run code in the Ray cluster may ask for it,
as such a one may ask Ray for anything. Nothing of Ray is kept: a frontend goes on without it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypedDict

import ray
from ray.util import list_named_actors

from llumsched import __version__
from llumsched.logs import counted
from llumsched.pool.ray_cluster import LaunchError, attach
from llumsched.scheduler.actor import ACTOR_NAME

ANSWER_TIMEOUT_S = 30.0


class Invitation(TypedDict):
    """Plain values, which also another version can read, but for ``plan``, a pickle.

    ``door`` and ``scheduler`` are the endpoints of launcher and scheduler. ``loopback_of`` is Ray's
    id of the machine if all listen on its loopback, and else ``None``. ``environment`` is that
    which the launcher forwards to instances.
    """

    llumsched: str
    vllm: str
    model: str
    door: str
    scheduler: str
    loopback_of: str | None
    environment: Mapping[str, str]
    plan: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """A machine in the Ray cluster, that of this process: its address, and Ray's id of it."""

    host: str
    node_id: str


def invited(address: str, name: str | None, vllm_version: str) -> tuple[Invitation, Here]:
    """The invitation of a pool, and what the Ray cluster knows of this machine.

    Args:
        address: of the Ray cluster.
        name: of the pool, if there are several; the number of its launcher's process.
        vllm_version: that which is installed here.

    Raises:
        LaunchError: if there is no such pool, or none that this machine can join.
    """
    attach(address)
    try:
        here = Here(
            host=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
        )
        invitation = _ask(address, name)
    finally:
        ray.shutdown()
    check(invitation, here, vllm_version)
    return invitation, here


def check(invitation: Mapping[str, Any], here: Here, vllm_version: str) -> None:
    """Refuse a pool that a frontend of this machine cannot serve.

    Raises:
        LaunchError: naming the way out.
    """
    there = f"llumsched {invitation['llumsched']} on vLLM {invitation['vllm']}"
    own = f"llumsched {__version__} on vLLM {vllm_version}"
    if there != own:
        raise LaunchError(f"The server is {there}, and this is {own}: install those versions here.")
    if invitation["loopback_of"] not in (None, here.node_id):
        raise LaunchError(
            "The server listens on the loopback of its own machine: start it with --any-node to "
            "have frontends on others, or start this one there."
        )


def take_environment(invitation: Invitation, environment: MutableMapping[str, str]) -> None:
    """Have the pool's settings where this machine has none of its own; before anything reads
    them."""
    for name, value in invitation["environment"].items():
        environment.setdefault(name, value)


def _ask(address: str, name: str | None) -> Invitation:
    pools = {
        actor["name"].removeprefix(f"{ACTOR_NAME}-"): actor
        for actor in list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"{ACTOR_NAME}-")
    }
    if not pools:
        raise LaunchError(
            f"No llumsched server runs in the Ray cluster at {address}: start one with "
            f"'llumsched serve MODEL --any-node --ray-address {address}' first."
        )
    if name is None and len(pools) > 1:
        raise LaunchError(
            f"{counted(len(pools), 'llumsched server')} run in the Ray cluster at {address}: name "
            f"the process of one with --pool, of {', '.join(sorted(pools))}."
        )
    found = pools.get(name) if name is not None else next(iter(pools.values()))
    if found is None:
        raise LaunchError(
            f"There is no server {name} in the Ray cluster at {address}: give --pool one of "
            f"{', '.join(sorted(pools))}, or leave it out if there is but one."
        )
    try:
        scheduler: Any = ray.get_actor(found["name"], namespace=found["namespace"])
        asked: Any = scheduler.invitation.remote()
        invitation: Invitation | None = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
    except AttributeError:
        raise LaunchError(
            "The server is of an llumsched whose pools no frontend can join: start one of "
            f"llumsched {__version__} there."
        ) from None
    except (ValueError, ray.exceptions.RayError, TimeoutError) as error:
        raise LaunchError(
            f"The global scheduler of the server does not answer ({type(error).__name__}): try "
            "again once the server says that it serves."
        ) from error
    if invitation is None:
        raise LaunchError(
            "The server has started a Ray of its own, which ends with it: start 'ray start --head' "
            "and the server with its --ray-address."
        )
    return invitation
