"""One pair of model and accelerator, measured: what a step and a copy take, and how much KV fits.

    step = host + max(floor, token * batch tokens)      or a table over the batch tokens
         + request * requests + kv_token * context tokens read by the decodes
         + skew_token * (requests * longest context - sum of contexts)
         + prefill_pair * pairs of a prompt token and a token it attends to
    copy of n tokens of KV = base + token * n
    a step beside others on its machine is longer by a share that depends on what they do

Every term but those of a prompt is linear in the number of steps while a batch does not change;
this is what lets `cost` sum many steps at once.

Invariants: a file that loads has every key it must have and none that is unknown; coefficients are
in seconds; the capacity is a number of blocks that somebody counted, never a guess from memory
sizes. This module does not know how the numbers were fitted, or what a batch is made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llumsched.core.params import LARGEST, ParamError, check_param, check_params, param, params_of
from llumsched.plugins import unknown_name
from llumsched.yaml_file import YamlFileError, read_yaml

_IN_WHEEL = Path(__file__).parents[1] / "hardware_files"
_IN_CHECKOUT = Path(__file__).resolve().parents[2] / "configs" / "hardware"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
"""Where the hardware files that ship are: `configs/hardware`, of which a wheel has a copy."""


class HardwareError(ValueError):
    """A hardware file cannot be used; the message names file, key and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """Duration of one engine step, in seconds; see the module docstring for the formula."""

    host_s: float = param(0.0, "What a step takes before any token.", at_least=0)
    floor_s: float = param(0.0, "Least time for the tokens: the weights are read.", at_least=0)
    token_s: float = param(0.0, "Each token computed in the step.", at_least=0)
    request_s: float = param(0.0, "Each request in the step.", at_least=0)
    kv_token_s: float = param(0.0, "Each token of context that a decode reads.", at_least=0)
    skew_token_s: float = param(
        0.0, "Each token by which a context is shorter than the longest of the batch.", at_least=0
    )
    prefill_pair_s: float = param(
        0.0, "Each pair of a prompt token and a token it attends to (half its square).", at_least=0
    )
    table: tuple[tuple[int, float], ...] = ()
    """(tokens in the step, seconds) in rising order; where given it replaces floor and token, and
    is interpolated linearly, and continued at the slope of its last two points."""
    copy_slowdown: float = param(
        0.0, "Share by which a step is longer while the instance sends or receives KV.", at_least=0
    )

    def __post_init__(self) -> None:
        for described in params_of(type(self)):
            if described.name != "table":
                check_param(described, getattr(self, described.name))
        tokens = [point[0] for point in self.table]
        if len(tokens) == 1 or tokens != sorted(set(tokens)):
            raise ParamError("table", "table must have two points or more, in rising order")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCoefficients:
    """Duration of copying KV between two instances: `base_s + token_s * tokens`."""

    base_s: float = param(0.0, "What a copy takes before the first token.", at_least=0)
    token_s: float = param(0.0, "Each token of KV.", at_least=0)

    def __post_init__(self) -> None:
        check_params(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCapacity:
    """KV cache of one instance."""

    num_blocks: int = param(1, "Blocks that hold tokens, as the engine counted them.", at_least=1)
    block_size: int = param(16, "Tokens of one block.", at_least=1)
    bytes_per_token: int = param(1, "Bytes of KV of one token.", at_least=1)

    def __post_init__(self) -> None:
        check_params(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSharing:
    """Slowdown of instances of one machine by one another: cores, memory bandwidth, power.

    Each slowdown is the share by which a step is longer while all other instances of the machine do
    this; proportionally less while some do.
    """

    num_instances: int = param(1, "Instances that run on one machine.", at_least=1)
    decodes_by_decodes: float = param(
        0.0, "A step that only decodes, while the others only decode.", at_least=0
    )
    decodes_by_prompts: float = param(
        0.0, "A step that only decodes, while the others compute prompts.", at_least=0
    )
    prompts_by_decodes: float = param(
        0.0, "A step that computes prompts, while the others only decode.", at_least=0
    )
    prompts_by_prompts: float = param(
        0.0, "A step that computes prompts, while the others do so too.", at_least=0
    )

    def __post_init__(self) -> None:
        check_params(self)
        if self.is_felt and self.num_instances == 1:
            raise ParamError("num_instances", "slowdowns need num_instances of 2 or more")

    @property
    def is_felt(self) -> bool:
        """True if any step is longer for it."""
        return any(self.slowdowns(1, 1))

    def slowdowns(self, num_decoding: int, num_prompting: int) -> tuple[float, float]:
        """Of a step that only decodes and of one with prompts, beside so many that only decode and
        so many that compute prompts."""
        num_others = max(1, self.num_instances - 1)
        decoding, prompting = num_decoding / num_others, num_prompting / num_others
        return (
            decoding * self.decodes_by_decodes + prompting * self.decodes_by_prompts,
            decoding * self.prompts_by_decodes + prompting * self.prompts_by_prompts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeShape:
    """Computation of the model, on all its accelerators together; `rescale` goes by it."""

    activated_parameters: int = param(
        1,
        "Parameters that compute one token: of routed experts only those that it is sent to, of the"
        " embeddings only the language-model head.",
        at_least=1,
    )
    attention_width: int = param(
        1, "Sum over layers and heads of the mean size of a key and a value.", at_least=1
    )

    def __post_init__(self) -> None:
        check_params(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRange:
    """Largest values at which the coefficients were measured; beyond them they extrapolate."""

    batch_tokens: int = param(1, "Tokens in one step.", at_least=1)
    requests: int = param(1, "Requests in one step.", at_least=1)
    kv_tokens: int = param(1, "Tokens of context read in one step.", at_least=1)

    def __post_init__(self) -> None:
        check_params(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A model on an accelerator. `fit_error` is the mean relative error of the fit to its source;
    NaN where the source gives the coefficients themselves."""

    name: str
    model: str
    accelerator: str
    source: str
    fit_error: float
    kv: KvCapacity
    step: StepCoefficients
    copy: CopyCoefficients
    measured: MeasuredRange
    shape: ComputeShape | None = None
    machine: MachineSharing = MachineSharing()
    """The default: nobody shares anything with an instance."""
    boot_s: float = 60.0
    """Seconds from the launch of an instance until it serves."""
    notes: tuple[str, ...] = ()
    """Notes for a reader of results: terms that were not in the source, doubts."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of KV that an instance holds."""
        return self.kv.num_blocks * self.kv.block_size


_SECTIONS: Mapping[str, type] = {
    "kv": KvCapacity,
    "step": StepCoefficients,
    "copy": CopyCoefficients,
    "measured": MeasuredRange,
    "shape": ComputeShape,
    "machine": MachineSharing,
}


def available(folder: Path = FOLDER) -> tuple[str, ...]:
    """The names of the hardware files in a folder."""
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def load_hardware(name_or_path: str | Path, folder: Path = FOLDER) -> Hardware:
    """The hardware of this file, or of this name in `folder`.

    Raises:
        HardwareError: there is no such file, or something in it is wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = folder / f"{name_or_path}.yaml"
        if not path.exists():
            names = dict.fromkeys(available(folder))
            raise HardwareError(unknown_name(f"hardware in {folder}", str(name_or_path), names))
    try:
        data = read_yaml(path)
    except YamlFileError as error:
        raise HardwareError(str(error)) from error
    return hardware_from_plain(data, str(path))


def hardware_from_plain(data: Any, source: str) -> Hardware:
    """`load_hardware`, for values that were read already; `source` names them in errors.

    Raises:
        HardwareError: a key is missing or unknown, or a value is of the wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    values = _mapping(data, "the file", source)
    _check_keys(values, fields, "hardware file", source)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise HardwareError(f"{source}: {name!r} is missing")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name in _SECTIONS:
            made[name] = _section(_SECTIONS[name], name, value, source)
        elif name in ("fit_error", "boot_s"):
            if type(value) not in (int, float) or value < 0 or value > LARGEST:
                raise HardwareError(f"{source}: {name} must be a number of at least 0 (or .nan)")
            made[name] = float(value)
        elif name == "notes":
            if not isinstance(value, list) or not all(isinstance(note, str) for note in value):
                raise HardwareError(f"{source}: notes must be a list of strings")
            made[name] = tuple(value)
        elif not isinstance(value, str) or not value:
            raise HardwareError(f"{source}: {name} must be text, not {value!r:.60}")
        else:
            made[name] = value
    return Hardware(**made)


def _section(cls: type, name: str, data: Any, source: str) -> Any:
    values = dict(_mapping(data, name, source))
    known = {described.name: described for described in params_of(cls)}
    _check_keys(values, known, name, source)
    if "table" in values:
        values["table"] = _table(values["table"], source)
    try:
        for key, value in values.items():
            if key != "table":
                values[key] = check_param(known[key], value)
        return cls(**values)
    except ParamError as error:
        raise HardwareError(f"{source}: {name}: {error}") from error


def _table(data: Any, source: str) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(tokens), float(seconds)) for tokens, seconds in data)
    except (TypeError, ValueError, OverflowError) as error:
        raise HardwareError(
            f"{source}: step: table must be a list of [tokens, seconds]: {error}"
        ) from error


def _mapping(data: Any, what: str, source: str) -> Mapping[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise HardwareError(f"{source}: {what} must be a mapping (key: value)")
    return data


def _check_keys(
    values: Mapping[str, Any], known: Mapping[str, object], what: str, source: str
) -> None:
    for key in values:
        if key not in known:
            raise HardwareError(f"{source}: {unknown_name(f'key in {what}', key, known)}")
