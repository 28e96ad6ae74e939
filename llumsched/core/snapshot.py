"""The cluster as a policy sees it: one numpy column per quantity, one row per instance.

Counts are float64 like the rest: they are exact far beyond any cluster, and arithmetic between
columns then never converts, which at small sizes is most of its cost.

Every number is already overlaid with what the scheduler has sent and the instances have not
reported yet, so a burst sees the load it creates itself.

Invariants: rows are sorted by instance id, so the first maximum is the tie-break by id; columns
are read-only. A snapshot is a view of the present: its owner (`scheduling.cluster_state`) writes
it, a policy only reads. It is valid during the call it is handed to, and `detached` makes a copy to
keep. It does not know how it is kept up to date.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from llumsched.core.request_columns import RequestColumns
from llumsched.core.step_time import DEFAULT_STEP_TIME, StepTimeModel
from llumsched.core.types import InstanceRole, InstanceState, SchedulingRequest

T = TypeVar("T")

FloatColumn = npt.NDArray[np.float64]
FloatMatrix = npt.NDArray[np.float64]
IntColumn = npt.NDArray[np.int64]
AnyColumn = npt.NDArray[np.floating[Any]] | IntColumn
BoolColumn = npt.NDArray[np.bool_]
Rows = BoolColumn | IntColumn
"""Some of the rows: a mask, or their numbers in ascending order."""

MAX_RISK_EXPONENT = 2.0
"""Where a cost that rises as room runs out stops to rise: nothing is worse than full."""
STATES = (
    InstanceState.BOOTING,
    InstanceState.SERVING,
    InstanceState.DRAINING,
    InstanceState.GONE,
)
ROLES = (InstanceRole.MIXED, InstanceRole.PREFILL, InstanceRole.DECODE)


COSTS = (
    "decode_step_s",
    "prefill_token_s",
    "block_turnover_s",
    "prefill_ends_s",
    "block_price_s",
    "num_spare_blocks",
)
"""Columns that are derived when a policy reads one of them: most policies read none."""
TERMS = ("decode_step_s", "prefill_token_s", "block_price_s", "batch_size", "num_high_running")
"""Columns that `Columns.weighted` adds up, in the order of its weights."""


@dataclass(slots=True, kw_only=True, eq=False)
class Columns:
    """The arrays; their owner writes them, a snapshot holds read-only views."""

    freeness: FloatColumn
    virtual_usage: FloatColumn
    step_time_s: FloatColumn
    decode_step_s: FloatColumn
    prefill_token_s: FloatColumn
    block_turnover_s: FloatColumn
    prefill_ends_s: FloatColumn
    block_price_s: FloatColumn
    num_spare_blocks: FloatColumn
    last_report_s: FloatColumn
    num_total_blocks: FloatColumn
    num_free_blocks: FloatColumn
    num_used_blocks: FloatColumn
    num_room_blocks: FloatColumn
    num_running: FloatColumn
    num_waiting: FloatColumn
    num_unreported: FloatColumn
    batch_size: FloatColumn
    num_requests: FloatColumn
    head_of_line_blocks: FloatColumn
    num_waiting_blocks: FloatColumn
    num_prefill_tokens_pending: FloatColumn
    num_high_running: FloatColumn
    victim_blocks: FloatColumn
    predicted_final_blocks: FloatColumn
    num_migrations_in: FloatColumn
    num_migrations_out: FloatColumn
    block_size: FloatColumn
    max_num_seqs: FloatColumn
    max_num_batched_tokens: FloatColumn
    state: IntColumn
    role: IntColumn
    is_accepting: BoolColumn
    is_draining: BoolColumn
    is_fresh: BoolColumn
    terms: FloatMatrix
    """The columns of `TERMS` as rows of one array, which has room for more instances."""

    @classmethod
    def empty(cls, num_rows: int) -> Columns:
        """Zeroed columns for `num_rows` instances."""
        kinds = {"FloatColumn": np.float64, "IntColumn": np.int64, "BoolColumn": np.bool_}
        # A multiple of what a processor adds up at once: equal instances then get equal sums.
        terms = np.zeros((len(TERMS), -(-num_rows // 16) * 16))
        arrays: dict[str, Any] = dict(zip(TERMS, terms[:, :num_rows], strict=True))
        for name, spec in cls.__dataclass_fields__.items():
            if name not in arrays and name != "terms":
                arrays[name] = np.zeros(num_rows, dtype=kinds[str(spec.type)])
        return cls(**arrays, terms=terms)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Every column."""
        return [getattr(self, name) for name in _NAMES]

    def weighted(self, weights: Sequence[float], rows: IntColumn | None = None) -> FloatColumn:
        """The columns of `TERMS`, each times its weight, summed: a new column, of all rows or some.

        A cost that is a sum of these takes one operation so, whose time hardly depends on how
        many terms there are.
        """
        _ = self.decode_step_s  # It is derived now, with the others, if it was not.
        terms = self.terms if rows is None else self.terms.take(rows, axis=1)
        total: FloatColumn = np.array(weights).dot(terms)
        return total[: len(self.batch_size)] if rows is None else total

    def padded(self, num_rows: int) -> Columns:
        """Longer columns that begin like these."""
        longer = Columns.empty(num_rows)
        for column, old in zip(longer.arrays(), self.arrays(), strict=True):
            column[: len(old)] = old
        return longer

    def cells(self) -> Columns:
        """The columns as memory views: writing one number takes half as long as through numpy."""
        views = {name: memoryview(getattr(self, name)) for name in _NAMES}
        return Columns(**cast(Any, views), terms=self.terms)

    def read_only(self, num_rows: int) -> Columns:
        """The first rows, as views that cannot be written."""
        return Columns(**self._views(num_rows))

    def unread(self, num_rows: int, derive: Callable[[], None]) -> UnreadColumns:
        """The same, with `COSTS` absent until one is read: then `derive` writes them first."""
        return UnreadColumns(self._views(num_rows), derive)

    def _views(self, num_rows: int) -> dict[str, Any]:
        views: dict[str, Any] = {name: getattr(self, name)[:num_rows] for name in _NAMES}
        views["terms"] = self.terms[:]
        for view in views.values():
            view.flags.writeable = False
        return views

    def copy(self) -> Columns:
        """Read-only copies of the columns."""
        num_rows = len(self.state)
        return self.padded(num_rows).read_only(num_rows)


