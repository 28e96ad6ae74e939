"""The launcher's invitation to frontends that it does not start, and the plan that one makes of it.

The pool's own settings hold there as well, API keys among them; what differs is where it listens.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import vllm.envs as envs
from ray import cloudpickle
from vllm.config import VllmConfig
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

from llumsched import __version__
from llumsched.engine.vllm.compat import installed_version
from llumsched.frontend.options.arguments import ServeOptions, UsageError, has_admin_api
from llumsched.frontend.workers.worker import FrontendPlan
from llumsched.pool.instance_actor import forwarded
from llumsched.pool.joining import Invitation
from llumsched.pool.orphans import POOL_ID
from llumsched.wire.keys import PoolKeys

LOOPBACK = "127.0.0.1"


def invitation_of(
    args: argparse.Namespace,
    options: ServeOptions,
    vllm_config: VllmConfig,
    *,
    keys: PoolKeys,
    door: str,
    loopback_of: str | None,
) -> Invitation:
    """The invitation to frontends that want to join; the scheduler adds its own endpoint."""
    told = copy.copy(args)
    told.api_key = [key for key in args.api_key or [envs.VLLM_API_KEY] if key] or None
    maybe_register_config_serialize_by_value()
    environment = forwarded(os.environ)
    environment.pop(POOL_ID, None)
    return Invitation(
        llumsched=__version__,
        vllm=installed_version(),
        model=args.model,
        door=door,
        scheduler="",
        loopback_of=loopback_of,
        environment=environment,
        plan=cloudpickle.dumps((told, options, vllm_config, keys)),
    )


def plan_of(invitation: Invitation, node_host: str, *, host: str, port: int) -> FrontendPlan:
    """The plan of a frontend of this machine, which does not listen yet.

    Args:
        node_host: this machine's address in the cluster.
        host: where HTTP is to be served.
        port: the same.

    Raises:
        UsageError: if this machine lacks a file that the pool names.
    """
    # From Ray, whose users may run any code here.
    args, options, vllm_config, keys = pickle.loads(invitation["plan"])
    args.host, args.port, args.uds = host, port, None
    _check_files(args)
    return FrontendPlan(
        args=args,
        options=replace(options, num_frontends=1, admin_api=has_admin_api(args)),
        vllm_config=vllm_config,
        keys=keys,
        host=node_host if invitation["loopback_of"] is None else LOOPBACK,
        ports=(),
        scheduler_endpoint=invitation["scheduler"],
        listen_address="",
        listener=-1,
        loads=-1,
        metrics_folder=None,
    )


def listening(plan: FrontendPlan, address: str, sock: socket.socket) -> FrontendPlan:
    """The plan, once its frontend listens."""
    return replace(plan, listen_address=address, listener=sock.fileno())


def _check_files(args: Any) -> None:
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(args, name, None)
        if path and not Path(path).exists():
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"The server was started with {flag} {path}, which is not on this machine: put the "
                "file there."
            )
