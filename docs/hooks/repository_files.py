"""Files of the repository that a page links to (`../benchmarks/results/loss.json`) lie beside the pages in the built site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\[([^\]]*)\]\(\.\./([\w./-]+)\)")
FOLDER = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs' event: add the linked files."""
    root = Path(config.docs_dir).parent
    pages = [page.content_string for page in files.documentation_pages()]
    for place in sorted({place for page in pages for _, place in LINK.findall(page) if is_copied(root / place)}):
        files.append(File.generated(config, f"{FOLDER}/{place}", abs_src_path=str(root / place)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """mkdocs' event: point the links to the copies. Of a folder, or another page of the repository, the text stays."""
    root = Path(config.docs_dir).parent

    def rewrite(link: re.Match[str]) -> str:
        text, place = link.groups()
        if not (root / place).exists():
            return link[0]  # for --strict to refuse
        return f"[{text}]({FOLDER}/{place})" if is_copied(root / place) else text

    return LINK.sub(rewrite, markdown)


def is_copied(path: Path) -> bool:
    """Whether a link's target becomes a file of the site."""
    return path.is_file() and path.suffix != ".md"