_NAMES = tuple(name for name in Columns.__dataclass_fields__ if name != "terms")


class UnreadColumns(Columns):
    """Views of which `COSTS` are derived when one is read, and then are there.

    From then on the owner keeps them up to date, and shows plain `Columns`.
    """

    __slots__ = ("_costs", "_derive")

    def __init__(self, views: dict[str, Any], derive: Callable[[], None]) -> None:
        super().__init__(**views)
        self._costs = {name: views[name] for name in COSTS}
        self._derive = derive
        for name in COSTS:
            delattr(self, name)

    if not TYPE_CHECKING:  # A misspelt column is still an error to the type checker.

        def __getattr__(self, name):
            if name not in COSTS:
                raise AttributeError(f"no column {name!r}")
            self._derive()
            for cost, column in self._costs.items():
                setattr(self, cost, column)
            return self._costs[name]


class PrefixHolders(NamedTuple):
    """The instances whose caches hold equally many leading blocks of a prompt."""

    num_blocks: int
    rows: IntColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClusterSnapshot:
    """View of the cluster that a policy decides from. See the module docstring for its lifetime.

    Columns whose name does not say it all: `num_free_blocks` may be negative (more has been sent
    than fits); `num_room_blocks` is what the queue leaves of it; `batch_size` is running +
    unreported and `num_requests` that + waiting; `decode_step_s` is the measured step, or the
    modelled one, with the unreported requests in it; `prefill_token_s` is what a prompt token takes
    in such steps; `block_turnover_s` how long it takes, per token of output, until one block comes
    free; `prefill_ends_s` is when the prompts that are there will be computed; `block_price_s` is
    the expected cost of one more block in use, in seconds that requests wait after an eviction: it
    rises as the room of the running requests to grow within `reaction_s` runs out;
    `num_spare_blocks` is what a new prompt may take of the room if all that is there is to grow for
    `reaction_s`, infinite where nothing is; `predicted_final_blocks` is the sum of the predicted
    final sizes of all requests, 0 without a length predictor.
    """

    now: float
    instance_ids: tuple[str, ...]
    columns: Columns
    rng: random.Random
    """The one source of randomness: seeded, so a replay draws the same numbers."""
    step_time: StepTimeModel = DEFAULT_STEP_TIME
    """As configured, or as learned of the kind of instance that reported last."""
    mean_output_tokens: float = 256.0
    """Tokens that a running request is expected to produce yet; learned where step times are."""
    reaction_s: float = 1.0
    """Within this time a migration that is decided takes effect."""
    num_booting: int = 0
    block_size: int | None = None
    """Block size of all instances; None if they differ."""
    num_accepting: int = 0
    max_total_blocks: int = 0
    min_total_blocks: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    held: Callable[[], Sequence[SchedulingRequest]] = tuple
    """Requests waiting for a place, in dispatch order (a bounded number of them)."""
    queued_s: Callable[[str], float | None] = lambda request_id: None
    """When a live request was first queued, on the clock of `now`."""
    match_prefix: Callable[[SchedulingRequest], Sequence[PrefixHolders]] = lambda request: ()
    """Holders of a start of the prompt, longest first; none, if no prefix index is kept."""

    requests_on: Callable[[str], RequestColumns] = lambda instance_id: RequestColumns.of((), 0.0)
    """The requests of an instance, made when asked for: ask for those of the instances that matter.
    Their progress is known with `SchedulerOptions.follow_requests`."""

    stable_values: dict[Hashable, Any] = field(default_factory=dict)
    fresh_values: dict[Hashable, Any] = field(default_factory=dict)

    def stable(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, kept until an instance joins, leaves, or starts or stops to accept work.

        For what follows from the specs and states alone: pools, limits.
        """
        value = self.stable_values.get(key)
        if value is None:
            value = self.stable_values[key] = compute()
        return cast(T, value)

    def fresh(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, kept for this decision: for what admission and dispatch both derive."""
        value = self.fresh_values.get(key)
        if value is None:
            value = self.fresh_values[key] = compute()
        return cast(T, value)

    def __len__(self) -> int:
        return len(self.instance_ids)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.rows

    def __getitem__(self, instance_id: str) -> InstanceView:
        return InstanceView(self, self.rows[instance_id])

    def __iter__(self) -> Iterator[InstanceView]:
        return (InstanceView(self, row) for row in range(len(self.instance_ids)))

    @property
    def accepting(self) -> list[InstanceView]:
        """Instances that may be given work: serving, and heard from lately."""
        return [InstanceView(self, int(row)) for row in np.flatnonzero(self.columns.is_accepting)]

    def demand_blocks(self, request: SchedulingRequest) -> FloatColumn | int:
        """Blocks of the prompt: one number, or one per row where block sizes differ."""
        if self.block_size is not None:
            return -(-request.num_prompt_tokens // self.block_size)
        return -(-request.num_prompt_tokens // self.columns.block_size)

    def cannot_ever_hold(self, request: SchedulingRequest) -> bool:
        """True if the prompt exceeds every known instance."""
        if self.block_size is not None:
            return request.num_prompt_tokens > self.max_total_blocks * self.block_size
        return not bool((self.demand_blocks(request) <= self.columns.num_total_blocks).any())

    def candidates(self, request: SchedulingRequest) -> BoolColumn | None:
        """Rows that accept work and could ever hold the request; None means every row."""
        block_size = self.block_size
        if (
            block_size is not None
            and request.num_prompt_tokens <= self.min_total_blocks * block_size
        ):
            all_accept = self.num_accepting == len(self.instance_ids)
            return None if all_accept else self.columns.is_accepting
        demand = self.demand_blocks(request)
        return self.columns.is_accepting & (self.columns.num_total_blocks >= demand)

    def argmax(self, score: AnyColumn, among: Rows | None = None) -> int | None:
        """Row of the highest score; ties go to the lowest instance id; None if `among` is empty."""
        if among is None:
            return int(score.argmax()) if self.instance_ids else None
        rows = among if among.dtype != np.bool_ else among.nonzero()[0]
        return int(rows[score[rows].argmax()]) if len(rows) else None

    def argmin(self, score: AnyColumn, among: Rows | None = None) -> int | None:
        """Row of the lowest score, with the rules of `argmax`."""
        if among is None:
            return int(score.argmin()) if self.instance_ids else None
        rows = among if among.dtype != np.bool_ else among.nonzero()[0]
        return int(rows[score[rows].argmin()]) if len(rows) else None

    def any(self, among: BoolColumn) -> bool:
        """True if one of these rows accepts work."""
        if self.num_accepting < len(self.instance_ids):
            among = among & self.columns.is_accepting
        return bool(np.count_nonzero(among))

    def random_row(self, among: BoolColumn | None = None) -> int | None:
        """A row drawn with equal chances; None if `among` is empty."""
        if among is None:
            return self.rng.randrange(len(self.instance_ids)) if self.instance_ids else None
        rows = np.flatnonzero(among)
        return int(rows[self.rng.randrange(len(rows))]) if len(rows) else None

    def next_row(self, after_id: str, among: BoolColumn | None = None) -> int | None:
        """The row after an id in the order of ids, going round; None if `among` is empty."""
        num_rows = len(self.instance_ids)
        start = bisect.bisect_right(self.instance_ids, after_id)
        if among is None:
            return start % num_rows if num_rows else None
        rows = np.flatnonzero(among)
        if not len(rows):
            return None
        return int(rows[np.searchsorted(rows, start) % len(rows)])

    def detached(self) -> ClusterSnapshot:
        """A copy that stays as it is when the cluster changes."""
        held = tuple(self.held())
        return ClusterSnapshot(
            now=self.now,
            instance_ids=self.instance_ids,
            columns=self.columns.copy(),
            rng=self.rng,
            step_time=self.step_time,
            mean_output_tokens=self.mean_output_tokens,
            reaction_s=self.reaction_s,
            queued_s=self.queued_s,
            num_booting=self.num_booting,
            block_size=self.block_size,
            num_accepting=self.num_accepting,
            max_total_blocks=self.max_total_blocks,
            min_total_blocks=self.min_total_blocks,
            rows=dict(self.rows),
            held=lambda: held,
            match_prefix=self.match_prefix,
            requests_on=self.requests_on,
        )


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One row of a snapshot under the names of its columns; for policies that prefer objects."""

    cluster: ClusterSnapshot
    row: int

    @property
    def instance_id(self) -> str:
        """Name of the instance; the row's place in `cluster.rows`."""
        return self.cluster.instance_ids[self.row]

    @property
    def state(self) -> InstanceState:
        """`BOOTING`, `SERVING`, `DRAINING` or `GONE`."""
        return STATES[int(self.cluster.columns.state[self.row])]

    @property
    def role(self) -> InstanceRole:
        """`MIXED`, `PREFILL` or `DECODE`, as its launch asked for."""
        return ROLES[int(self.cluster.columns.role[self.row])]

    @property
    def is_accepting(self) -> bool:
        """True if it may be given work: it serves, and was heard from lately."""
        return bool(self.cluster.columns.is_accepting[self.row])

    @property
    def is_fresh(self) -> bool:
        """True if its last load report is recent enough to be believed."""
        return bool(self.cluster.columns.is_fresh[self.row])

    @property
    def freeness(self) -> float:
        """Free blocks a request of the batch (Llumnix, OSDI '24, section 4.4); infinite if idle."""
        return float(self.cluster.columns.freeness[self.row])

    @property
    def step_time_s(self) -> float:
        """Seconds of its latest step that computed no prompt; 0 before the first."""
        return float(self.cluster.columns.step_time_s[self.row])

    @property
    def num_total_blocks(self) -> int:
        """KV blocks it has."""
        return int(self.cluster.columns.num_total_blocks[self.row])

    @property
    def num_free_blocks(self) -> int:
        """KV blocks free; below 0 where more was sent than fits."""
        return int(self.cluster.columns.num_free_blocks[self.row])

    @property
    def num_used_blocks(self) -> int:
        """KV blocks in use or reserved."""
        return self.num_total_blocks - self.num_free_blocks

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks in use, 0 to 1 (above 1: more was sent than fits)."""
        return self.num_used_blocks / max(1, self.num_total_blocks)

    @property
    def num_running(self) -> int:
        """Requests in its batch."""
        return int(self.cluster.columns.num_running[self.row])

    @property
    def num_waiting(self) -> int:
        """Requests in its queue, which hold no KV."""
        return int(self.cluster.columns.num_waiting[self.row])

    @property
    def num_requests(self) -> int:
        """Requests in its batch, in its queue, and sent to it but not reported yet."""
        return int(self.cluster.columns.num_requests[self.row])

    @property
    def num_prefill_tokens_pending(self) -> int:
        """Prompt tokens still to be computed, of its queue and of prompts under way."""
        return int(self.cluster.columns.num_prefill_tokens_pending[self.row])

    @property
    def num_migrations_in(self) -> int:
        """Migrations under way to it."""
        return int(self.cluster.columns.num_migrations_in[self.row])

    @property
    def num_migrations_out(self) -> int:
        """Migrations under way from it."""
        return int(self.cluster.columns.num_migrations_out[self.row])

    @property
    def max_num_seqs(self) -> int:
        """Most requests in a batch."""
        return int(self.cluster.columns.max_num_seqs[self.row])

    @property
    def max_num_batched_tokens(self) -> int:
        """Most tokens in a step."""
        return int(self.cluster.columns.max_num_batched_tokens[self.row])

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return int(self.cluster.columns.block_size[self.row])

    def fits(self, request: SchedulingRequest) -> bool:
        """True if the instance, if empty, could hold the prompt."""
        return request.num_prompt_blocks(self.block_size) <= self.num_total_blocks

    def has_room(self, request: SchedulingRequest) -> bool:
        """True if the prompt fits into the blocks free now, with nothing waiting before it."""
        demand = request.num_prompt_blocks(self.block_size)
        return not self.num_waiting and demand <= self.num_free_blocks
