"""``llumsched hardware``, in the process of the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llumsched.cli import main
from tests.simulator.test_model_shape import DEEPSEEK_V3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "DeepSeek-V3" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(DEEPSEEK_V3))
    return path


def test_what_ships_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware"]) == 0
    out = capsys.readouterr().out
    assert "h100-llama-3.1-8b" in out
    assert "a10-llama-30b" in out


def test_another_model_is_simulated_on_scaled_hardware(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deepseek.yaml"
    flags = ["--model-config", str(config), "--num-kv-blocks", "4000", "--tensor-parallel", "8"]
    assert main(["hardware", "h100-llama-3.1-8b", *flags, "--out", str(out)]) == 0
    assert "Scaled from h100-llama-3.1-8b" in capsys.readouterr().out
    few = ["example", "--requests", "20", "--quiet", "--hardware", str(out)]
    assert main(["simulate", *few]) == 0
    assert "NOT MEASURED: deepseek: Scaled from" in capsys.readouterr().err
    assert "DeepSeek-V3" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "no-such"),
        (["--model-config", "CONFIG"], "needs BASE"),
        (["a10-llama-7b", "--model-config", "CONFIG"], "--num-kv-blocks"),
        (
            ["a10-llama-7b", "--model-config", "CONFIG", "--num-kv-blocks", "0"],
            "num_blocks",
        ),
        (
            ["a10-llama-7b", "--model-config", "CONFIG", "--num-kv-blocks=9", "--out=x.txt"],
            "it must end in .yaml",
        ),
        (
            [
                "a10-llama-7b",
                "--model-config",
                "CONFIG",
                "--num-kv-blocks=9",
                "--tensor-parallel=7",
            ],
            "cannot be split over 7",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hardware", *(str(config) if a == "CONFIG" else a for a in arguments)]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    error = printed.err
    assert message in error
    assert error.count("\n") == 1
