"""Terminal picture of a pool: two tables and a log, from the frames of the live page.

A thread reads the frames; what they show is worked out by plain functions of two frames, and drawn
on the loop of the screen. Nothing is asked of the server but by the keys for draining and moving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from rich.cells import cell_len
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, RichLog, Static
from textual.worker import get_current_worker

from llumsched.commands import CommandError
from llumsched.logs import counted

RETRY_S = 2.0
HOT = 0.9
BAR_WIDTH = 16
MOST_REQUESTS = 500
CLASSES = ("high", "normal", "low")

Frame = Mapping[str, Any]
Row = Mapping[str, Any]


class Pool(Protocol):
    """A server, as ``AdminClient`` reaches it."""

    def live(self) -> Iterator[dict[str, Any]]: ...

    def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]: ...

    def drain(self, instance_id: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table; ``key`` is what it is sorted by."""

    title: str
    key: Callable[[Row], Any]
    show: Callable[[Row], str | Text]


def usage(instance: Row) -> float:
    """Share of its KV blocks that are not free."""
    return 1.0 - instance["free"] / instance["total"] if instance["total"] else 0.0


def bar(instance: Row) -> Text:
    """The KV cache of an instance: used, reserved for arrivals, free."""
    total = instance["total"] or 1
    reserved = round(BAR_WIDTH * instance["reserved"] / total)
    used = min(BAR_WIDTH - reserved, round(BAR_WIDTH * usage(instance)) - reserved)
    used = max(0, used)
    colour = "red" if usage(instance) >= HOT else "green"
    return Text.assemble(
        ("█" * used, colour),
        ("▒" * reserved, "yellow"),
        ("·" * (BAR_WIDTH - used - reserved), "dim"),
        f" {usage(instance):4.0%}",
    )


def _freeness(instance: Row) -> float:
    if instance["freeness"] is not None:
        return float(instance["freeness"])
    return float("-inf") if instance["state"] == "draining" else float("inf")


INSTANCE_COLUMNS = (
    Column(title="instance", key=lambda i: i["id"], show=lambda i: i["id"]),
    Column(title="state", key=lambda i: i["state"], show=lambda i: i["state"]),
    Column(title="KV cache", key=usage, show=bar),
    Column(title="freeness", key=_freeness, show=lambda i: f"{_freeness(i):.1f}"),
    Column(title="running", key=lambda i: i["running"], show=lambda i: str(i["running"])),
    Column(title="waiting", key=lambda i: i["waiting"], show=lambda i: str(i["waiting"])),
    Column(title="step", key=lambda i: i["step_s"], show=lambda i: f"{1000 * i['step_s']:.0f} ms"),
)
REQUEST_COLUMNS = (
    Column(title="request", key=lambda r: r["id"], show=lambda r: r["id"]),
    Column(
        title="instance",
        key=lambda r: r["instance"] or "",
        show=lambda r: r["instance"] or "not placed yet",
    ),
    Column(title="prompt", key=lambda r: r["prompt"], show=lambda r: str(r["prompt"])),
    Column(title="output", key=lambda r: r["outputs"], show=lambda r: str(r["outputs"])),
    Column(title="moves", key=lambda r: r["moves"], show=lambda r: str(r["moves"])),
    Column(
        title="class",
        key=lambda r: CLASSES.index(r["class"]) if r["class"] in CLASSES else len(CLASSES),
        show=lambda r: r["class"],
    ),
)


def summary(frame: Frame, before: Frame | None) -> str:
    """The pool in a line or two."""
    migrations = ", ".join(f"{n} {outcome}" for outcome, n in sorted(frame["migrations"].items()))
    queued = sum(frame["queued"].values())
    parts = [
        f"policy {frame['policy']}",
        counted(len(frame["instances"]), "instance"),
        counted(len(frame["requests"]), "request"),
        f"{queued} queued",
        f"migrations: {migrations or 'none yet'}",
    ]
    if before is not None and frame["at_s"] > before["at_s"]:
        passed_s = frame["at_s"] - before["at_s"]
        tokens = max(0, frame["num_tokens_passed"] - before["num_tokens_passed"])
        parts.append(f"{tokens / passed_s:.0f} tokens/s")
    if frame["ttft_p50_s"] is not None:
        parts.append(
            f"first token P50 {frame['ttft_p50_s']:.2f} s, P99 {frame['ttft_p99_s']:.2f} s"
        )
    said = [frame["error"]] if frame["error"] else []
    return "\n".join([" · ".join(parts), *said, *frame.get("places", [])])


def events(frame: Frame, before: Frame | None) -> list[str]:
    """Moves between two frames, and instances that came and went."""
    if before is None:
        return []
    found = []
    was = {request["id"]: request for request in before["requests"]}
    for request in frame["requests"]:
        old = was.get(request["id"])
        if old is not None and request["moves"] > old["moves"]:
            found.append(
                f"{request['id']} moved: {old['instance']} → {request['instance']}"
                f" after {counted(request['outputs'], 'token')}"
            )
        elif old is not None and request["resumptions"] > old["resumptions"]:
            found.append(f"{request['id']} goes on at {request['instance'] or 'another instance'}")
    states = {instance["id"]: instance["state"] for instance in before["instances"]}
    for instance in frame["instances"]:
        state = states.pop(instance["id"], None)
        if state is None:
            found.append(f"{instance['id']} has joined")
        elif state != instance["state"]:
            found.append(f"{instance['id']} is {instance['state']}")
    found += [f"{instance_id} is gone" for instance_id in states]
    return found


