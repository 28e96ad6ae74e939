"""A companion of torch that cannot load is one sentence with the command that mends it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from llumsched.commands import CommandError
from llumsched.commands._torch_addons import check_torch_addons


class Installed:
    """Distributions with their versions; the modules of some cannot be imported."""

    def __init__(self, versions: dict[str, str], broken: tuple[str, ...] = ()) -> None:
        self.versions, self.broken = versions, broken
        self.loaded: list[str] = []

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise PackageNotFoundError(name)
        return self.versions[name]

    def load(self, name: str) -> None:
        self.loaded.append(name)
        if name in self.broken:
            raise RuntimeError("operator torchvision::nms does not exist")


def test_builds_for_cuda_beside_a_cpu_torch() -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchcodec": "0.14.0"}
    here = Installed(versions, broken=("torchvision", "torchcodec"))
    with pytest.raises(CommandError, match="cannot be loaded") as raised:
        check_torch_addons(here.version, here.load)
    assert str(raised.value).endswith("python -m pip uninstall --yes torchvision torchcodec")


def test_builds_that_load_are_left_alone() -> None:
    here = Installed({"torch": "2.13.0+cpu", "torchaudio": "2.13.0"})
    check_torch_addons(here.version, here.load)
    assert here.loaded == ["torchaudio"]


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"torch": "2.13.0", "torchvision": "0.28.0"},
        {"torch": "2.13.0+cpu"},
        {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"},
    ],
)
def test_nothing_is_imported_where_nothing_can_be_wrong(versions: dict[str, str]) -> None:
    here = Installed(versions, broken=("torchvision",))
    check_torch_addons(here.version, here.load)
    assert not here.loaded
