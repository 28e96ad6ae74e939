"""Parts of the docs about the code come from the code."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from llumsched import cli
from llumsched.core.migration.destination import rules as migration_destination_rules
from llumsched.core.migration.source import rules as migration_rules
from llumsched.core.migration.table import TransitionTable
from scripts import generate_docs


def test_no_page_is_behind_the_code() -> None:
    stale = generate_docs.stale_pages(generate_docs.DOCS)
    assert not stale, f"`make docs` writes again: {', '.join(str(page) for page in stale)}"


def test_every_generated_part_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in generate_docs.DOCS.rglob("*.md"))
    assert [name for name in generate_docs.PARTS if f"<!-- generated: {name} -->" not in text] == []


@pytest.mark.parametrize(
    "table", [migration_rules.TABLE, migration_destination_rules.TABLE], ids=["source", "dest"]
)
def test_the_transitions_list_every_rule(table: TransitionTable) -> None:  # type: ignore[type-arg]
    text = generate_docs.transitions(table)
    rules_of_each = sum(len(rules) for rules in table.rules.values())
    assert text.split("Late or doubled")[0].count("\n| ") - 1 == rules_of_each


def commands_of(page: Path) -> list[str]:
    """The commands of ours in the code blocks of a page, each on one line."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]
    # A picture may begin with the name of a command as well.
    return [x for x in found if re.match(r"llumsched [a-z]+( |$)", x) and x.isascii()]


PAGES = [generate_docs.DOCS.parent / "README.md", *sorted(generate_docs.DOCS.rglob("*.md"))]


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands_of(page)})
)
def test_every_command_on_a_page_is_one(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    module = importlib.import_module(f"llumsched.commands.{name}")
    if getattr(module, "PASSTHROUGH", False):
        pytest.skip("its flags are vLLM's")
    cli._parser(chosen=name, module=module).parse_args([name, *arguments])


@pytest.mark.slow
def test_the_first_simulation_shows_what_migration_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README and the page on simulating have it."""
    monkeypatch.chdir(tmp_path)
    readme, simulating = (
        next(c for c in commands_of(page) if c.startswith("llumsched simulate"))
        for page in (PAGES[0], generate_docs.DOCS / "simulator.md")
    )
    assert readme == simulating
    assert cli.main([*shlex.split(readme)[1:], "--quiet", "--out", "results"]) == 0
    runs = json.loads(Path("results/summary.json").read_text())["runs"]
    moving, *dispatching = [run["summary"] for run in runs]
    assert runs[0]["policy"] == "adaptive"
    assert moving["num_migrations"] > 0
    for other in dispatching:
        assert other["num_migrations"] == 0
        assert 10 * moving["itl_max_s"]["p99"] < other["itl_max_s"]["p99"]
        assert 5 * moving["num_preemptions"] < other["num_preemptions"]
        assert moving["tpot_s"]["p99"] < other["tpot_s"]["p99"]
        assert moving["ttft_s"]["mean"] < 1.05 * other["ttft_s"]["mean"]


def test_prose_around_a_generated_part_stays() -> None:
    page = "before\n<!-- generated: policies -->\nold\n<!-- end of policies -->\nafter\n"
    written = generate_docs.regenerate(page)
    assert written.startswith("before\n<!-- generated: policies -->\n## Bundle")
    assert written.endswith("<!-- end of policies -->\nafter\n")
    assert generate_docs.regenerate(written) == written


def test_a_part_that_nothing_generates_is_an_error() -> None:
    with pytest.raises(KeyError, match="no such part"):
        generate_docs.regenerate("<!-- generated: no such part -->\n<!-- end of no such part -->")


def test_check_names_the_page_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    old = "<!-- generated: policies -->\n<!-- end of policies -->\n"
    page.write_text(old)
    monkeypatch.setattr(generate_docs, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate_docs", "--check"])
    assert generate_docs.main() == 1
    assert str(page) in capsys.readouterr().out
    assert page.read_text() == old
