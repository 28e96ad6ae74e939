"""The recipe for a transport, done as it says: its file written, its line added, blocks moved."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import llumsched
from llumsched.core.transfer_options import TRANSPORTS, TransferOptions
from llumsched.engine.transfer.transport import Unavailable
from tests.engine.transfer_ends import Ends, block, blocks_of, instance, random_blocks

PAGE = Path(llumsched.__file__).parents[1] / "docs" / "extending.md"


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, section = PAGE.read_text().partition("\n## A transport\n")
    (file,) = re.findall(r"<!-- file: files.py -->\n```python\n(.*?)```", section, re.DOTALL)
    ((name, target),) = re.findall(r'^    "(\w+)": "(\S+)",\n', section, re.MULTILINE)
    (tmp_path / "recipe_files.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRANSPORTS, name, "recipe_files:" + target.partition(":")[2])

    async def follow() -> None:
        with instance(random_blocks(1)) as source, instance(random_blocks(2)) as destination:
            with pytest.raises(Unavailable, match="files: LLUMSCHED_KV_FOLDER is ''"):
                await Ends.meet(source, destination, name)
            folder = tmp_path / "shared"
            folder.mkdir()
            monkeypatch.setenv("LLUMSCHED_KV_FOLDER", str(folder))
            ends = await Ends.meet(source, destination, name)
            await ends.move([0, 3, 5], [7, 1, 2])
            theirs, ours = blocks_of(source), blocks_of(destination)
            assert [block(ours, i) for i in (7, 1, 2)] == [block(theirs, i) for i in (0, 3, 5)]
            assert not list(folder.iterdir())
            ends.close()

    asyncio.run(follow())


def test_its_choice_is_that_of_the_table() -> None:
    with pytest.raises(ValueError, match=r"transport.*auto.*shared_memory.*tcp"):
        TransferOptions(transport="pigeons")
