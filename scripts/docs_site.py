"""Hooks of mkdocs: links of the pages to files of the repository, and what draws the diagrams.

In the repository a link to a file that is no page leads to it; the site, which has no address of
the repository, says its name instead. One to a file that is not there ends the build.

    python -m scripts.docs_site    fetches Mermaid from npm's registry, by npm

so that the site carries it, and nothing is fetched from elsewhere by whoever reads it. A site built
without it shows the diagrams as the text that they are made of.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CACHE = Path(os.environ.get("LLUMSCHED_CACHE_DIR", ROOT / ".cache")) / "mermaid"
MERMAID = CACHE / "mermaid.min.js"
VERSION = "11.17.2"
ON_THE_SITE = "assets/mermaid.min.js"
LINK = re.compile(r"(?<!!)\[(?P<said>[^\]]+)\]\((?P<path>\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Let the site draw the diagrams itself, or not at all."""
    if MERMAID.exists():
        config.extra_javascript.append(ON_THE_SITE)
    else:
        config.mdx_configs["pymdownx.superfences"]["custom_fences"] = []
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make a file of the site of the script that draws the diagrams."""
    from mkdocs.structure.files import File

    if MERMAID.exists():
        files.append(File.generated(config, ON_THE_SITE, abs_src_path=str(MERMAID)))
    return files


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


def fetch_mermaid() -> None:
    """Put Mermaid into the cache, if it is not there and there is npm."""
    if MERMAID.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        print("npm is not installed: the diagrams will be text", file=sys.stderr)
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run((npm, "pack", "--silent", f"mermaid@{VERSION}"), cwd=CACHE, check=True)
    packed = CACHE / f"mermaid-{VERSION}.tgz"
    with tarfile.open(packed) as archive:
        script = archive.extractfile("package/dist/mermaid.min.js")
        assert script is not None
        MERMAID.write_bytes(script.read())
    packed.unlink()


if __name__ == "__main__":
    fetch_mermaid()
