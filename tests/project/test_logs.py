"""Log lines: one shape in every process, ids as keys of JSON, repeated failures once in a while."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llumsched.engine.vllm.notices import NEEDLESS, OF_THE_PROGRAM, put_right
from llumsched.logs import FailureLog, LogFormat, LogOptions, options_of, prepare_ray, set_up

LINE = re.compile(
    r"\(instance-7 pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[test_logs\.py:\d+\] (?P<said>.*)\n"
)
# Names of Ray's.
RAY_SETTINGS = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    logger, process = logging.getLogger("llumsched"), multiprocessing.current_process()
    before = (logger.handlers[:], logger.level, logger.propagate, process.name)
    yield
    logger.handlers[:], logger.level, logger.propagate, process.name = before


def written(format_: LogFormat) -> str:
    stream = io.StringIO()
    set_up("instance-7", LogOptions(format=format_), stream)
    ids = {"request_id": "r-1", "migration_id": "m-1"}
    logging.getLogger("llumsched.somewhere").info("moved %s", "r-1", extra=ids)
    logging.getLogger("llumsched.somewhere").debug("not said")
    return stream.getvalue()


def test_a_line_has_process_level_time_and_place() -> None:
    match = LINE.fullmatch(written("text"))
    assert match is not None
    assert match["said"] == "moved r-1"


def test_a_json_line_has_the_ids_as_keys() -> None:
    line = json.loads(written("json"))
    assert line["message"] == "moved r-1"
    assert (line["request_id"], line["migration_id"]) == ("r-1", "m-1")
    assert (line["levelname"], line["processName"]) == ("INFO", "instance-7")
    assert line["name"] == "llumsched.somewhere"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", line["asctime"])


def test_set_up_twice_still_writes_once() -> None:
    written("json")
    assert len(written("text").splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["model"], "text"),
        (["model", "--log-format", "json"], "json"),
        (["--log-format=json", "model"], "json"),
        (["--log-format"], "text"),
    ],
)
def test_the_format_is_known_before_the_arguments_are_parsed(
    argv: list[str], expected: str
) -> None:
    assert options_of(argv).format == expected


def test_ray_passes_on_the_lines_of_instances_without_colours_and_prefixes_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a log that is redirected to a file they would be part, and hide instances' names."""
    for name in RAY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    prepare_ray()
    try:
        assert {name: os.environ[name] for name in RAY_SETTINGS} == RAY_SETTINGS
        assert "\x1b" not in written("text") + written("json")
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def test_an_unknown_level_of_the_environment_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "loud")
    assert options_of([]).level == "INFO"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_failure_that_goes_on_is_said_once_in_full_and_then_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    log = FailureLog(logging.getLogger("llumsched.test"), interval_s=60, clock=clock)

    def fail(kind: str) -> None:
        try:
            raise KeyError(kind)
        except KeyError as error:
            log.failed(kind, "Policy failed: %r", error)

    for _ in range(3):
        fail("a")
    fail("b")
    clock.now_s = 60.0
    fail("a")
    first_lines = [message.partition("\n")[0] for message in caplog.messages]
    assert first_lines == [
        "Policy failed: KeyError('a')",
        "Policy failed: KeyError('b')",
        "Policy failed: KeyError('a') (and 2 times more since the last such line)",
    ]
    assert ["Traceback" in message for message in caplog.messages] == [True, True, False]
    assert all(record.filename == "test_logs.py" for record in caplog.records)


def test_what_is_dropped_is_said_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(logging.getLogger("llumsched.test"))
    for _ in range(100):
        try:
            raise ValueError("not a message")
        except ValueError as error:
            log.warned("malformed", "Dropped: %s", error)
    assert caplog.messages == ["Dropped: not a message"]
    assert caplog.records[0].filename == "test_logs.py"


def test_details_take_the_place_of_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(logging.getLogger("llumsched.test"))
    log.failed("a", "Policy %s failed", "Broken", details="Traceback ...\n  line 3\n")
    assert caplog.messages == ["Policy Broken failed\nTraceback ...\n  line 3"]


def test_lines_of_vllm_that_mislead_are_put_right(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    put_right()
    triton = logging.getLogger("vllm.triton_utils.importing")
    triton.warning("Triton is installed, but doesn't include CPU backend. Disabling Triton.")
    triton.warning("Triton is installed, but `triton.backends` could not be imported.")
    scale_out = logging.getLogger("vllm.entrypoints.scale_out.factories")
    scale_out.info("Endpoints are disabled. Restart vllm serve with --enable-scale-out.")
    assert caplog.messages == [
        "Triton is installed, but `triton.backends` could not be imported.",
        "Endpoints are disabled. Restart llumsched serve with --enable-scale-out.",
    ]


def test_what_vllm_is_said_to_say_is_in_its_sources() -> None:
    """Of the installed version; with other words the line would be there again."""
    for name, said in NEEDLESS.items():
        assert said in source_of(name)
    for name in OF_THE_PROGRAM:
        assert "vllm serve" in source_of(name)


def source_of(module: str) -> str:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.submodule_search_locations is None:
        pytest.skip("vLLM is not installed")
    path = Path(vllm.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_serve_says_something_before_it_imports_vllm() -> None:
    program = (
        "import sys\n"
        "sys.modules['llumsched.frontend.server'] = None\n"
        "import llumsched.commands.serve as serve\n"
        "try:\n"
        "    serve.main(['model', '--log-format', sys.argv[1]])\n"
        "except ImportError:\n"
        "    print('vllm' in sys.modules, 'ray' in sys.modules)\n"
    )

    def said(format_: str) -> list[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", program, format_]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        return finished.stdout.splitlines()

    line, imported = said("text")
    assert re.match(r"\(llumsched pid=\d+\) INFO .* importing vLLM", line)
    assert imported == "False False"
    line, _ = said("json")
    assert "importing vLLM" in json.loads(line)["message"]
