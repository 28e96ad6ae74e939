"""Traces that are made, not recorded: each generator by name, with one set of settings.

Everything is drawn from `seed`, so the same settings make the same trace. The paper's lengths are
the exception: they are the same for every seed, as they were for the paper, and the seed draws the
arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from llumsched.core.params import ParamError, check_params, param
from llumsched.plugins import unknown_name
from llumsched.simulator.traces.arrivals import gamma_arrivals
from llumsched.simulator.traces.clients import client_trace
from llumsched.simulator.traces.lengths import (
    PAPER_LENGTHS,
    PAPER_NUM_REQUESTS,
    PAPER_SEED,
    QUANTILE_LENGTHS,
    QuantileLengths,
    paper_lengths,
    quantile_lengths,
)
from llumsched.simulator.traces.sessions import session_trace
from llumsched.simulator.traces.trace import Floats, Trace, TraceError, make_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """Options of every generator."""

    rate_rps: float = param(4.0, "mean requests a second", above=0)
    cv: float = param(1.0, "coefficient of variation of the gaps; 1 is Poisson", above=0)
    num_requests: int = param(PAPER_NUM_REQUESTS, "requests to make", at_least=1)
    num_clients: int = param(50, "clients, or sessions at a time, where there are any", at_least=1)
    seed: int = param(0, "seed of whatever is drawn", at_least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A generator by name."""

    name: str
    summary: str
    make: Callable[[GeneratorOptions], Trace]


def generate(name: str, options: GeneratorOptions) -> Trace:
    """The trace that a generator makes.

    Raises:
        TraceError: there is no such generator, or an option is out of range.
    """
    try:
        check_params(options)
    except ParamError as error:
        raise TraceError(f"generator {name!r}: {error}") from error
    generator = GENERATORS.get(name)
    if generator is None:
        raise TraceError(unknown_name("generator", name, GENERATORS))
    return replace(generator.make(options), name=f"{name}@{options.rate_rps:g}")


def paper_trace(inputs: str, outputs: str, options: GeneratorOptions) -> Trace:
    """Lengths of the paper: one stream, the inputs first."""
    stream = np.random.RandomState(PAPER_SEED)
    num_prompt_tokens = paper_lengths(inputs, options.num_requests, stream)
    num_output_tokens = paper_lengths(outputs, options.num_requests, stream)
    notes = [_arrivals_note(options)]
    if options.num_requests != PAPER_NUM_REQUESTS:
        notes.append(
            f"{options.num_requests} requests: the paper's lengths are those of"
            f" {PAPER_NUM_REQUESTS}"
        )
    return make_trace(
        f"{inputs}-{outputs}",
        arrival_s=_arrivals(options),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        notes=tuple(notes),
    )


def quantile_trace(name: str, lengths: QuantileLengths, options: GeneratorOptions) -> Trace:
    """Lengths by quantiles."""
    rng = np.random.default_rng([options.seed, 1])
    return make_trace(
        name,
        arrival_s=_arrivals(options),
        num_prompt_tokens=quantile_lengths(lengths.prompt, options.num_requests, rng),
        num_output_tokens=quantile_lengths(lengths.output, options.num_requests, rng),
        notes=(
            _arrivals_note(options),
            "lengths drawn from published quantiles, prompt and output independent",
        ),
    )


def _clients(options: GeneratorOptions) -> Trace:
    return client_trace(
        rate_rps=options.rate_rps,
        num_requests=options.num_requests,
        num_clients=options.num_clients,
        seed=options.seed,
    )


def _sessions(options: GeneratorOptions) -> Trace:
    return session_trace(
        rate_rps=options.rate_rps,
        cv=options.cv,
        num_requests=options.num_requests,
        seed=options.seed,
    )


def _arrivals(options: GeneratorOptions) -> Floats:
    rng = np.random.default_rng([options.seed, 0])
    return gamma_arrivals(options.num_requests, rate_rps=options.rate_rps, cv=options.cv, rng=rng)


def _arrivals_note(options: GeneratorOptions) -> str:
    kind = "Poisson" if options.cv == 1.0 else f"Gamma (CV {options.cv:g})"
    return f"{kind} arrivals at {options.rate_rps:g} requests/s, seed {options.seed}"


def _paper(inputs: str, outputs: str) -> Generator:
    names = {"S": "short", "M": "medium", "L": "long"}
    return Generator(
        name=f"{inputs}-{outputs}",
        summary=f"{names[inputs]} prompts, {names[outputs]} outputs of Llumnix (OSDI '24)",
        make=lambda options: paper_trace(inputs, outputs, options),
    )


def _published(name: str, lengths: QuantileLengths) -> Generator:
    return Generator(
        name=name,
        summary=f"lengths by the published quantiles of {name}",
        make=lambda options: quantile_trace(name, lengths, options),
    )


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        generator.name: generator
        for generator in (
            *(_paper(inputs, outputs) for inputs in PAPER_LENGTHS for outputs in PAPER_LENGTHS),
            *(_published(name, lengths) for name, lengths in QUANTILE_LENGTHS.items()),
            Generator(
                name="clients",
                summary="many API clients, each with its own rate, burstiness and lengths",
                make=_clients,
            ),
            Generator(
                name="sessions",
                summary="multi-turn chats behind shared system prompts, at fixed arrivals",
                make=_sessions,
            ),
        )
    }
)
"""Every generator by name."""
