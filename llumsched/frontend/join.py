"""``llumsched frontend``: one more HTTP frontend of a pool that runs, perhaps on another machine.

This process is a frontend as those that the launcher starts, but that nobody watches it: it finds
the pool by Ray, lets go of Ray, makes itself known to the launcher, and serves until it is told to
end, or its pool is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading

import uvloop
import vllm.envs as envs

from llumsched.frontend.options.arguments import UsageError
from llumsched.frontend.options.console import progress
from llumsched.frontend.options.preflight import (
    check_model,
    check_prefix_hashes,
    check_several_frontends,
)
from llumsched.frontend.routing.sockets import FrontendSockets, max_output_num_bytes
from llumsched.frontend.server import bind
from llumsched.frontend.workers import worker
from llumsched.frontend.workers.channel import ChannelClosed
from llumsched.frontend.workers.invitation import listening, plan_of
from llumsched.frontend.workers.launcher_client import LauncherClient, end_this_process
from llumsched.frontend.workers.messages import Admitted, JoinPool, decode_from_launcher
from llumsched.frontend.workers.remote_channel import DoorBell
from llumsched.frontend.workers.worker import FrontendPlan
from llumsched.logs import set_up
from llumsched.pool.joining import Here, Invitation
from llumsched.pool.ray_cluster import LaunchError
from llumsched.wire.names import frontend_id

ADMISSION_TIMEOUT_S = 30.0
STATUS_POLL_S = 0.1
POOL_LOST = 1
INTERRUPTED = 130


def main(invitation: Invitation, here: Here, host: str, port: int) -> int:
    """Serve until a signal, or the end of the pool; the process's exit status.

    Args:
        invitation: the pool's.
        here: this machine.
        host: where HTTP is served.
        port: the same.
    """
    sock: socket.socket | None = None
    try:
        plan = plan_of(invitation, here.host, host=host, port=port)
        set_up("llumsched", plan.options.logs)
        check_model(plan.args.model)
        check_several_frontends(2)
        if plan.options.wants_prefix_blocks:
            check_prefix_hashes(plan.vllm_config, os.environ)
        listen_address, sock = bind(plan.args)
        joins = _join(listening(plan, listen_address, sock), invitation["door"], here.host)
        return uvloop.run(joins)
    except UsageError as error:
        sys.stderr.write(f"llumsched frontend: {error}\n")
        return 2
    except LaunchError as error:
        sys.stderr.write(f"llumsched frontend: {error}\n")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    finally:
        if sock is not None:
            sock.close()


async def _join(plan: FrontendPlan, door: str, node: str) -> int:
    joining, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert joining is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, joining.cancel)  # until vLLM's server has its own
    sockets = FrontendSockets(plan.host, plan.keys, max_output_num_bytes(plan.vllm_config))
    addresses = sockets.addresses()
    wish = JoinPool(
        pid=os.getpid(),
        node=node,
        input_address=addresses.inputs[0],
        output_address=addresses.outputs[0],
    )
    bell = DoorBell(door, plan.keys, wish)
    try:
        try:
            answer = await asyncio.to_thread(bell.channel.receive, ADMISSION_TIMEOUT_S)
        except ChannelClosed as error:
            raise LaunchError(
                f"The server's launcher does not answer at {door} ({error}): see that this machine"
                " reaches it there."
            ) from error
        admitted = decode_from_launcher(answer)
        assert isinstance(admitted, Admitted), "it comes before anything else"
        name, serving = frontend_id(admitted.client_index), threading.Event()

        def lost() -> None:
            if serving.is_set():
                end_this_process()

        supervision = LauncherClient(bell.channel, name, lost, has_joined=True)
        await _until_told(supervision, serving)
        where = f"{plan.args.model} on {plan.listen_address}"
        progress(f"this is {name} of the pool, and begins to serve {where}")
        try:
            await worker.serve(plan, admitted.client_index, supervision, sockets)
        except TimeoutError as error:
            raise LaunchError(
                f"{error} See that the machines of the server reach this one at {plan.host}."
            ) from error
        return POOL_LOST if supervision.is_lost else 0
    finally:
        await asyncio.to_thread(bell.close)


async def _until_told(supervision: LauncherClient, serving: threading.Event) -> None:
    """Wait until the pool has booted; from then on its end is that of this process.

    Raises:
        LaunchError: if it takes longer than an instance may, or is gone.
    """
    deadline_s = asyncio.get_running_loop().time() + envs.VLLM_ENGINE_READY_TIMEOUT_S
    while not supervision.is_told and asyncio.get_running_loop().time() < deadline_s:
        if supervision.is_lost:
            break
        await asyncio.sleep(STATUS_POLL_S)
    serving.set()
    if supervision.is_lost or not supervision.is_told:
        raise LaunchError("The server has not come up: see what it says itself.")
