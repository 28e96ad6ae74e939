"""Log lines of a server's processes: one shape for all of them, the shape of vLLM's own lines.

    (instance-0 pid=4711) INFO 11-30 16:40:02 [controller.py:300] Migration ...

A line names its process, its level, its time and its place in the code, and no line has colours.
In the format ``json`` a line is one object; what a record is given by ``extra``, such as
``request_id``, ``migration_id`` and ``instance_id``, are keys of it, beside those that vLLM's JSON
lines have.

Invariant: after `set_up` every record of the loggers ``llumsched.*`` is written once, whatever Ray
or vLLM have configured. This module does not know which events are worth a line.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, get_args

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
FORMAT_FLAG = "--log-format"

# As vLLM writes its own.
TEXT = (
    "(%(processName)s pid=%(process)d) %(levelname)s %(asctime)s"
    " [%(filename)s:%(lineno)d] %(message)s"
)
TEXT_TIME = "%m-%d %H:%M:%S"
JSON = (
    "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(filename)s %(lineno)d"
    " %(message)s"
)
REPEAT_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """How every process of a server logs. ``level`` is a name of ``logging``."""

    format: LogFormat = "text"
    level: str = "INFO"


def options_of(argv: Sequence[str]) -> LogOptions:
    """The options that a command line of ``serve`` seems to ask for, before it has been parsed.

    vLLM's parser takes seconds to import; the first line does not wait for it.
    """
    format_: LogFormat = "text"
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == FORMAT_FLAG:
            value = value or "".join(argv[position + 1 : position + 2])
            format_ = "json" if value == "json" else "text"
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    known = level in logging.getLevelNamesMapping()
    return LogOptions(format=format_, level=level if known else "INFO")


def set_up(process: str, options: LogOptions, stream: TextIO | None = None) -> None:
    """Write the records of ``llumsched.*`` in this process; may be called again.

    Args:
        process: the name of this process in every line, in vLLM's lines as well.
        stream: standard output by default, where vLLM's lines go.
    """
    multiprocessing.current_process().name = process
    handler = logging.StreamHandler(sys.stdout if stream is None else stream)
    handler.setFormatter(_formatter(options.format))
    logger = logging.getLogger("llumsched")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(options.level)
    logger.propagate = False


def prepare_ray() -> None:
    """Have Ray pass on what its workers print as it is; call before ``ray`` is imported.

    Ray would leave out lines that differ in their numbers alone, and put colours and a prefix of
    its own before each.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")


def _formatter(format_: LogFormat) -> logging.Formatter:
    if format_ == "text":
        return logging.Formatter(TEXT, TEXT_TIME)
    # Comes with vLLM, which writes its own JSON lines with it.
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(JSON)


class FailureLog:
    """Says each kind of failure once in full, and then, while it goes on, once in a while.

    Args:
        interval_s: the least time between two lines of one kind.
        clock: seconds that only ever grow.
    """

    MAX_KINDS = 1000

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = REPEAT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def failed(
        self,
        kind: Hashable,
        message: str,
        *args: object,
        details: str = "",
        level: int = logging.ERROR,
    ) -> None:
        """Log a failure, unless its kind was logged less than ``interval_s`` ago.

        Args:
            kind: failures of equal kind are one failure again and again.
            details: said with the first of a kind alone; the traceback being handled by default.
        """
        if kind not in self._kinds and not details and sys.exc_info()[0] is not None:
            details = traceback.format_exc()
        self._say(kind, message, args, level=level, details=details)

    def _say(
        self,
        kind: Hashable,
        message: str,
        args: tuple[object, ...],
        *,
        level: int,
        details: str = "",
    ) -> None:
        now_s = self._clock()
        last_s, num_unsaid = self._kinds.get(kind, (None, 0))
        if last_s is not None and now_s - last_s < self._interval_s:
            self._kinds[kind] = (last_s, num_unsaid + 1)
            return
        if last_s is None and len(self._kinds) >= self.MAX_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (now_s, 0)
        if num_unsaid:
            message = f"{message} (and %d times more since the last such line)"
            args = (*args, num_unsaid)
        if last_s is None and details:
            message, args = f"{message}\n%s", (*args, details.rstrip())
        self._logger.log(level, message, *args, stacklevel=3)

    def warned(self, kind: Hashable, message: str, *args: object) -> None:
        """As ``failed``, for what is dropped and does no harm; without a traceback."""
        self._say(kind, message, args, level=logging.WARNING)


def counted(number: int, noun: str) -> str:
    """A number with its noun, which has an s unless there is one: ``1 block``, ``2 blocks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
