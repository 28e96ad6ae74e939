"""Jobs as YAML or the API says them.

Invariant: a `Job` that `parse` or `load` has let through can be run: it has one kind and one way to
be due, its times can be read, and no job waits for itself, directly or through others.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from llumsched.batch.lines import ENDPOINTS
from llumsched.batch.store import BadRequest, window_s
from llumsched.flags import server_url
from llumsched.jobs.cron import CronError, cron_trigger
from llumsched.yaml_file import YamlFileError, read_yaml

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class SpecError(ValueError):
    """A job cannot be used; the message names it and the fix."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class HttpRequest(_Strict, frozen=True, kw_only=True):
    """Kind: an HTTP request; an answer below 400 is success.

    In `url`, `body` and values of `headers`, `{shard}` and `{due}` (ISO time) are filled in.
    """

    url: str
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    headers: dict[str, str] = {}
    body: str | None = None


class Scale(_Strict, frozen=True, kw_only=True):
    """Kind: have this many instances, and wait until they run."""

    instances: Annotated[int, Meta(ge=0)]


class SubmitBatch(_Strict, frozen=True, kw_only=True):
    """Kind: make a batch of a file on this machine, and wait for its end.

    In `file` and `output`, `{shard}` and `{due}` are filled in.
    """

    file: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] = {}
    output: str | None = None
    """Where answers are written when the batch has ended."""


class Window(_Strict, frozen=True, kw_only=True):
    """Times of day between which runs may begin; `to` before `from` is the next morning."""

    start: str = msgspec.field(name="from")
    end: str = msgspec.field(name="to")


class Retry(_Strict, frozen=True, kw_only=True):
    """How often a run is tried, and how long to wait before the second time; then twice as long."""

    tries: Positive = 1
    wait_s: Seconds = 60.0


class Job(_Strict, frozen=True, kw_only=True):
    """A job; the fields are those of the YAML file."""

    name: Name
    http: HttpRequest | None = None
    scale: Scale | None = None
    batch: SubmitBatch | None = None
    cron: str | None = None
    """Six fields, the first is the second; five begin with the minute."""
    at: list[str] = []
    """Times in ISO format."""
    after: list[str] = []
    """Jobs that must have succeeded for the same time."""
    timezone: str = "UTC"
    window: Window | None = None
    shards: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: [""])
    """Keys; there is a run for each."""
    retry: Retry = Retry()
    misfire: Literal["once", "all", "skip"] = "once"
    """Of times that were missed: the last runs, all run, or none."""
    grace_s: Seconds = 60.0
    """A time is missed when nobody has looked for so long."""
    most_running: Positive = 1
    """Runs at once; others wait."""
    timeout_s: Seconds = 86_400.0

    @property
    def kind(self) -> HttpRequest | Scale | SubmitBatch:
        """Work of the job."""
        found = self.http or self.scale or self.batch
        assert found is not None
        return found

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of `cron`, `window`, and of times in `at` that name none."""
        return ZoneInfo(self.timezone)


def parse(value: Any) -> Job:
    """The job of a value read from YAML or JSON.

    Raises:
        SpecError: the value is not one.
    """
    name = value.get("name", "a job") if isinstance(value, dict) else "a job"
    try:
        job = msgspec.convert(value, Job)
        _check(job)
    except (msgspec.ValidationError, CronError, BadRequest) as error:
        raise SpecError(f"{name}: {error}") from None
    return job


def _check(job: Job) -> None:
    if sum(kind is not None for kind in (job.http, job.scale, job.batch)) != 1:
        raise CronError("give one of http, scale and batch")
    if sum(map(bool, (job.cron, job.at, job.after))) != 1:
        raise CronError("give one of cron, at and after")
    try:
        zone = job.zone
    except (ZoneInfoNotFoundError, ValueError):
        raise CronError(f"there is no time zone {job.timezone!r}") from None
    if job.cron is not None:
        cron_trigger(job.cron, zone)
    for text in job.at:
        instant(text, zone)
    window = job.window
    if window and minute_of_day(window.start) == minute_of_day(window.end):
        raise CronError("the window is empty: 'from' and 'to' are the same")
    if len(set(job.shards)) < len(job.shards):
        raise CronError("two shards have the same key")
    if job.http is not None and "{" not in job.http.url:
        try:
            server_url(job.http.url)
        except argparse.ArgumentTypeError as error:
            raise CronError(f"http: {error}") from None
    if job.batch is not None:
        window_s(job.batch.completion_window)
        if job.batch.endpoint not in ENDPOINTS:
            raise CronError(f"'endpoint' must be one of {', '.join(ENDPOINTS)}")


def instant(text: str, zone: ZoneInfo) -> float:
    """Seconds since the epoch of a time in ISO format; `zone` counts where it names none.

    Raises:
        CronError: the text is none.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise CronError(f"{text!r} is no time such as 2027-01-31T22:00:00") from None
    return (found if found.tzinfo else found.replace(tzinfo=zone)).timestamp()


def minute_of_day(text: str) -> int:
    """Minutes from midnight of a time such as `22:30`.

    Raises:
        CronError: the text is none.
    """
    if not re.fullmatch(r"\d\d:\d\d", text):
        raise CronError(f"{text!r} is no time of day such as 22:30")
    try:
        found = time.fromisoformat(text)
    except ValueError:
        raise CronError(f"{text!r} is no time of day such as 22:30") from None
    return 60 * found.hour + found.minute


def check_all(jobs: Iterable[Job]) -> dict[str, Job]:
    """Jobs by name, if they fit together.

    Raises:
        SpecError: two have one name, one waits for what is not there or for itself, or for jobs
            that are never due at the same time.
    """
    found: dict[str, Job] = {}
    for job in jobs:
        if job.name in found:
            raise SpecError(f"{job.name}: two jobs have this name")
        found[job.name] = job
    for job in found.values():
        for name in job.after:
            if name not in found:
                known = ", ".join(sorted(found))
                raise SpecError(f"{job.name}: there is no job {name!r}; there are: {known}")
    try:
        order = list(TopologicalSorter({n: j.after for n, j in found.items()}).static_order())
    except CycleError as error:
        raise SpecError(f"jobs wait for one another: {' -> '.join(error.args[1])}") from None
    times: dict[str, Sequence[Any]] = {}
    for name in order:
        job = found[name]
        own = [(job.cron, tuple(job.at), job.timezone)]
        of_upstream = [times[upstream] for upstream in job.after]
        if any(other != of_upstream[0] for other in of_upstream):
            raise SpecError(
                f"{name}: waits for {', '.join(job.after)}, which are due at different times;"
                " give them the same cron or at"
            )
        times[name] = of_upstream[0] if of_upstream else own
    return found


def load(path: Path) -> dict[str, Job]:
    """The jobs of a YAML file, by name.

    Raises:
        SpecError: the file cannot be used.
    """
    try:
        content = read_yaml(path)
    except YamlFileError as error:
        raise SpecError(str(error)) from None
    if not isinstance(content, Mapping) or not isinstance(content.get("jobs"), list):
        raise SpecError(f"{path}: it must have a list 'jobs'")
    if unknown := content.keys() - {"jobs"}:
        raise SpecError(f"{path}: there is no key {sorted(map(str, unknown))[0]!r} beside 'jobs'")
    try:
        return check_all(parse(value) for value in content["jobs"])
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
