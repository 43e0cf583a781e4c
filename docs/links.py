"""What mkdocs runs while it builds the site: pages made of files outside docs/, and links that lead out of the site.

The README is the first page, and the formats' READMEs, CONTRIBUTING.md and CHANGELOG.md are pages too, so each text
exists once. A link to a file that is no page (a recipe, a module) becomes its name in code letters.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "shards/README.md": "reference/shards.md",
    "manifests/README.md": "reference/manifests.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside docs/, and the page that each becomes."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(docs/([^)]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages whose text lies outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link at the page that its file became."""
    place = page.file.src_uri
    source = {made: original for original, made in PAGES.items()}.get(place, f"docs/{place}")

    def pointed(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        named = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = PAGES.get(named, named.removeprefix("docs/") if named.startswith("docs/") else None)
        if found is None or files.get_file_from_path(found) is None:
            return text
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(place) or '.')}{anchor})"

    return _LINK.sub(pointed, _IMAGE.sub(r"![\1](\2)", markdown))
