"""Which request is where: the scheduler's own record of what it decided.

Invariants: a request is held, or on exactly one instance; the overlay of an instance in `Cluster`
is the sum over its requests that no report has named yet; when a request ends nothing of it stays.
This module does not choose instances (`scheduler`), nor order held requests (`dispatch_queue`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llumsched.core.codec import from_plain, to_plain
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.types import SchedulingRequest


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """One live request. `instance_id` is None while it is held."""

    request: SchedulingRequest
    sequence: int
    queued_s: float
    instance_id: str | None = None
    is_held: bool = False
    """It is in the dispatch queue, which keeps this flag."""
    is_unreported: bool = False
    named_s: float | None = None
    """When a report of its present instance named it; None: none has."""
    num_sent_blocks: int = 0
    num_predicted_blocks: int = 0
    named_by: str | None = None
    """The last instance whose report named it; a commit may be known later than that."""
    redispatch_reason: str = ""
    fair_tag: float = 0.0
    """Turn of the request among those of its class, if clients take turns."""


class Ledger:
    """Live requests by id and by instance."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.next_sequence = 0
        self.requests: dict[str, RequestRecord] = {}
        self._by_instance: dict[str, dict[str, RequestRecord]] = {}

    def open(self, request: SchedulingRequest, now: float) -> RequestRecord:
        """Start to keep a request."""
        record = RequestRecord(request=request, sequence=self.next_sequence, queued_s=now)
        self.next_sequence += 1
        self.requests[request.request_id] = record
        return record

    def on(self, instance_id: str) -> list[RequestRecord]:
        """Requests on an instance, in the order they came to it."""
        return list(self._by_instance.get(instance_id, {}).values())

    def num_on(self, instance_id: str) -> int:
        """How many requests are on an instance."""
        return len(self._by_instance.get(instance_id, ()))

    def place(self, record: RequestRecord, instance: InstanceRecord, *, overlay: bool) -> None:
        """Put a held request on an instance; overlaid until a report names it."""
        request = record.request
        instance_id = instance.spec.instance_id
        record.instance_id = instance_id
        record.named_s = None
        on_instance = self._by_instance.get(instance_id)
        if on_instance is None:
            on_instance = self._by_instance[instance_id] = {}
        on_instance[request.request_id] = record
        block_size = instance.spec.block_size
        if overlay:
            record.is_unreported = True
            record.num_sent_blocks = -(-request.num_prompt_tokens // block_size)
            self._cluster.add_sent(
                instance,
                num_blocks=record.num_sent_blocks,
                num_tokens=request.num_prompt_tokens,
                priority=request.execution_priority,
            )
        if request.predicted_output_tokens is not None:
            num_tokens = request.num_prompt_tokens + request.predicted_output_tokens
            record.num_predicted_blocks = -(-num_tokens // block_size)
            self._cluster.add_predicted(instance, record.num_predicted_blocks)

    def reported(self, record: RequestRecord, instance: InstanceRecord, now: float) -> None:
        """A report of its instance names the request, so its numbers count it: the overlay goes.

        Whoever takes in the report publishes the instance's row afterwards.
        """
        record.named_s = now
        record.named_by = record.instance_id
        if record.is_unreported:
            record.is_unreported = False
            request = record.request
            instance.discount_sent(
                record.num_sent_blocks, request.num_prompt_tokens, request.execution_priority
            )

    def _drop_overlay(self, record: RequestRecord) -> None:
        if record.is_unreported and record.instance_id is not None:
            record.is_unreported = False
            self._cluster.remove_sent(
                self._cluster.records[record.instance_id],
                num_blocks=record.num_sent_blocks,
                num_tokens=record.request.num_prompt_tokens,
                priority=record.request.execution_priority,
            )

    def unplace(self, record: RequestRecord) -> None:
        """Take a request off its instance (it ended, moved, or the instance is about to go)."""
        if record.instance_id is None:
            return
        self._drop_overlay(record)
        if record.num_predicted_blocks:
            instance = self._cluster.records[record.instance_id]
            self._cluster.add_predicted(instance, -record.num_predicted_blocks)
            record.num_predicted_blocks = 0
        on_instance = self._by_instance[record.instance_id]
        del on_instance[record.request.request_id]
        if not on_instance:
            del self._by_instance[record.instance_id]
        record.instance_id = None

    def close(self, record: RequestRecord) -> None:
        """Forget a request that ended."""
        self.unplace(record)
        del self.requests[record.request.request_id]

    def state(self) -> list[dict[str, Any]]:
        """Every live request, for a checkpoint."""
        return [
            {
                "request": to_plain(record.request),
                "sequence": record.sequence,
                "queued_s": record.queued_s,
                "instance_id": record.instance_id,
                "is_unreported": record.is_unreported,
                "named_s": record.named_s,
                "named_by": record.named_by,
                "redispatch_reason": record.redispatch_reason,
                "fair_tag": record.fair_tag,
            }
            for record in self.requests.values()
        ]

    def restore(self, state: Iterable[dict[str, Any]], next_sequence: int) -> None:
        """Go on from a checkpoint; the instances are there already."""
        for entry in state:
            record = RequestRecord(
                request=from_plain(SchedulingRequest, entry["request"]),
                sequence=entry["sequence"],
                queued_s=entry["queued_s"],
                named_by=entry["named_by"],
                redispatch_reason=entry["redispatch_reason"],
                fair_tag=entry["fair_tag"],
            )
            self.requests[record.request.request_id] = record
            if entry["instance_id"] is not None:
                instance = self._cluster.records[entry["instance_id"]]
                self.place(record, instance, overlay=entry["is_unreported"])
                record.named_s = entry["named_s"]
        self.next_sequence = next_sequence
