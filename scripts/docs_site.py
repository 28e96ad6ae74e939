"""Hooks of mkdocs: links of the pages to files of the repository, which are no pages.

In the repository such a link leads to the file; the site, which has no address of the repository,
says its name instead. One to a file that is not there ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[(?P<said>[^\]]+)\]\((?P<path>\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page, with the names of files that lie outside the docs in the place of links."""
    return without_outside_links(markdown, DOCS / page.file.src_uri)


def without_outside_links(markdown: str, page: Path) -> str:
    """As ``on_page_markdown``, for the page at this path.

    Raises:
        FileNotFoundError: a link leads to nothing.
    """

    def named(match: re.Match[str]) -> str:
        target = (page.parent / match["path"]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.relative_to(ROOT)}: there is no {match['path']}")
        name = target.relative_to(ROOT).as_posix()
        said = match["said"]
        return said if said.strip("`") in (name, target.stem) else f"{said} (`{name}`)"

    return LINK.sub(named, markdown)
