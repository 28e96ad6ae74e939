"""Recorded decisions can be made again: from the beginning, and from any segment that is left."""

from __future__ import annotations

import argparse
import datetime
import json
import random
from pathlib import Path

import pytest

from llumsched import cli
from llumsched.commands import CommandError
from llumsched.commands import replay as replay_command
from llumsched.config import Config, PartConfig, build_bundle
from llumsched.core.actions import DispatchRequest, StartMigration
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    KvBlocksStored,
    LoadReported,
    MigrationFinished,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.decision_log import (
    DecisionLog,
    DecisionLogError,
    config_from_plain,
    config_to_plain,
    read_segment,
    segments_of,
)
from llumsched.replay import replay
from tests.core.builders import make_load, make_request, make_spec

EVERY_BUNDLE = [
    "adaptive",
    "latency",
    "prefix_aware",
    "random",
    "round_robin",
    "mooncake",
    "throughput",
]


HEADER = (
    '{"llumsched":"0","format":1,"checkpoint":null,"config":{"policy":"latency",'
    '"seed":0,"params":{},"parts":{},"scheduler":{}}}\n'
)


def run(
    folder: Path,
    config: Config,
    *,
    num_events: int = 300,
    max_bytes: int = 10**9,
    max_segments: int = 8,
) -> None:
    """A small deployment that logs what it decides."""
    rng = random.Random(1)
    scheduler = GlobalScheduler(build_bundle(config), seed=config.seed)
    log = DecisionLog(
        folder,
        config,
        scheduler.checkpoint,
        max_bytes=max_bytes,
        max_segments=max_segments,
    )
    now = 0.0

    def handle(event: Event) -> None:
        actions = scheduler.handle(event, now)
        log.write(now, event, actions)
        for action in actions:
            if isinstance(action, DispatchRequest):
                placed.append(action.request_id)
            elif isinstance(action, StartMigration) and rng.random() < 0.7:
                ended = MigrationFinished(
                    migration_id=action.migration_id,
                    request_id=rng.choice(placed) if placed else None,
                    source=action.source,
                    destination=action.destination,
                    outcome=MigrationOutcome.COMMITTED,
                )
                handle(ended)

    placed: list[str] = []
    with log:
        for name in "abcd":
            handle(InstanceJoined(spec=make_spec(name)))
        for number in range(num_events):
            now += 0.05
            name = rng.choice("abc")
            handle(
                RequestArrived(
                    request=make_request(
                        f"r{number}",
                        num_blocks=rng.randint(1, 30),
                        client_id=rng.choice("xy"),
                        prefix_hashes=tuple(range(rng.randint(0, 9))),
                    )
                )
            )
            handle(
                LoadReported(
                    load=make_load(
                        name,
                        num_used_blocks=rng.randint(0, 95),
                        num_running=rng.randint(1, 9),
                        sequence=number + 1,
                        received_request_ids=tuple(placed[-2:]),
                    )
                )
            )
            handle(KvBlocksStored(instance_id=name, block_hashes=tuple(range(rng.randint(0, 9)))))
            if placed and rng.random() < 0.8:
                done = placed.pop(rng.randrange(len(placed)))
                handle(RequestFinished(request_id=done, num_output_tokens=rng.randint(1, 900)))
            if number == num_events // 2:
                handle(DrainRequested(instance_id="d", deadline_s=5.0))
            handle(Ticked())


@pytest.mark.parametrize("policy", EVERY_BUNDLE)
def test_a_replay_decides_the_same(tmp_path: Path, policy: str) -> None:
    parts = {"predictor": PartConfig(name="moving_quantile", params={"min_samples": 2})}
    run(tmp_path, Config(policy=policy, seed=3, parts=parts))
    result = replay(tmp_path)
    assert result.is_identical, result.first_differences
    assert result.num_events > 1000
    assert result.recorded["DispatchRequest"] > 100


def test_a_decision_has_the_time_of_day_that_logs_and_boards_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs_s = iter((1_700_000_000.0, 1_700_000_001.0, 1_700_000_001.0))
    config = Config(policy="round_robin")
    scheduler = GlobalScheduler(build_bundle(config), seed=config.seed)
    # A segment a decision; between the two the machine's clock is put right by a second.
    with DecisionLog(
        tmp_path, config, scheduler.checkpoint, epoch_s=lambda: next(epochs_s), max_bytes=1
    ) as log:
        for now, event in (
            (2.25, InstanceJoined(spec=make_spec("a"))),
            (7.0, RequestArrived(request=make_request("r0"))),
        ):
            log.write(now, event, scheduler.handle(event, now))
    times_s = [d.unix_s for path in segments_of(tmp_path) for d in read_segment(path)[1]]
    assert times_s == [1_700_000_002.25, 1_700_000_008.0]
    assert cli.main(["replay", str(tmp_path), "--decisions"]) == 0
    local = datetime.datetime.fromtimestamp(1_700_000_008).isoformat(" ", "milliseconds")
    assert f"{local}  action  DispatchRequest(" in capsys.readouterr().out


