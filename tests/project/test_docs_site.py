"""The documentation is a site without a dead link, and the README leads into it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import docs_site
from scripts.docs_site import without_outside_links
from tests.wheels import ROOT

pytest.importorskip("mkdocs")

TWO_SCREENS = 90
# A path from the top of the checkout, as code; one of the HTTP API begins with a slash.
FILE = re.compile(
    r"`((?:benchmarks|configs|llumsched|policies|scripts|simulator|tests)/[a-z0-9_./-]+)`"
)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)]*))?\)")


class Ids(HTMLParser):
    """Everything that an anchor of a page can lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attrs if name == "id" and value}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs-site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_of_the_readme_leads_somewhere(site: Path) -> None:
    links = list(LINK.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(links) > 20
    for link in links:
        path = ROOT / link["path"]
        assert path.exists(), link[0]
        if link["anchor"]:
            page = site / path.relative_to(ROOT / "docs").with_suffix(".html")
            assert link["anchor"] in Ids(page).found, link[0]


def test_every_page_is_in_the_navigation_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert f'href="{name}"' in home or name == "index.html", name
    assert not re.findall(r'(?:<script|<link)[^>]*(?:src|href)="https?:', home)
    # The theme fetches what draws diagrams only where a page has one and Mermaid is not there.
    assert docs_site.MERMAID.exists() == (site / docs_site.ON_THE_SITE).exists()
    for page in site.rglob("*.html"):
        has_diagram = 'class="mermaid"' in page.read_text(encoding="utf-8")
        assert docs_site.MERMAID.exists() or not has_diagram, page


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda path: path.name,
)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= TWO_SCREENS


def test_a_file_beside_the_docs_is_named_where_it_cannot_be_reached() -> None:
    page = ROOT / "docs" / "index.md"
    assert without_outside_links("see [the core](../llumsched/core).", page) == (
        "see the core (`llumsched/core`)."
    )
    assert without_outside_links("[README](../README.md)", page) == "README"
    assert without_outside_links("[x](../docs/faq.md)", page) == "[x](../docs/faq.md)"
    with pytest.raises(FileNotFoundError, match=r"docs/index.md: there is no \.\./gone"):
        without_outside_links("[x](../gone)", page)
