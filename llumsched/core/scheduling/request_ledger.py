"""Which request is where: the scheduler's own record of what it decided.

Invariants: a request is held, or on exactly one instance; the overlay of an instance in `Cluster`
is the sum over its requests that no report has named yet; when a request ends nothing of it stays.
This module does not choose instances (`scheduler`), nor order held requests (`dispatch_queue`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from llumsched.core.codec import from_plain, to_plain
from llumsched.core.load import InstanceLoad
from llumsched.core.request_columns import RequestColumns, RequestProgress
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.scheduling.sessions import Sessions
from llumsched.core.types import SchedulingRequest


class RequestRecord(msgspec.Struct, kw_only=True, eq=False):
    """One live request. `instance_id` is None while it is held."""

    request: SchedulingRequest
    sequence: int
    queued_s: float
    instance_id: str | None = None
    is_held: bool = False
    """True in the dispatch queue, which keeps this flag."""
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
    came_s: float = 0.0
    """When it was placed on its present instance."""
    num_migrations: int = 0
    num_computed: int = 0
    num_outputs: int = 0
    """Both as of `told_at_step`, or as of its last instance."""
    told_at_step: int | None = None
    """Decode steps of its present instance when a report told of its progress; None: none has."""
    hand_over_to: str | None = None
    """Planned destination, once it has produced `hand_over_after` tokens."""
    hand_over_after: int = 0
    rests_until_s: float = 0.0
    """A policy that names it to be moved before is not followed."""
    awaited_move: tuple[str, str] | None = None
    """The migration of its session's KV that it is, or was, held for, and where to."""

    def progress_at(self, num_decode_steps: int) -> tuple[int, int]:
        """Tokens computed and produced, once the instance has made so many decode steps."""
        computed, outputs = self.num_computed, self.num_outputs
        if self.told_at_step is not None and self._decodes:
            steps = max(0, num_decode_steps - self.told_at_step)
            return computed + steps, outputs + steps
        return computed, outputs

    @property
    def _decodes(self) -> bool:
        whole = self.request.num_prompt_tokens + self.num_outputs - 1
        return self.num_outputs > 0 and self.num_computed >= whole


class Ledger:
    """Live requests by id and by instance."""

    def __init__(self, cluster: Cluster, sessions: Sessions) -> None:
        self._cluster = cluster
        self._sessions = sessions
        self.next_sequence = 0
        self.requests: dict[str, RequestRecord] = {}
        self._by_instance: dict[str, dict[str, RequestRecord]] = {}
        self.planned: dict[str, RequestRecord] = {}
        """Requests with a planned hand-over that has not begun."""

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

    def columns(
        self,
        instance: InstanceRecord,
        now: float,
        remaining: Callable[[SchedulingRequest, int], float | None] | None,
    ) -> RequestColumns:
        """The requests on an instance, as policies see them; `remaining` predicts."""
        steps = instance.load.num_decode_steps
        progress = []
        for record in self._by_instance.get(instance.spec.instance_id, {}).values():
            computed, outputs = record.progress_at(steps)
            progress.append(
                RequestProgress(
                    request=record.request,
                    num_computed_tokens=computed,
                    num_output_tokens=outputs,
                    is_told=record.told_at_step is not None,
                    came_s=record.came_s,
                    num_migrations=record.num_migrations,
                    num_remaining_tokens=(
                        None if remaining is None else remaining(record.request, outputs)
                    ),
                )
            )
        return RequestColumns.of(progress, now)

    def plan(self, record: RequestRecord, hand_over_to: str | None, after: int) -> None:
        """Plan a hand-over after so many output tokens, or none."""
        record.hand_over_to = hand_over_to
        record.hand_over_after = after
        if hand_over_to is None:
            self.planned.pop(record.request.request_id, None)
        else:
            self.planned[record.request.request_id] = record

    def progressed(self, load: InstanceLoad) -> None:
        """Take in what a report tells of the progress of requests."""
        for request_id, num_computed, num_outputs in load.progress:
            record = self.requests.get(request_id)
            if record is not None and record.instance_id == load.instance_id:
                record.num_computed, record.num_outputs = num_computed, num_outputs
                record.told_at_step = load.num_decode_steps

    def place(
        self, record: RequestRecord, instance: InstanceRecord, now: float, *, overlay: bool
    ) -> None:
        """Put a held request on an instance; overlaid until a report names it."""
        request = record.request
        record.came_s = now
        instance_id = instance.spec.instance_id
        record.instance_id = instance_id
        record.named_s = None
        self._sessions.ran(request, instance_id, now)
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
        if record.told_at_step is not None:
            instance = self._cluster.records[record.instance_id]
            progress = record.progress_at(instance.load.num_decode_steps)
            record.num_computed, record.num_outputs = progress
            record.told_at_step = None
        on_instance = self._by_instance[record.instance_id]
        del on_instance[record.request.request_id]
        if not on_instance:
            del self._by_instance[record.instance_id]
        record.instance_id = None

    def close(self, record: RequestRecord) -> None:
        """Forget a request that ended."""
        self.unplace(record)
        del self.requests[record.request.request_id]
        if record.hand_over_to is not None:
            self.planned.pop(record.request.request_id, None)

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
                "came_s": record.came_s,
                "num_migrations": record.num_migrations,
                "progress": [record.num_computed, record.num_outputs, record.told_at_step],
                "hand_over": [record.hand_over_to, record.hand_over_after],
                "rests_until_s": record.rests_until_s,
                "awaited_move": record.awaited_move,
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
                num_migrations=entry["num_migrations"],
                hand_over_to=entry["hand_over"][0],
                hand_over_after=entry["hand_over"][1],
                rests_until_s=entry["rests_until_s"],
                awaited_move=tuple(entry["awaited_move"]) if entry.get("awaited_move") else None,
            )
            self.requests[record.request.request_id] = record
            if record.hand_over_to is not None:
                self.planned[record.request.request_id] = record
            if entry["instance_id"] is not None:
                instance = self._cluster.records[entry["instance_id"]]
                self.place(record, instance, entry["came_s"], overlay=entry["is_unreported"])
                record.named_s = entry["named_s"]
            record.num_computed, record.num_outputs, record.told_at_step = entry["progress"]
        self.next_sequence = next_sequence
