"""The life of a request in the scheduler: arrive, be placed or held, end.

Invariants: every request that arrives is dispatched, held, or rejected, and only one of these at a
time; nothing is dispatched to an instance that is not serving; a policy that raises or answers
nonsense is replaced by the built-in least-loaded choice for that decision.
This module does not know instances joining or leaving (`scheduler`) or migration (`rebalancing`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llumsched.core.actions import Action, DispatchRequest, Rejection, RejectRequest
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import (
    ADMIT,
    AdmissionPolicy,
    Admit,
    Hold,
    Placement,
    PolicyBundle,
    Reject,
    Verdict,
)
from llumsched.core.scheduling.answer_checks import malformed, policy_failed
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.scheduling.dispatch_queue import DispatchQueue
from llumsched.core.scheduling.fairness import FairTurns
from llumsched.core.scheduling.request_ledger import Ledger, RequestRecord
from llumsched.core.scheduling.session_moves import SessionMoves
from llumsched.core.scheduling.sessions import Sessions
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import Allowance, InstanceState, SchedulingRequest, Scores

OVERLOAD_RETRY_S = 1.0
LOST = "its instance was lost; "
FEW_HELD = 8
PASS_INTERVAL_S = 0.02


class Dispatcher:
    """Places requests with the bundle's policies."""

    def __init__(
        self,
        *,
        bundle: PolicyBundle,
        options: SchedulerOptions,
        cluster: Cluster,
        ledger: Ledger,
        queue: DispatchQueue,
        sessions: Sessions,
        session_moves: SessionMoves,
    ) -> None:
        self._bundle = bundle
        self._options = options
        self._cluster = cluster
        self._ledger = ledger
        self._queue = queue
        self._sessions = sessions
        self._session_moves = session_moves
        self._turns = FairTurns() if options.fair_clients else None
        # Held requests are not tried again before this ...
        self._next_pass_s = 0.0
        # ... and all of them let a new one pass them.
        self._all_let_pass = False
        # By what instances were compared, of what was dispatched since somebody emptied this.
        self.scores: dict[str, Scores] = {}
        # The instance chosen last while none reported.
        self._last_blind_id = ""

    def arrive(
        self, request: SchedulingRequest, now: float, out: list[Action], *, has_begun: bool = False
    ) -> None:
        """Place a new request, or hold or reject it; one that has begun is not rejected."""
        if request.request_id in self._ledger.requests:
            return
        if self._bundle.predictor is not None and request.predicted_output_tokens is None:
            request = self._predicted(request, out)
        record = self._ledger.open(request, now)
        if self._turns is not None:
            record.fair_tag = self._turns.tag(request.client_id, request.num_prompt_tokens)
        if has_begun:
            record.redispatch_reason = LOST
        if not self._queue.order or (self._all_let_pass and now < self._next_pass_s):
            if self._try(record, now, record.redispatch_reason, out) is not None:
                self._hold(record, now, out)
        else:
            self._hold(record, now, out)
            self.dispatch_held(now, out)

    def end(self, record: RequestRecord, num_output_tokens: int | None, out: list[Action]) -> None:
        """Forget a request that finished or was aborted."""
        if record.is_held:
            self._queue.remove(record)
        self._ledger.close(record)
        self._cluster.request_ended()
        if self._turns is not None and num_output_tokens is not None:
            self._turns.ended(record.request.client_id, num_output_tokens)
        predictor = self._bundle.predictor
        if predictor is not None and num_output_tokens is not None:
            try:
                predictor.observe(record.request, num_output_tokens)
            except Exception as error:
                out.append(policy_failed(predictor, error))

    def adopt(self, request_id: str, instance: InstanceRecord, now: float) -> None:
        """An instance that joins holds this request already: learn it, or stop looking for a place.

        One that was dispatched elsewhere meanwhile stays there.
        """
        record = self._ledger.requests.get(request_id)
        if record is None:
            request = SchedulingRequest(request_id=request_id, num_prompt_tokens=0)
            record = self._ledger.open(request, now)
        elif not record.is_held:
            return
        else:
            self._queue.remove(record)
        self._ledger.place(record, instance, now, overlay=False)

    def sent_elsewhere(
        self, request: SchedulingRequest, instance: InstanceRecord, now: float
    ) -> None:
        """A frontend has sent a request to an instance that nobody here chose for it."""
        record = self._ledger.requests.get(request.request_id)
        if record is None:
            record = self._ledger.open(request, now)
        elif record.is_held:
            self._queue.remove(record)
        else:
            self._ledger.unplace(record)
        overlay = record.named_by != instance.spec.instance_id
        self._ledger.place(record, instance, now, overlay=overlay)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, besides the queue."""
        return {
            "next_pass_s": self._next_pass_s,
            "all_let_pass": self._all_let_pass,
            "last_blind_id": self._last_blind_id,
            "turns": None if self._turns is None else self._turns.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._next_pass_s = state["next_pass_s"]
        self._all_let_pass = state["all_let_pass"]
        self._last_blind_id = state["last_blind_id"]
        if self._turns is not None and state["turns"] is not None:
            self._turns.restore(state["turns"])

    def hold_again(self, record: RequestRecord, now: float) -> None:
        """Hold a request whose instance is gone; it goes before those that arrived later."""
        self._ledger.unplace(record)
        record.redispatch_reason = LOST
        self._queue.push(record, now + self._options.queue_timeout_s)

    def dispatch_held(self, now: float, out: list[Action]) -> None:
        """Try held requests again, in order, until one must wait and no other may pass it."""
        if not self._queue.order or now < self._next_pass_s:
            return
        limit = self._options.max_queue_attempts
        num_held = len(self._queue)
        num_tried = 0
        for record in list(self._queue.in_order(limit)):
            held = self._try(record, now, record.redispatch_reason, out)
            num_tried += 1
            if held is not None and not held.others_may_pass:
                return
        if num_tried > FEW_HELD and len(self._queue) == num_held:
            # Many were tried in vain. Reports come all the time; do not try all at each of them.
            self._next_pass_s = now + PASS_INTERVAL_S
            self._all_let_pass = num_held <= limit

    def next_deadline(self) -> float | None:
        """When held requests expire, or should be tried again."""
        expires = None if self._awaits_a_boot() else self._queue.next_deadline()
        if not self._queue.order or self._next_pass_s <= self._cluster.snapshot.now:
            return expires
        return self._next_pass_s if expires is None else min(expires, self._next_pass_s)

    def instance_joins(self, now: float) -> None:
        """One is about to serve: what was held for it has been waiting for nothing else."""
        if self._awaits_a_boot():
            self._queue.postpone(now + self._options.queue_timeout_s)

    def expire(
        self, now: float, launch_failure: str, out: list[Action], *, has_failed: bool = False
    ) -> None:
        """Reject what was held for too long; `launch_failure` says why none came, if one failed.

        One that fails right now (`has_failed`) ends the wait for those that still boot as well:
        where each launch fails, and another takes its place, something boots for ever.
        """
        if self._awaits_a_boot() and not has_failed:
            return
        reason = ""
        for record in self._queue.expired(now):
            reason = reason or self._why_expired(launch_failure)
            self._reject(record, reason, OVERLOAD_RETRY_S, out)

    def _awaits_a_boot(self) -> bool:
        """True if nothing serves, and something boots; how long that may take is its own limit."""
        boots = self._cluster.num_booting or self._cluster.num_replacing
        return bool(boots) and not self._any_serves()

    def _any_serves(self) -> bool:
        records = self._cluster.records.values()
        return any(record.state is InstanceState.SERVING for record in records)

    def _why_expired(self, launch_failure: str) -> str:
        options = self._options
        reason = f"none took it within queue_timeout_s={options.queue_timeout_s:g} s"
        if self._any_serves():
            return reason
        if launch_failure:
            return f"{reason}; none serves, and the last launch failed: {launch_failure}"
        if not options.max_instances:
            return f"{reason}; none serves, and with max_instances=0 none is launched for it"
        return f"{reason}; none serves"

    def _hold(self, record: RequestRecord, now: float, out: list[Action]) -> None:
        limit = self._options.max_queued_requests
        client_limit = self._options.max_queued_per_client
        self._queue.push(record, now + self._options.queue_timeout_s)
        if record.redispatch_reason:
            return
        if client_limit and self._queue.num_of_client(record.request.client_id) > client_limit:
            reason = f"its client has {client_limit} requests in the dispatch queue, as many as may"
            self._reject(record, reason, OVERLOAD_RETRY_S, out, Rejection.CLIENT_LIMIT)
        elif len(self._queue) > limit:
            # The last in dispatch order: the lowest class is shed first, the newest of it. Not one
            # that came back, since its client has been promised the rest.
            last = next(r for r in self._queue.backwards() if not r.redispatch_reason)
            self._reject(
                last,
                f"the dispatch queue is full ({limit} requests)",
                OVERLOAD_RETRY_S,
                out,
            )

    def _reject(
        self,
        record: RequestRecord,
        reason: str,
        retry_after_s: float | None,
        out: list[Action],
        rejection: Rejection = Rejection.OVERLOADED,
        allowance: Allowance | None = None,
    ) -> None:
        if record.is_held:
            self._queue.remove(record)
        self._ledger.close(record)
        out.append(
            RejectRequest(
                request_id=record.request.request_id,
                reason=reason,
                retry_after_s=retry_after_s,
                rejection=rejection,
                allowance=allowance,
            )
        )

    def _try(
        self, record: RequestRecord, now: float, prefix: str, out: list[Action]
    ) -> Hold | None:
        """Dispatch or reject the request, or say why it is held."""
        if self._session_moves.waits(record, now):
            return Hold(reason="the KV of its session is on its way", others_may_pass=True)
        cluster = self._cluster.at(now)
        request = record.request
        candidates = cluster.candidates(request)
        placement: Placement | None
        allowance: Allowance | None = None
        if candidates is not None and not np.count_nonzero(candidates):
            if cluster.instance_ids and cluster.cannot_ever_hold(request):
                too_long = (
                    f"the prompt of {request.num_prompt_tokens} tokens exceeds the KV cache of "
                    f"every instance (the largest has {cluster.max_total_blocks} blocks)"
                )
                if record.redispatch_reason:
                    # It was running: the instance that could hold it may come back.
                    return Hold(reason=too_long, others_may_pass=True)
                self._reject(record, too_long, None, out, Rejection.TOO_LONG)
                return None
            if cluster.num_accepting:
                return Hold(reason="no accepting instance can hold it", others_may_pass=True)
            placement = self._blind(record)
            if placement is None:
                return Hold(reason="no instance accepts work")
        else:
            # One whose stream has begun was admitted once, and is finished.
            if self._bundle.admission is not None and not record.redispatch_reason:
                verdict = self._judge(self._bundle.admission, request, cluster, out)
                if isinstance(verdict, Reject):
                    kind = (
                        Rejection.CLIENT_LIMIT if verdict.is_client_limit else Rejection.OVERLOADED
                    )
                    self._reject(
                        record,
                        verdict.reason,
                        verdict.retry_after_s,
                        out,
                        kind,
                        verdict.allowance,
                    )
                    return None
                if isinstance(verdict, Hold):
                    return verdict
                allowance = verdict.allowance
            chosen = self._choose(request, cluster, candidates, out)
            if chosen is None:
                return Hold(reason="the dispatch policy holds it")
            if isinstance(chosen, Hold):
                return chosen
            placement = self._sessions.at_home(request, cluster, candidates, chosen)
            limit = self._options.max_waiting_per_instance if not record.redispatch_reason else 0
            if limit and self._num_waiting(placement.instance_id) >= limit:
                able = _able_to_take(request, cluster, candidates, limit)
                if not able[cluster.rows[placement.instance_id]]:
                    placement = _least_loaded(cluster, able)
                if placement is None:
                    return Hold(reason=f"{limit} requests wait at every instance")
            placed = self._session_moves.place(record, placement, now, out)
            if isinstance(placed, Hold):
                return placed
            placement = placed
        if record.is_held:
            self._queue.remove(record)
        if self._turns is not None:
            self._turns.began(record.fair_tag)
        instance = self._cluster.records[placement.instance_id]
        self._ledger.place(record, instance, now, overlay=True)
        if placement.hand_over_to is not record.hand_over_to:
            # Placed again after a loss, it has the plan of its new placement, or none.
            self._ledger.plan(record, placement.hand_over_to, placement.after_output_tokens)
        if placement.scores is not None:
            self.scores[request.request_id] = placement.scores
        out.append(
            DispatchRequest(
                request_id=request.request_id,
                instance_id=placement.instance_id,
                reason=prefix + placement.reason,
                predicted_output_tokens=request.predicted_output_tokens,
                allowance=allowance,
            )
        )
        return None

    def _judge(
        self,
        admission: AdmissionPolicy,
        request: SchedulingRequest,
        cluster: ClusterSnapshot,
        out: list[Action],
    ) -> Verdict:
        try:
            verdict = admission.admit(request, cluster)
        except Exception as error:
            out.append(policy_failed(admission, error))
            return ADMIT
        problem = malformed(verdict, Admit, Hold, Reject)
        if problem is not None:
            out.append(policy_failed(admission, problem))
            return ADMIT
        return verdict

    def _choose(
        self,
        request: SchedulingRequest,
        cluster: ClusterSnapshot,
        candidates: BoolColumn | None,
        out: list[Action],
    ) -> Placement | Hold | None:
        policy = self._bundle.dispatch
        try:
            placement = policy.dispatch(request, cluster)
        except Exception as error:
            out.append(policy_failed(policy, error))
            return _least_loaded(cluster, candidates)
        if placement is None:
            return None
        problem = _problem(placement, cluster, candidates)
        if problem is None:
            return placement
        out.append(policy_failed(policy, problem))
        return _least_loaded(cluster, candidates)

    def _num_waiting(self, instance_id: str) -> int:
        """Requests that wait there, if all does that was sent since the report."""
        instance = self._cluster.records[instance_id]
        return instance.load.num_waiting + instance.num_sent

    def _blind(self, record: RequestRecord) -> Placement | None:
        """With no instance reporting there is nothing to compare: take turns."""
        request = record.request
        limit = self._options.max_waiting_per_instance if not record.redispatch_reason else 0
        able = sorted(
            instance_id
            for instance_id, instance in self._cluster.records.items()
            if instance.state is InstanceState.SERVING
            and request.num_prompt_blocks(instance.spec.block_size)
            <= instance.load.num_total_blocks
            and (not limit or self._num_waiting(instance_id) < limit)
        )
        if not able:
            return None
        following = [i for i in able if i > self._last_blind_id]
        self._last_blind_id = (following or able)[0]
        return Placement(
            instance_id=self._last_blind_id, reason="no instance reports its load; round-robin"
        )

    def _predicted(self, request: SchedulingRequest, out: list[Action]) -> SchedulingRequest:
        predictor = self._bundle.predictor
        assert predictor is not None
        try:
            predicted = predictor.predict(request)
        except Exception as error:
            out.append(policy_failed(predictor, error))
            return request
        if type(predicted) is not int:
            if predicted is not None:
                out.append(policy_failed(predictor, f"predicted {predicted!r}, not an int or None"))
            return request
        if request.max_output_tokens is not None:
            predicted = min(predicted, request.max_output_tokens)
        return request.with_prediction(max(1, predicted))


def _problem(
    placement: Placement | Hold, cluster: ClusterSnapshot, candidates: BoolColumn | None
) -> str | None:
    wrong_shape = malformed(placement, Placement, Hold)
    if wrong_shape is not None or isinstance(placement, Hold):
        return wrong_shape
    row = cluster.rows.get(placement.instance_id)
    if row is None:
        return f"chose unknown instance {placement.instance_id!r}"
    if placement.hand_over_to is not None and placement.hand_over_to not in cluster.rows:
        return f"plans to hand over to unknown instance {placement.hand_over_to!r}"
    if candidates is None or candidates[row]:
        return None
    view = cluster[placement.instance_id]
    if view.is_accepting:
        why = "cannot hold the prompt"
    else:
        why = f"is {view.state.value if view.is_fresh else 'stale'}"
    return f"chose instance {placement.instance_id!r}, which {why}"


def _able_to_take(
    request: SchedulingRequest,
    cluster: ClusterSnapshot,
    candidates: BoolColumn | None,
    limit: int,
) -> BoolColumn:
    """Rows where the request may wait, or with all that was sent before it is in the next step."""
    c = cluster.columns
    num_step_tokens = c.num_prefill_tokens_pending + c.num_running + request.num_prompt_tokens
    starts = (
        (c.num_waiting == 0)
        & (c.num_requests < c.max_num_seqs)
        & (num_step_tokens <= c.max_num_batched_tokens)
        & (cluster.demand_blocks(request) <= c.num_free_blocks)
    )
    able: BoolColumn = starts | (c.num_waiting + c.num_unreported < limit)
    if candidates is not None:
        able = able & candidates
    return able


def _least_loaded(cluster: ClusterSnapshot, candidates: BoolColumn | None) -> Placement | None:
    row = cluster.argmax(cluster.columns.freeness, candidates)
    if row is None:
        return None
    return Placement(instance_id=cluster.instance_ids[row], reason="built-in least-loaded choice")
