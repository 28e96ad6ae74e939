"""``llumsched hardware``, in the process of the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llumsched.cli import main
from tests.simulator.test_model_shape import DEEPSEEK_V3
from tests.simulator.test_odd_files import LLAMA


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "Llama-3.1-8B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA))
    return path


def test_what_ships_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware"]) == 0
    out = capsys.readouterr().out
    assert "h100-llama-3.1-8b" in out
    assert "a10-llama-30b" in out


def test_one_is_shown_with_its_times_and_where_they_are_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["hardware", "h100-llama-3.1-8b"]) == 0
    out = capsys.readouterr().out
    for said in ("27,793 blocks of 16", "aiconfigurator", "a step of 32 decodes", "measured up to"):
        assert said in out
    assert max(map(len, out.splitlines())) <= 100


def test_another_model_is_simulated_on_scaled_hardware(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "llama.yaml"
    flags = ["--model-config", str(config), "--num-kv-blocks", "4000", "--tensor-parallel", "2"]
    assert main(["hardware", "h100-llama-3.1-8b", *flags, "--out", str(out)]) == 0
    assert "Scaled from h100-llama-3.1-8b" in capsys.readouterr().out
    few = ["example", "--requests", "20", "--quiet", "--hardware", str(out)]
    assert main(["simulate", *few]) == 0
    assert "NOT MEASURED: llama: Scaled from" in capsys.readouterr().err
    assert "Llama-3.1-8B" in out.read_text()


def test_a_mixture_of_experts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V3))
    flags = ["--model-config", str(path), "--num-kv-blocks", "4000", "--tensor-parallel", "8"]
    assert main(["hardware", "h100-llama-3.1-8b", *flags]) == 1
    error = capsys.readouterr().err
    assert "a mixture of experts (256 in a layer) cannot be scaled" in error
    assert "llumsched profile" in error


def test_kernel_times_alone_are_said_with_every_result(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["example", "--requests", "5", "--quiet", "--hardware"]
    assert main(["simulate", *few, "h100-llama-3.1-8b"]) == 0
    assert "NO HOST TIME: h100-llama-3.1-8b" in capsys.readouterr().err
    assert main(["simulate", *few, "a10-llama-7b"]) == 0
    assert "NO HOST TIME" not in capsys.readouterr().err


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
