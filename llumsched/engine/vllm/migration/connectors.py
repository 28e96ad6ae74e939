"""KV connectors (``--kv-transfer-config``, ``--kv-offloading-size``) and requests that move.

A request moves once its own transfer is over: it decodes, and its blocks are its own. At the source
the connector is told what it is told of every request that finishes, and lets go of what it holds.
At the destination the request is new to the connector, which is asked what it has of it, as for
every new one; the answer is not used, as the KV came along. A preemption there looks it up again.

What is not known to begin so, in the middle of a request, keeps its requests in place while they
have KV, and says so of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

# Read, in vLLM 0.32: their schedulers' side takes up a request that they have not seen from its
# start. LMCache's does not, and stops the engine.
MOVABLE = frozenset(
    {"ExampleConnector", "OffloadingConnector", "NixlConnector", "NixlPullConnector"}
)


def why_connector_keeps(scheduler: Scheduler, request: Request) -> str | None:
    """The reason why a request cannot leave its connectors, or ``None``."""
    if request.ec_transfer_params is not None or (
        scheduler.ec_connector is not None and request.mm_features
    ):
        return "the outputs of its encoder are in a connector"
    params = request.kv_transfer_params or {}
    if params.get("do_remote_decode"):
        return "another engine fetches its KV from here when it is computed"
    if params.get("do_remote_prefill"):
        return "its KV has not been fetched from the engine that computed it"
    return None


def why_no_kv(scheduler: Scheduler) -> str | None:
    """The reason why no request with KV can leave or reach these connectors, or ``None``."""
    unknown = sorted(
        {type(connector).__name__ for connector in _connectors_of(scheduler)} - MOVABLE
    )
    if not unknown:
        return None
    return f"the KV connector cannot take up a request that it did not see begin ({unknown[0]})"


def look_up(scheduler: Scheduler, request: Request) -> None:
    """Have the connector begin with a request of this scheduler whose KV is all here."""
    if scheduler.connector is not None:
        num_blocks = request.num_computed_tokens // scheduler.block_size
        scheduler.connector.get_num_new_matched_tokens(request, num_blocks * scheduler.block_size)


def blocks_being_read(scheduler: Scheduler) -> set[int]:
    """Blocks, free though they may be, that a connector still copies or is about to.

    vLLM waits for these copies in the step that writes the blocks again; what arrives by a
    migration is written between steps.
    """
    found: set[int] = set()
    for connector in _connectors_of(scheduler):
        side = getattr(connector, "connector_scheduler", None)
        found.update(getattr(side, "_block_id_to_pending_jobs", ()))
        states = getattr(side, "_req_status", {})
        for request_id, state in states.items() if isinstance(states, dict) else ():
            # The last blocks of what has finished are stored at the next step.
            if request_id in scheduler.finished_req_ids or state.req.is_finished():
                for group in state.group_states:
                    found.update(group.block_ids)
    return found


def _connectors_of(scheduler: Scheduler) -> Iterator[Any]:
    waiting: list[Any] = [scheduler.connector] if scheduler.connector is not None else []
    while waiting:
        connector = waiting.pop()
        if type(connector).__name__ == "MultiConnector":
            waiting.extend(connector._connectors)
        else:
            yield connector
