"""Costs of steps and lengths of answers, learned from the load reports alone.

    step = base + prefill_token * prompt tokens + prefill_pair * attention pairs of the prompts
         + running * running requests + kv_token * tokens of context

Step time: one model a kind of instance, by least squares on relative errors, with forgetting; it
starts at the configured coefficients, and the reports of all instances of the kind teach it. Length
of answers: the hazard, that is ends by tokens decoded. A running request counts for every token so
far, not only once it has ended: where long answers are still under way, the mean of those that
ended is too short.

Invariants: coefficients are never negative; the same reports give the same model, so a replay
learns the same. This module does not know what the numbers are used for (`cluster_state`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llumsched.core.codec import from_plain, to_plain
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.step_time import MeasuredStep, StepTimeModel

Matrix = npt.NDArray[np.float64]

# Steps are told with relative errors of about this size.
_NOISE = 0.1
# A sample counts half as much once 400 came after it.
_FORGETTING = 0.5 ** (1 / 400)
# Beyond this many samples a kind takes one each so many seconds: reports come faster.
_MANY_SAMPLES = 200
_SAMPLE_INTERVAL_S = 0.05
# Less is no step, but a clock that stood still.
_SHORTEST_STEP_S = 1e-6
# Features are scaled so that the coefficients, in seconds, are of similar size.
_SCALE = np.array([1.0, 1e3, 1e6, 1e2, 1e5])
# How far from the configured coefficients the truth may be at first, in scaled seconds.
_PRIOR_STD = np.array([0.1, 0.5, 0.05, 0.05, 0.1])
# Ends after which the past counts half; and what is assumed before any.
_LENGTH_HALF_LIFE = 500.0
_PRIOR_OUTPUT_TOKENS = 256.0
# Longer silence is not counted as decoding.
_LONGEST_INTERVAL_S = 1.0


class StepTimeLearner:
    """The coefficients of one kind of instance."""

    def __init__(self, prior: StepTimeModel) -> None:
        configured = [
            prior.base_s,
            prior.prefill_token_s,
            prior.prefill_pair_s,
            prior.running_s,
            prior.kv_token_s,
        ]
        # What is configured is never forgotten, but outweighed: no direction is without a guess.
        self._prior_weight = np.diag(_PRIOR_STD**-2.0)
        self._prior_pull = self._prior_weight @ (np.array(configured) * _SCALE)
        self._weight = np.zeros((5, 5))
        self._pull = np.zeros(5)
        self.num_samples = 0
        self._next_s: float | None = None
        self.model = prior

    def observe(self, step: MeasuredStep, now: float) -> bool:
        """Learn from a step; whether it was taken in."""
        if step.seconds < _SHORTEST_STEP_S or (self._next_s is not None and now < self._next_s):
            return False
        if self.num_samples >= _MANY_SAMPLES:
            self._next_s = now + _SAMPLE_INTERVAL_S
        self.num_samples += 1
        x = np.array(
            [1.0, step.num_prefill_tokens, step.num_pairs, step.num_decodes, step.num_kv_tokens]
        )
        x /= _SCALE * step.seconds * _NOISE
        self._weight *= _FORGETTING
        self._weight += np.outer(x, x)
        self._pull *= _FORGETTING
        self._pull += x / _NOISE
        self.model = self._solved()
        return True

    def _solved(self) -> StepTimeModel:
        """The coefficients that fit best, without negative ones."""
        weight = self._weight + self._prior_weight
        pull = self._pull + self._prior_pull
        theta = np.linalg.solve(weight, pull)
        if theta.min() < 0:
            theta = _non_negative(weight, pull, theta)
        base, token, pair, running, kv_token = (theta / _SCALE).tolist()
        return StepTimeModel(
            base_s=base,
            prefill_token_s=token,
            prefill_pair_s=pair,
            running_s=running,
            kv_token_s=kv_token,
        )

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "weight": self._weight.tolist(),
            "pull": self._pull.tolist(),
            "num_samples": self.num_samples,
            "next_s": self._next_s,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._weight = np.array(state["weight"])
        self._pull = np.array(state["pull"])
        self.num_samples = state["num_samples"]
        self._next_s = state["next_s"]
        if self.num_samples:
            self.model = self._solved()


def _non_negative(weight: Matrix, pull: Matrix, theta: Matrix) -> Matrix:
    """The solution with the most negative coefficients, one after another, at zero."""
    free = np.ones(len(theta), dtype=np.bool_)
    while theta.min() < 0:
        free[theta.argmin()] = False
        rows = np.flatnonzero(free)
        theta = np.zeros(len(theta))
        if len(rows):
            theta[rows] = np.linalg.solve(weight[np.ix_(rows, rows)], pull[rows])
    return theta


@dataclass(frozen=True, slots=True)
class LearnedCosts:
    """Costs as they are known at some time."""

    step_time: StepTimeModel
    mean_output_tokens: float = _PRIOR_OUTPUT_TOKENS
    """Tokens that a running request is expected to produce yet."""


class CostModel:
    """All that is learned of a cluster."""

    def __init__(self, prior: StepTimeModel) -> None:
        self._prior = prior
        self.latest = LearnedCosts(prior)
        """As of the last report, for instances of its kind."""
        self._learners: dict[str, StepTimeLearner] = {}
        self._num_ends = 1.0
        self._num_tokens = _PRIOR_OUTPUT_TOKENS

    def _learner_of(self, spec: InstanceSpec) -> StepTimeLearner:
        # Instances of the same engine and memory are taken to be of one kind of hardware.
        kind = f"{spec.num_total_blocks}/{spec.block_size}/{spec.max_num_batched_tokens}"
        learner = self._learners.get(kind)
        if learner is None:
            learner = self._learners[kind] = StepTimeLearner(self._prior)
        return learner

    def reported(
        self,
        spec: InstanceSpec,
        before: InstanceLoad,
        elapsed_s: float,
        load: InstanceLoad,
        now: float,
    ) -> None:
        """Take in a report that came `elapsed_s` after the one before."""
        learner = self._learner_of(spec)
        if load.step is not None:
            learner.observe(load.step, now)
        if load.step_time_s > 0:
            decoded_s = min(elapsed_s, _LONGEST_INTERVAL_S)
            self._num_tokens += before.num_running * decoded_s / load.step_time_s
        self.latest = LearnedCosts(learner.model, self._num_tokens / self._num_ends)

    def ended(self) -> None:
        """A request has ended."""
        self._num_ends += 1.0
        if self._num_ends >= 2 * _LENGTH_HALF_LIFE:
            self._num_ends /= 2
            self._num_tokens /= 2

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "learners": {kind: learner.state() for kind, learner in self._learners.items()},
            "num_ends": self._num_ends,
            "num_tokens": self._num_tokens,
            "latest": to_plain(self.latest),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for kind, learned in state["learners"].items():
            self._learners[kind] = StepTimeLearner(self._prior)
            self._learners[kind].restore(learned)
        self._num_ends = state["num_ends"]
        self._num_tokens = state["num_tokens"]
        self.latest = from_plain(LearnedCosts, state["latest"])