class Confirm(ModalScreen[bool]):
    """Asks before something is done that ends an instance."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "dismiss(True)", "Yes"),
        ("n,escape", "dismiss(False)", "No"),
    ]
    CSS = """
    Confirm { align: center middle; }
    Confirm Vertical { width: auto; height: auto; border: round $warning; padding: 1 2; }
    Confirm Label { width: auto; }
    """

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Label(f"{self._question}  y / n")


class Sortable(DataTable[str | Text]):
    """A table of rows that are named by ``id``; the cursor stays with its row."""

    def __init__(self, columns: Sequence[Column], *, sorted_by: int, reverse: bool) -> None:
        super().__init__(cursor_type="row", zebra_stripes=True)
        self._columns = columns
        self._sorted_by = sorted_by
        self._reverse = reverse
        self._rows: list[Row] = []

    def on_mount(self) -> None:
        self._draw()

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        shown = self._ordered()
        return shown[self.cursor_row] if 0 <= self.cursor_row < len(shown) else None

    def show_rows(self, rows: Sequence[Row]) -> None:
        """Show these rows from now on."""
        chosen = self.chosen
        self._rows = list(rows)
        self._draw(chosen)

    def sort_by_next(self) -> None:
        self._sorted_by = (self._sorted_by + 1) % len(self._columns)
        self._draw(self.chosen)

    def turn_round(self) -> None:
        self._reverse = not self._reverse
        self._draw(self.chosen)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        if event.column_index == self._sorted_by:
            self._reverse = not self._reverse
        self._sorted_by = event.column_index
        self._draw(self.chosen)

    def _ordered(self) -> list[Row]:
        key = self._columns[self._sorted_by].key
        named = sorted(self._rows, key=lambda row: str(row["id"]))
        return sorted(named, key=key, reverse=self._reverse)[:MOST_REQUESTS]

    def _draw(self, chosen: Row | None = None) -> None:
        arrow = "▼" if self._reverse else "▲"
        ordered = self._ordered()
        rows = [[column.show(row) for column in self._columns] for row in ordered]
        self.clear(columns=True)
        for number, column in enumerate(self._columns):
            title = f"{column.title} {arrow}" if number == self._sorted_by else column.title
            # Left to itself, a column is as wide as its title for a moment, and cuts what is in it.
            width = max(cell_len(str(cell)) for cell in (title, *(row[number] for row in rows)))
            self.add_column(title, width=width)
        self.add_rows(rows)
        if chosen is not None:
            names = [row["id"] for row in ordered]
            if chosen["id"] in names:
                self.move_cursor(row=names.index(chosen["id"]))


class TopApp(App[None]):
    """The whole screen."""

    TITLE = "llumsched top"
    CSS = """
    #summary { height: auto; padding: 0 1; background: $boost; }
    #instances { height: auto; max-height: 40%; }
    #requests { height: 1fr; }
    #events { height: 8; border-top: solid $accent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("tab", "app.focus_next", "Other table"),
        ("s", "sort", "Sort by next"),
        ("r", "reverse", "Reverse"),
        ("d", "drain", "Drain instance"),
        ("m", "migrate", "Move request"),
    ]

    def __init__(self, pool: Pool, retry_s: float = RETRY_S) -> None:
        super().__init__()
        self._pool = pool
        self._retry_s = retry_s
        self._before: Frame | None = None
        self.instances = Sortable(INSTANCE_COLUMNS, sorted_by=0, reverse=False)
        self.instances.id = "instances"
        self.requests = Sortable(REQUEST_COLUMNS, sorted_by=3, reverse=True)
        self.requests.id = "requests"
        self.summary = Static("waiting for the server", id="summary")
        self.log_of_events = RichLog(id="events", max_lines=1000, wrap=True)
        self.log_of_events.can_focus = False

    def compose(self) -> ComposeResult:
        yield self.summary
        yield self.instances
        yield self.requests
        yield self.log_of_events
        yield Footer()

    def on_mount(self) -> None:
        self.instances.focus()
        self._follow()

    @work(thread=True, exclusive=True, group="frames")
    def _follow(self) -> None:
        while not get_current_worker().is_cancelled:
            try:
                for frame in self._pool.live():
                    if get_current_worker().is_cancelled:
                        return
                    self.call_from_thread(self.show_frame, frame)
            except CommandError as error:
                self.call_from_thread(self.say, str(error))
                time.sleep(self._retry_s)

    def show_frame(self, frame: Frame) -> None:
        """Draw a frame, and tell what has happened since the last."""
        self.summary.update(summary(frame, self._before))
        self.instances.show_rows(frame["instances"])
        self.requests.show_rows(frame["requests"])
        for event in events(frame, self._before):
            self.say(event)
        self._before = frame

    def say(self, text: str) -> None:
        """Add a line to the log."""
        self.log_of_events.write(f"{time.strftime('%H:%M:%S')}  {text}")

    @property
    def _table(self) -> Sortable:
        return self.requests if self.requests.has_focus else self.instances

    def action_sort(self) -> None:
        self._table.sort_by_next()

    def action_reverse(self) -> None:
        self._table.turn_round()

    def action_drain(self) -> None:
        instance = self.instances.chosen
        if instance is None:
            return
        instance_id = str(instance["id"])

        def answered(is_wanted: bool | None) -> None:
            if is_wanted:
                self._ask(
                    lambda: self._pool.drain(instance_id),
                    f"{instance_id} takes no more requests",
                )

        self.push_screen(Confirm(f"Drain {instance_id} and end it?"), answered)

    def action_migrate(self) -> None:
        request = self.requests.chosen
        if request is not None:
            request_id = str(request["id"])
            self.say(f"{request_id} is asked to move")
            self._ask(lambda: self._pool.migrate(request_id), "")

    @work(thread=True, group="orders")
    def _ask(self, order: Callable[[], dict[str, Any]], done: str) -> None:
        try:
            order()
        except CommandError as error:
            done = str(error)
        if done:
            self.call_from_thread(self.say, done)
