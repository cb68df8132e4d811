"""The docs name what exists, and the docs site builds, is complete, and asks no other host for anything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.docs import ROOT, SCHEMAS, config_reference

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w./-])(?:nev|tests|configs|pipelines|benchmarks|notebooks|docs)/[\w./-]*\w(?:\.\w+)?/?")
NAME = re.compile(r"(?<![\w./:@-])nev(?:\.[A-Za-z_]\w*)+(?![\w/-])")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Files that the reader makes: the docs say `cp configs/flickr8k.yaml configs/mine.yaml`.
READERS_OWN = {"configs/mine.yaml"}
# Dotted names that are no Python: a logger, MLflow's tags, and a file of an export.
NOT_PYTHON = re.compile(r"nev\.(storage$|continues_run$|start_fingerprint$|arm\.|alert\.|tail_rows$|json$)")


def missing_paths(text: str) -> list[str]:
    return [place for place in PATH.findall(text) if place not in READERS_OWN and not (ROOT / place).exists()]


def missing_names(text: str) -> list[str]:
    return [name for name in NAME.findall(text) if not NOT_PYTHON.match(name) and not exists(name)]


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name at the top of a module, or of a class there, by the sources alone."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:cut])
        source = next(filter(Path.is_file, (folder / "__init__.py", folder.with_suffix(".py"))), None)
        if source:
            return is_defined(ast.parse(source.read_text(encoding="utf-8")), parts[cut:])
    return False


def is_defined(scope: ast.AST, names: list[str]) -> bool:
    if not names:
        return True
    return any(is_defined(node, names[1:]) for node in getattr(scope, "body", []) if names[0] in defined_by(node))


def defined_by(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.If():  # imports for type checkers: the names of a package that is lazy
            return [name for inner in node.body for name in defined_by(inner)]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_the_docs_exists(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_in_the_docs_exists(page: Path) -> None:
    assert missing_names(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_in_the_docs_leads_to_a_file(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if ":" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_what_does_not_exist_is_seen() -> None:
    assert missing_paths("see `nev/train/trainer.py` and `nev/train/core/`, [x](nev/data/plan.py).") == [
        "nev/train/trainer.py"
    ]
    assert missing_paths("configs/absent.yaml, then --config configs/quickstart.yaml") == ["configs/absent.yaml"]
    named = "`nev.data.plan.Plan.make_window` nev.load_config nev.data.plan.Plan.absent nev.absent.x nev.data.plan.plan"
    assert missing_names(named) == ["nev.data.plan.Plan.absent", "nev.absent.x", "nev.data.plan.plan"]


class Requests(HTMLParser):
    """What a browser fetches for a page by itself, and the ids of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "link":
            self.fetched.append(values.get("href", ""))
        self.fetched += [values[name] for name in ("src", "srcset", "data", "poster", "action") if name in values]
        self.fetched += re.findall(r"url\(([^)]*)\)", values.get("style", ""))


def read_page(path: Path) -> Requests:
    page = Requests()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def other_hosts(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"""["']?\s*(?:https?:|wss?:)?//""", address)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason="mkdocs is not installed: make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_field_of_every_schema_is_on_the_reference_page(site: Path) -> None:
    reference, ids = config_reference(), read_page(site / "config.html").ids
    fields = [
        f"{schema.__name__.lower()}.{place}.{field}".replace("..", ".")
        for schema in map(reference.load_schema, SCHEMAS)
        for place, section in reference.sections(schema)
        for field in (info.alias or name for name, info in section.model_fields.items())
    ]
    assert len(fields) > 100
    assert [field for field in fields if field not in ids] == []


def test_every_command_is_on_its_page(site: Path) -> None:
    from nev.commands.main import COMMANDS

    ids = read_page(site / "commands.html").ids
    assert [name for name in COMMANDS if f"nev-{name}" not in ids] == []


def test_every_public_name_is_on_the_api_page(site: Path) -> None:
    import nev

    ids = read_page(site / "api.html").ids
    homes = {f"{getattr(nev, name).__module__}.{getattr(nev, name).__name__}" for name in nev.__all__ if name[0] != "_"}
    assert homes - ids == set()


def test_the_site_requests_nothing_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    fetched = {page.name: other_hosts(read_page(page).fetched) for page in pages}
    assert {name: hosts for name, hosts in fetched.items() if hosts} == {}
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert other_hosts(re.findall(r"url\(([^)]*)\)", text)) == []
        assert "@import" not in text


def test_a_request_to_another_host_is_seen() -> None:
    page = Requests()
    page.feed('<link href="https://fonts.example/x.css"><img src="a.png"><script src="//cdn.example/x.js"></script>')
    assert other_hosts(page.fetched) == ["https://fonts.example/x.css", "//cdn.example/x.js"]
