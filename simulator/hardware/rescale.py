"""From the times of one model on an accelerator to those of another model on the same.

Each coefficient is scaled by what it pays for: the tokens of a step by the parameters that compute
one, reading context and copying by the bytes of KV, prefill attention by heads and their size; with
more accelerators by tensor parallelism, each has its share. Nothing is said of what the shapes do
not tell: kernels that suit another shape less, communication between accelerators, nor the time
of the host. So the result has no fit error, and a note that says this.

Refused is what is known to come out wrong: a mixture of experts, of which a step reads as many as
its batch is sent to (scaled by the parameters that compute a token, it was 69 to 85 % off measured
runs), and a step shorter than the host of any engine needs to prepare one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llumsched.simulator.hardware.model_shape import ModelShape
from llumsched.simulator.hardware.spec import (
    CopyCoefficients,
    Hardware,
    HardwareError,
    KvCapacity,
    StepCoefficients,
)

LEAST_STEP_S = 1e-3
"""No engine of today begins a step more often, whatever the model."""

_NOTE = (
    "Scaled from {base} by shape: parameters a token x {compute:.3g}, KV bytes x {kv:.3g},"
    " attention x {attention:.3g}, on {accelerators:g} times its accelerators. None of it was"
    " measured; communication of tensor parallelism is not in it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """The other model, and how it is deployed.

    Args:
        shape: of the whole model.
        share: of one accelerator, where it is split over `num_accelerators` times as many as the
            base is; else the same.
        num_blocks: KV blocks as its engine counts them.
    """

    name: str
    model: str
    shape: ModelShape
    share: ModelShape
    num_accelerators: int = 1
    num_blocks: int
    block_size: int


def rescale(base: Hardware, other: Other) -> Hardware:
    """The hardware file of the other model.

    Raises:
        HardwareError: the base does not say the shape of its model, or what comes out would be
            wrong.
    """
    if other.shape.num_experts:
        raise HardwareError(
            f"{other.model}: a mixture of experts ({other.shape.num_experts} in a layer) cannot be"
            " scaled from a dense model: which experts a step reads depends on its batch. Measure"
            " it: 'llumsched profile' writes its file"
        )
    if base.shape is None:
        raise HardwareError(
            f"{base.name} does not say what its model computes: give it a section 'shape' with"
            " activated_parameters and attention_width"
        )
    share = other.share
    compute = share.compute.activated_parameters / base.shape.activated_parameters
    attention = share.compute.attention_width / base.shape.attention_width
    kv = share.kv_bytes_per_token / base.kv.bytes_per_token
    step, copy = base.step, base.copy
    note = _NOTE.format(
        base=base.name,
        compute=compute,
        kv=kv,
        attention=attention,
        accelerators=other.num_accelerators,
    )
    shortest_s = step.host_s + compute * _shortest_token_part_s(step)
    if shortest_s < LEAST_STEP_S:
        raise HardwareError(
            f"{other.model}: a step would take {1e3 * shortest_s:.2g} ms, less than the host of an"
            f" engine needs to prepare one (about {1e3 * LEAST_STEP_S:g} ms), which"
            f" {base.name} does not have in it (host_s: {step.host_s:g}). Measure it: 'llumsched"
            " profile' writes its file"
        )
    several = f"{other.num_accelerators} x " if other.num_accelerators > 1 else ""
    return dataclasses.replace(
        base,
        name=other.name,
        model=other.model,
        accelerator=several + base.accelerator,
        fit_error=float("nan"),
        kv=KvCapacity(
            num_blocks=other.num_blocks,
            block_size=other.block_size,
            bytes_per_token=other.shape.kv_bytes_per_token,
        ),
        step=dataclasses.replace(
            step,
            floor_s=_rounded(step.floor_s * compute),
            token_s=_rounded(step.token_s * compute),
            table=tuple((tokens, _rounded(seconds * compute)) for tokens, seconds in step.table),
            kv_token_s=_rounded(step.kv_token_s * kv),
            skew_token_s=_rounded(step.skew_token_s * kv),
            prefill_pair_s=_rounded(step.prefill_pair_s * attention),
        ),
        copy=CopyCoefficients(base_s=copy.base_s, token_s=_rounded(copy.token_s * kv)),
        shape=other.shape.compute,
        notes=(note, *base.notes),
    )


def _shortest_token_part_s(step: StepCoefficients) -> float:
    """The tokens of the smallest step."""
    if step.table:
        return min(seconds for _, seconds in step.table)
    return max(step.floor_s, step.token_s)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
