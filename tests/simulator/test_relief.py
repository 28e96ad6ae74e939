"""Scale-up relieves those that wait: they do not wait beside instances that are half empty."""

from __future__ import annotations

import dataclasses

import numpy as np

from llumsched.config import Config
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.records import RequestStatus
from llumsched.simulator.simulation import simulate
from tests.simulator.clusters import make_hardware, make_options, make_requests


def crowded(*, relieve_waiting: bool) -> SimulationOptions:
    scheduler = {
        "min_instances": 1,
        "max_instances": 6,
        "scale_up_after_s": 0.5,
        "scale_up_cooldown_s": 1.0,
        "relieve_waiting": relieve_waiting,
    }
    return make_options(
        hardware=make_hardware(num_blocks=100),
        config=dataclasses.replace(Config.default("latency"), scheduler=scheduler),
    )


def test_those_that_came_before_the_new_instances_do_not_wait_for_the_old_one() -> None:
    trace = make_requests(*[(0.02 * i, 60, 40) for i in range(150)])
    without = simulate(trace, crowded(relieve_waiting=False))
    result = simulate(trace, crowded(relieve_waiting=True))
    assert (result.status == RequestStatus.FINISHED).all()
    assert result.num_output_tokens.tolist() == trace.num_output_tokens.tolist()
    waits, waited = (r.first_token_s - trace.arrival_s for r in (result, without))
    assert np.percentile(waits, 99) < 0.7 * np.percentile(waited, 99)
