"""The decision log: what happened to the scheduler and what it decided, as JSON lines.

    {"llumsched": "0.1.0", "format": 1, "config": {...}, "checkpoint": null, "epoch_s": 1.7e9}
    {"now": 12.5, "event": {"type": "RequestArrived", ...}, "actions": [{...}]}

``now`` is a clock that only ever grows; ``epoch_s`` is the Unix time at which it was 0, asked anew
for each segment, and null where time is simulated.

A folder of numbered segments. When one is full the next begins with a checkpoint of the scheduler,
so the oldest can be removed and what is left can still be replayed from its own beginning.

Invariants: at most `max_segments` files of about `max_bytes` each; each segment says under which
configuration it was written; a line cut off by a crash at the end of a segment is not an error.
This module does not replay (`replay`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llumsched import __version__
from llumsched.config import Config, PartConfig
from llumsched.core.actions import Action
from llumsched.core.codec import CodecError, decode_action, decode_event, encode
from llumsched.core.events import Event

FORMAT = 1
_PATTERN = "decisions-*.jsonl"


class DecisionLogError(ValueError):
    """A log cannot be read; the message names file and line."""


class DecisionLog:
    """Appends decisions; make one before the first event and `write` every event in order."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        checkpoint: Callable[[], Mapping[str, Any]],
        *,
        epoch_s: Callable[[], float | None] = lambda: None,
        max_bytes: int = 64 * 2**20,
        max_segments: int = 8,
    ) -> None:
        """`checkpoint` is the scheduler's method of this name; it is called when a segment is full.
        `epoch_s` says which Unix time the `now` of 0 was, if it was any.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._folder = folder
        self._config = config
        self._checkpoint = checkpoint
        self._epoch_s = epoch_s
        self._max_bytes = max_bytes
        self._max_segments = max_segments
        folder.mkdir(parents=True, exist_ok=True)
        self._number = max((_number(path) for path in folder.glob(_PATTERN)), default=0)
        self._file = self._open(None)

    def write(self, now: float, event: Event, actions: Iterable[Action]) -> None:
        """Append one decision, as soon as it is made: a full segment ends with a checkpoint of now.

        It reaches the disk by `flush`, or when the buffer is full.
        """
        self._append({"now": now, "event": encode(event), "actions": [encode(a) for a in actions]})
        if self._num_bytes >= self._max_bytes:
            self._file.close()
            self._file = self._open(self._checkpoint())

    def flush(self) -> None:
        """Hand what was written to the operating system; call it every second or so."""
        self._file.flush()

    def close(self) -> None:
        """Flush and end the segment."""
        self._file.close()

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, checkpoint: Mapping[str, Any] | None) -> TextIO:
        self._number += 1
        path = self._folder / f"decisions-{self._number:06}.jsonl"
        self._file = path.open("x", encoding="utf-8")
        self._num_bytes = 0
        self._append(
            {
                "llumsched": __version__,
                "format": FORMAT,
                "config": config_to_plain(self._config),
                "checkpoint": checkpoint,
                "epoch_s": self._epoch_s(),
            }
        )
        # A large checkpoint must not make a new segment full at once.
        self._num_bytes = 0
        segments = sorted(self._folder.glob(_PATTERN), key=_number)
        for oldest in segments[: -self._max_segments]:
            oldest.unlink()
        return self._file

    def _append(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":"), allow_nan=False)
        self._file.write(line + "\n")
        self._num_bytes += len(line) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line of a segment."""

    version: str
    config: Config
    checkpoint: Mapping[str, Any] | None
    epoch_s: float | None
    """Unix time at which ``now`` was 0, if it was any; older logs do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Any other line: an event, when it was handled, and what the scheduler answered."""

    now: float
    unix_s: float | None
    """The time of day of ``now``, where it has one."""
    event: Event
    actions: tuple[Action, ...]


def segments_of(path: Path) -> list[Path]:
    """The segments of a folder, oldest first; or the one that was named.

    Raises:
        DecisionLogError: there is none.
    """
    if path.is_file():
        return [path]
    segments = sorted(path.glob(_PATTERN), key=_number)
    if not segments:
        raise DecisionLogError(f"{path}: neither a decision log nor a folder of {_PATTERN}")
    return segments


def read_segment(path: Path) -> tuple[Header, Iterator[Decision]]:
    """The header of a segment, and its decisions one after another.

    Raises:
        DecisionLogError: it is not a segment of this format (also while iterating).
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = json.loads(file.readline())
        if data["format"] != FORMAT:
            raise DecisionLogError(
                f"{path}:1: format {data['format']!r}; this version reads format {FORMAT}"
            )
        header = Header(
            version=data["llumsched"],
            config=config_from_plain(data["config"]),
            checkpoint=data["checkpoint"],
            epoch_s=None if (epoch_s := data.get("epoch_s")) is None else float(epoch_s),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DecisionLogError):
            raise
        raise DecisionLogError(
            f"{path}:1: not the header of a decision log: {error!r:.200}"
        ) from error
    return header, _decisions(path, header.epoch_s)


def _decisions(path: Path, epoch_s: float | None) -> Iterator[Decision]:
    with path.open(encoding="utf-8") as file:
        next(file)
        number = 1
        while True:
            number += 1
            try:
                line = file.readline()
            except UnicodeDecodeError as error:
                raise DecisionLogError(f"{path}:{number}: not UTF-8 text: {error}") from error
            if not line.endswith("\n"):
                return
            try:
                data = json.loads(line)
                now = float(data["now"])
                decision = Decision(
                    now=now,
                    unix_s=None if epoch_s is None else epoch_s + now,
                    event=decode_event(data["event"]),
                    actions=tuple(decode_action(action) for action in data["actions"]),
                )
            except (CodecError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise DecisionLogError(
                    f"{path}:{number}: not a decision: {error!r:.200}"
                ) from error
            yield decision


def config_to_plain(config: Config) -> dict[str, Any]:
    """A configuration as JSON values."""
    return {
        "policy": config.policy,
        "seed": config.seed,
        "params": dict(config.params),
        "parts": {
            kind: None if part is None else {"name": part.name, "params": dict(part.params)}
            for kind, part in config.parts.items()
        },
        "scheduler": dict(config.scheduler),
    }


def config_from_plain(data: Mapping[str, Any]) -> Config:
    """The configuration that `config_to_plain` gave `data` for."""
    return Config(
        policy=data["policy"],
        seed=data["seed"],
        params=data["params"],
        parts={
            kind: None if part is None else PartConfig(name=part["name"], params=part["params"])
            for kind, part in data["parts"].items()
        },
        scheduler=data["scheduler"],
    )


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
