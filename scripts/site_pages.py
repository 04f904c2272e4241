"""What the site shows besides ``docs/``: a hook of mkdocs (``mkdocs.yml``).

README.md and other pages of the repository are pages of the site as well, written once. A link to
any other file of the repository takes that file along, so that every relative link works in both
places, and `mkdocs build --strict` finds the dead ones.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# The repository's file: the site's page.
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "measured.md",
    "recipes/README.md": "recipes.md",
    "SECURITY.md": "security.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of ``docs/``, and what pages link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page in list(files.documentation_pages()):
        for path, _ in LINK.findall(page.content_string):
            target = _target(page.src_uri, path)
            inside = target.startswith(("docs/", "..")) or target in PAGES
            if (
                not inside
                and (ROOT / target).is_file()
                and f"source/{target}" not in files.src_uris
            ):
                added = File.generated(config, f"source/{target}", abs_src_path=str(ROOT / target))
                files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""

    def turned(link: re.Match[str]) -> str:
        target = _target(page.file.src_uri, link[1])
        if target in PAGES:
            there = PAGES[target]
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        else:
            there = f"source/{target}"
        return posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".") + (
            link[2] or ""
        )

    return LINK.sub(turned, markdown)


def _target(page: str, link: str) -> str:
    """Return the repository's path that a page of the site links to."""
    source = SOURCES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
