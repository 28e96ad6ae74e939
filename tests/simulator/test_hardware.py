"""Hardware files: strict, and the ones that ship say what their source says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llumsched.simulator.engines.cost import StepCost, copy_ps
from llumsched.simulator.hardware.spec import (
    HardwareError,
    available,
    hardware_from_plain,
    load_hardware,
)
from llumsched.simulator.kernel import to_s

FOLDER = Path(__file__).parents[2] / "configs" / "hardware"


def plain(**changes: Any) -> dict[str, Any]:
    """The 7B file as values, changed."""
    data: dict[str, Any] = yaml.safe_load((FOLDER / "a10-llama-7b.yaml").read_text())
    return {**data, **changes}


@pytest.mark.parametrize("name", available(FOLDER))
def test_every_file_that_ships_loads(name: str) -> None:
    hardware = load_hardware(name, FOLDER)
    assert hardware.name == name
    assert hardware.num_kv_tokens == hardware.kv.num_blocks * hardware.kv.block_size


def test_the_7b_file_gives_the_figures_of_its_source() -> None:
    hardware = load_hardware("a10-llama-7b", FOLDER)
    cost = StepCost(hardware.step, 12_000)
    for n in (256, 1024, 4096):
        prefill = cost.step(
            num_prefill_tokens=n, twice_prefill_pairs=n * n, num_decodes=0, num_kv_tokens=0
        )
        assert to_s(prefill) == pytest.approx(5.6e-3 + 0.203e-3 * n + 5.1e-9 * n * n)
        assert to_s(copy_ps(hardware.copy, n)) == pytest.approx(15e-3 + 0.211e-3 * n)
    for b in (1, 16, 64):
        decode = cost.step(
            num_prefill_tokens=0, twice_prefill_pairs=0, num_decodes=b, num_kv_tokens=8192
        )
        assert to_s(decode) == pytest.approx(43.2e-3 + 0.27e-3 * b, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stpe": {}}, "'stpe'; did you mean 'step'?"),
        ({"kv": {"num_block": 3}}, "'num_block'; did you mean 'num_blocks'?"),
        ({"kv": {"num_blocks": 0}}, "num_blocks must be at least 1, not 0"),
        ({"step": {"token_s": "fast"}}, "token_s must be float, not str 'fast'"),
        ({"step": {"table": [[5, 0.1]]}}, "two points or more"),
        ({"step": {"table": [[5, 0.1], [4, 0.2]]}}, "rising order"),
        ({"step": {"table": [5]}}, "list of \\[tokens, seconds\\]"),
        ({"boot_s": -1}, "boot_s must be a number"),
        ({"notes": "one"}, "notes must be a list"),
        ({"source": ""}, "source must be text"),
        ({"kv": 3}, "kv must be a mapping"),
        ({"machine": {"prompts_by_decodes": 0.2}}, "slowdowns need num_instances of 2 or more"),
    ],
)
def test_a_mistake_names_file_key_and_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HardwareError, match=f"^mine.yaml: .*{message}"):
        hardware_from_plain(plain(**changes), "mine.yaml")


def test_a_missing_key_is_named() -> None:
    data = plain()
    del data["measured"]
    with pytest.raises(HardwareError, match="'measured' is missing"):
        hardware_from_plain(data, "mine.yaml")


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(HardwareError, match="did you mean 'a10-llama-7b'"):
        load_hardware("a10-llama-7", FOLDER)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="cannot be read"):
        load_hardware(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(HardwareError, match="not YAML"):
        load_hardware(broken)
