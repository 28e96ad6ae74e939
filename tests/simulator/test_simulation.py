"""Behaviour of a simulated cluster: migrations, failures, scaling, refusals, and how it ends."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from llumsched.config import Config, PartConfig
from llumsched.simulator.cluster.loop import Cluster
from llumsched.simulator.hardware.spec import MachineSharing
from llumsched.simulator.kernel import to_ps
from llumsched.simulator.options import SimulationError, SimulationOptions
from llumsched.simulator.results.records import RequestStatus
from llumsched.simulator.simulation import simulate
from tests.simulator.clusters import make_hardware, make_options, make_requests

MOVING = Config(
    policy="latency",
    parts={"dispatch": PartConfig(name="round_robin")},
    params={"source_below": 100.0, "destination_above": 100.0},
    scheduler={"migration_interval_s": 0.2},
)


def test_a_request_moves_while_it_decodes_and_pauses_for_a_copy_and_a_step() -> None:
    # Two fill one instance, and the other has soon nothing to do.
    trace = make_requests((0.0, 300, 90), (0.0, 4, 5), (0.01, 300, 90))
    options = make_options(num_instances=2, config=MOVING)
    result = simulate(trace, options)
    committed = [m for m in result.migrations if m.outcome == "committed"]
    assert committed
    copy_s = 15e-3
    for migration in committed:
        assert migration.num_stages >= 2
        assert migration.num_blocks >= 75
        # The pause holds the last copy, two messages, and one or two steps of the destination.
        assert copy_s < migration.downtime_s < copy_s + 0.1
        assert migration.end_s > migration.start_s
    moved = committed[0].request
    assert result.num_migrations[moved] >= 1
    assert result.itl_max_s[moved] >= committed[0].downtime_s
    assert result.num_preemptions[moved] == 0


def test_what_an_instance_ran_when_it_died_is_computed_again_elsewhere() -> None:
    trace = make_requests((0.0, 20, 100), (0.0, 20, 100))
    options = make_options(num_instances=2, failures=((0, 1.0),), failure_detection_s=0.5)
    result = simulate(trace, options)
    assert (result.status == RequestStatus.FINISHED).all()
    assert result.instance.tolist() == [1, 1]
    assert result.instances[0].gone_s == 1.0
    stalled = int(np.argmax(result.itl_max_s))
    # From its last token until the other instance has computed prompt and output so far.
    assert 0.5 < result.itl_max_s[stalled] < 0.7
    assert result.num_output_tokens.tolist() == [100, 100]


def test_when_every_instance_is_dead_requests_are_held_and_then_rejected() -> None:
    trace = make_requests((0.0, 20, 100))
    config = Config(policy="round_robin", scheduler={"queue_timeout_s": 5.0})
    result = simulate(trace, make_options(failures=((0, 1.0),), config=config))
    assert result.status.tolist() == [RequestStatus.REJECTED]
    assert result.end_s == pytest.approx(1.0 + 1.0 + 5.0, abs=0.01)


def test_instances_are_launched_under_load_and_leave_after_it() -> None:
    scheduler = {
        "max_instances": 3,
        "scale_up_after_s": 1.0,
        "scale_down_after_s": 5.0,
        "scale_up_cooldown_s": 1.0,
        "scale_down_cooldown_s": 5.0,
    }
    config = Config(policy="latency", scheduler=scheduler)
    busy = [(0.1 * i, 40, 60) for i in range(100)]
    trace = make_requests(*busy, *[(40.0 + 5 * i, 4, 4) for i in range(10)])
    result = simulate(trace, make_options(config=config, boot_s=2.0))
    launched = result.instances[1:]
    assert launched
    assert launched[0].serving_s == pytest.approx(launched[0].launched_s + 2.0)
    assert any(not np.isnan(instance.gone_s) for instance in result.instances)
    assert (result.status == RequestStatus.FINISHED).all()


@pytest.mark.filterwarnings("ignore:.*cut short")
def test_a_prompt_that_no_engine_takes_is_rejected_and_a_long_output_cut() -> None:
    trace = make_requests((0.0, 900, 5), (0.0, 700, 500))
    result = simulate(trace, make_options(hardware=make_hardware(num_blocks=200)))
    assert result.status.tolist() == [RequestStatus.REJECTED, RequestStatus.FINISHED]
    assert result.num_output_tokens.tolist() == [0, 100]
    assert any("cut short" in warning for warning in result.warnings)


def test_it_stops_when_told_and_what_has_ended_is_whole() -> None:
    trace = make_requests(*[(float(i), 10, 10) for i in range(20)])
    half = simulate(trace, make_options(until_s=10.25))
    assert not half.is_complete
    assert half.end_s == 10.25
    assert half.status.tolist() == [1] * 10 + [0] * 10
    # One prefill and the decode steps that have ended since.
    assert half.num_output_tokens[10] == 1 + int((0.25 - 0.03604) / 0.03632)
    assert np.isnan(half.finished_s[10])

    asked = []
    long = make_requests(*[(0.001 * i, 1, 1) for i in range(20_000)])
    stopped = simulate(
        long,
        make_options(num_instances=1),
        progress=lambda num_ended, now_s: asked.append((num_ended, now_s)),
        stop=lambda: len(asked) == 1,
    )
    assert not stopped.is_complete
    assert len(asked) == 1
    assert stopped.end_s == asked[0][1]


def test_beyond_what_was_measured_a_warning_says_so() -> None:
    hardware = make_hardware()
    small = type(hardware.measured)(batch_tokens=50, requests=1000, kv_tokens=10**6)
    changed = type(hardware)(
        **{
            **{name: getattr(hardware, name) for name in type(hardware).__dataclass_fields__},
            "measured": small,
        }
    )
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        result = simulate(make_requests((0.0, 60, 2)), make_options(hardware=changed))
    assert result.warnings == (
        "EXTRAPOLATED: up to 60 tokens in a step; test was measured up to 50",
    )
    assert [str(w.message) for w in raised] == list(result.warnings)


def test_an_empty_trace_has_an_empty_result() -> None:
    trace = make_requests((0.0, 1, 1)).head(0)
    result = simulate(trace, make_options())
    assert len(result.status) == 0
    assert result.is_complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm-2"}, "unknown engine 'vllm-2'; there are: vllm-v1, vllm-0.1"),
        ({"num_instances": 0}, "at least 1"),
        ({"report_interval_s": 0.0}, "report_interval_s"),
        ({"message_delay_s": 0.0}, "message_delay_s"),
        ({"report_delay_s": -1.0}, "report_delay_s"),
        ({"watermark": 1.0}, "watermark"),
        ({"max_num_batched_tokens": 100}, "vLLM refuses that"),
        ({"failures": ((3, 1.0),)}, "instance 3; there are 0 to 0"),
    ],
)
def test_options_that_make_no_sense_name_the_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        make_options(**changes)


def test_a_large_change_is_reported_at_once_and_the_next_report_an_interval_later() -> None:
    trace = make_requests((0.25, 4, 400), (1.25, 400, 400))
    result = simulate(trace, make_options(report_interval_s=0.5, record_timeline=True))
    assert result.timeline is not None
    times = result.timeline.time_s
    first = int(np.argmax(result.timeline.num_used_blocks >= 100))
    # Not at 1.5 s; the small request before it waited for its turn.
    assert result.scheduled_s[1] <= times[first] < result.scheduled_s[1] + 0.001
    assert times[first + 1] == pytest.approx(times[first] + 0.5)
    assert times[:first].tolist() == pytest.approx([0.5, 1.0])


def test_the_size_of_what_would_move_next_is_looked_up_twice_a_second() -> None:
    trace = make_requests((0.0, 40, 200), (0.0, 8, 200))
    cluster = Cluster(trace, make_options(config=MOVING, until_s=1.05))
    cluster.run()
    (engine,) = cluster.engines
    # The shorter of the two; 20 tokens a second, of 4 a block.
    short = next(request for request in engine.running if request.num_prompt == 8)
    num_tokens = 8 + short.num_output - (short.finish_step - engine.progress_at(to_ps(1.05)))
    assert engine.victim_blocks is not None
    assert num_tokens / 4 - 4 <= engine.victim_blocks <= num_tokens / 4 + 1


def test_without_migration_nobody_asks_what_would_move_next() -> None:
    cluster = Cluster(make_requests((0.0, 40, 20)), make_options())
    cluster.run()
    assert cluster.engines[0].victim_blocks is None


def test_scaling_from_and_to_zero_holds_what_comes_while_an_instance_boots() -> None:
    scheduler = {
        "min_instances": 0,
        "max_instances": 2,
        "queue_timeout_s": 1.0,
        "scale_down_after_s": 5.0,
        "scale_down_cooldown_s": 5.0,
    }
    config = Config(policy="latency", scheduler=scheduler)
    # Ten seconds before anybody comes, a burst, a silence in which all is let go, and one more.
    trace = make_requests((10.0, 20, 20), (11.0, 20, 20), (60.0, 20, 20))
    result = simulate(trace, make_options(num_instances=0, config=config, boot_s=3.0))
    assert (result.status == RequestStatus.FINISHED).all()
    first, second = result.instances
    assert (first.launched_s, second.launched_s) == pytest.approx((10.0, 60.0))
    assert result.dispatched_s.tolist() == pytest.approx([13.0, 13.0, 63.0])
    idle_s = float(result.finished_s[1])
    assert idle_s + 5.0 <= first.gone_s < idle_s + 8.0


def test_a_step_takes_longer_while_others_of_its_machine_compute() -> None:
    machine = MachineSharing(num_instances=2, decodes_by_decodes=0.25, decodes_by_prompts=0.25)
    # The first two share a machine; the third is the only one of the next.
    trace = make_requests((0.0, 8, 100), (0.0, 8, 40), (0.0, 8, 40))
    apart = simulate(trace, make_options(num_instances=3))
    shared = simulate(trace, make_options(num_instances=3, hardware=make_hardware(machine=machine)))
    assert shared.instance.tolist() == [0, 1, 2]
    assert shared.finished_s[2] == apart.finished_s[2]
    # All its steps but the first, which begins when nobody yet knows of the other.
    beside = apart.finished_s[1] - apart.first_token_s[1]
    assert shared.finished_s[1] - shared.first_token_s[1] == pytest.approx(1.25 * beside)
    # While the other has something to do it loses a fifth; then it is at its own pace again.
    lost = shared.finished_s[0] - apart.finished_s[0]
    assert lost == pytest.approx(0.2 * (shared.finished_s[1] - shared.first_token_s[1]), abs=0.02)


def test_by_how_much_a_step_is_longer_depends_on_what_both_do() -> None:
    machine = MachineSharing(
        num_instances=2,
        decodes_by_decodes=0.5,
        decodes_by_prompts=0.3,
        prompts_by_decodes=0.2,
        prompts_by_prompts=0.1,
    )
    hardware = make_hardware(machine=machine, num_blocks=4000)
    alone = make_options(hardware=hardware, max_num_batched_tokens=4096)
    both = make_options(hardware=hardware, max_num_batched_tokens=4096, num_instances=2)
    decodes, prompt = (0.0, 8, 500), (2.0, 4000, 2)

    def prefill_s(options: SimulationOptions, *rows: tuple[float, int, int]) -> float:
        result = simulate(make_requests(*rows), options)
        return float((result.first_token_s - result.scheduled_s)[-1])

    by_itself = prefill_s(alone, prompt)
    assert prefill_s(both, decodes, prompt) == pytest.approx(by_itself * 1.2)
    # Nobody knows of the other's prompt before its own step has begun: so one begins earlier.
    beside_prompt = prefill_s(both, (1.9, 4000, 2), prompt)
    assert beside_prompt == pytest.approx(by_itself * 1.1)

    def gap_s(options: SimulationOptions, *rows: tuple[float, int, int]) -> float:
        return float(simulate(make_requests(*rows), options).itl_max_s[0])

    short = (0.0, 8, 30)
    slowed = gap_s(both, short, (0.3, 4000, 2)) / gap_s(alone, short)
    assert slowed == pytest.approx(1.3, rel=1e-3)


def test_an_instance_that_dies_slows_nobody_down() -> None:
    machine = MachineSharing(num_instances=2, decodes_by_decodes=1.0)
    # A second dies while its request is under way, and is not missed before all is over.
    trace = make_requests((0.0, 8, 60), (0.0, 8, 60))
    alone = simulate(make_requests((0.0, 8, 60)), make_options())
    result = simulate(
        trace,
        make_options(
            num_instances=2,
            hardware=make_hardware(machine=machine),
            failures=((1, 0.5),),
            failure_detection_s=100.0,
        ),
    )
    lost = result.finished_s[0] - alone.finished_s[0]
    assert lost == pytest.approx(0.25, abs=0.1)