@pytest.mark.parametrize("policy", EVERY_BUNDLE)
def test_what_is_left_of_a_rotated_log_decides_the_same(tmp_path: Path, policy: str) -> None:
    parts = {"predictor": PartConfig(name="moving_quantile", params={"min_samples": 2})}
    config = Config(policy=policy, seed=3, parts=parts)
    run(tmp_path, config, max_bytes=40_000, max_segments=3)
    segments = segments_of(tmp_path)
    assert len(segments) == 3
    assert read_segment(segments[0])[0].checkpoint is not None
    for path in (tmp_path, *segments):
        result = replay(path)
        assert result.is_identical, result.first_differences
        assert result.num_events > 0


def test_the_size_is_bounded(tmp_path: Path) -> None:
    run(tmp_path, Config.default(), max_bytes=20_000, max_segments=2)
    segments = [path.read_bytes().splitlines(keepends=True) for path in segments_of(tmp_path)]
    assert len(segments) == 2
    for checkpoint, *records in segments:
        # Beside the checkpoint that begins it, a segment ends with the record that fills it.
        assert sum(map(len, records[:-1])) < 20_000
        assert len(checkpoint) < 60_000


def test_a_second_run_goes_on_in_its_own_segment(tmp_path: Path) -> None:
    run(tmp_path, Config.default(), num_events=20)
    run(tmp_path, Config.default("round_robin"), num_events=20)
    assert [path.name for path in segments_of(tmp_path)] == [
        "decisions-000001.jsonl",
        "decisions-000002.jsonl",
    ]
    assert replay(tmp_path).is_identical


def test_a_line_cut_off_by_a_crash_is_the_end(tmp_path: Path) -> None:
    run(tmp_path, Config.default(), num_events=20)
    (segment,) = segments_of(tmp_path)
    text = segment.read_text()
    segment.write_text(text[: len(text) - 7])
    assert replay(tmp_path).is_identical


def test_a_change_is_found_and_shown(tmp_path: Path) -> None:
    run(tmp_path, Config.default(), num_events=20)
    (segment,) = segments_of(tmp_path)
    lines = segment.read_text().splitlines(keepends=True)
    target = next(i for i, line in enumerate(lines) if '"DispatchRequest"' in line)
    data = json.loads(lines[target])
    data["actions"][0]["instance_id"] = "zz"
    lines[target] = json.dumps(data) + "\n"
    segment.write_text("".join(lines))
    result = replay(tmp_path)
    assert result.num_different == 1
    assert result.first_differences[0].number == target


def test_another_policy_parts_and_the_report_says_where(tmp_path: Path) -> None:
    run(tmp_path, Config.default("latency"), num_events=50)
    result = replay(tmp_path, Config.default("round_robin"))
    assert result.num_different > 0
    assert result.num_placed_elsewhere > 0
    assert result.recorded["StartMigration"] > 0 == result.replayed["StartMigration"]
    assert sum(result.replayed_on.values()) >= 50
    # And under the recorded one, by its name, everything is the same again.
    assert replay(tmp_path, Config.default("latency")).num_placed_elsewhere == 0


def test_another_policy_ticks_at_its_own_deadlines(tmp_path: Path) -> None:
    run(tmp_path, Config.default("round_robin"), num_events=100)
    result = replay(tmp_path, Config.default("latency"))
    assert result.replayed["StartMigration"] > 0


def test_configurations_survive_the_header() -> None:
    config = Config(
        policy="latency",
        seed=3,
        params={"queue": "whole"},
        parts={"migration": None, "dispatch": PartConfig(name="freeness", params={})},
        scheduler={"stale_after_s": 1.0},
    )
    assert config_from_plain(json.loads(json.dumps(config_to_plain(config)))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: not the header"),
        ("{}\n", r":1: not the header"),
        ('{"format": 99}\n', r":1: format 99; this version reads format 1"),
        (HEADER + '{"now": 1, "event": {}}\n', r":2: not a decision: .*unknown type None"),
    ],
)
def test_what_is_not_a_log_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "decisions-000001.jsonl"
    path.write_text(text)
    with pytest.raises(DecisionLogError, match=message):
        replay(path)
    with pytest.raises(DecisionLogError, match="neither a decision log nor a folder"):
        replay(tmp_path / "none")


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    replay_command.add_parser(parser.add_subparsers())
    return replay_command.run(parser.parse_args(["replay", *arguments]))


def test_the_command_says_whether_it_is_identical(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Config.default("latency"), num_events=20)
    assert command(str(tmp_path)) == 0
    assert "every decision identical" in capsys.readouterr().out
    assert command(str(tmp_path), "--policy", "round_robin", "--show", "1") == 0
    shown = capsys.readouterr().out
    assert "events; round_robin decides" in shown
    assert "dispatches to" in shown
    assert shown.count("\nevent ") == 1
    (segment,) = segments_of(tmp_path)
    segment.write_text(segment.read_text().replace('"reason":"freeness', '"reason":"frenes'))
    assert command(str(tmp_path)) == 1
    with pytest.raises(CommandError, match="unknown policy 'zz'"):
        command(str(tmp_path), "--policy", "zz")
