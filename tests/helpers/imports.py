"""The imports of Python files, read from their syntax trees: nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One imported module.

    importer: name of the importing module. target: name of the imported module. place: `file:line`.
    at_import: the statement runs when `importer` is imported (not inside a function, not under TYPE_CHECKING).
    """

    importer: str
    target: str
    place: str
    at_import: bool


def read_sources(root: Path, *folders: str) -> dict[str, tuple[str, str]]:
    """Module name to (path below `root`, text) of all Python files in `folders`."""
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return {module_name(path.relative_to(root)): (str(path.relative_to(root)), path.read_text()) for path in files}


def module_name(path: Path) -> str:
    """`nev/data/plan.py` is `nev.data.plan`; a package has the name of its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(sources: Mapping[str, tuple[str, str]]) -> list[Import]:
    """All imports of the sources, late ones and those under TYPE_CHECKING included.

    `from a import b` is an import of `a.b` where that is a module of `sources`, else of `a`.
    """
    found = []
    for importer, (path, text) in sources.items():
        for node, at_import in _statements(ast.parse(text, path), True):
            if isinstance(node, ast.Import):
                targets = [name.name for name in node.names]
            else:
                origin = node.module or ""
                if node.level:
                    package = importer if path.endswith("__init__.py") else importer.rpartition(".")[0]
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    origin = ".".join([*parents, *([node.module] if node.module else [])])
                whole = [f"{origin}.{name.name}" for name in node.names]
                targets = [name if name in sources else origin for name in whole]
            found += [Import(importer, target, f"{path}:{node.lineno}", at_import) for target in dict.fromkeys(targets)]
    return found


def _statements(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below `node`, and whether it runs at import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _statements(ast.Module([statement], []), False)
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []), at_import)
        else:
            yield from _statements(child, at_import)


def is_in(module: str, package: str) -> bool:
    """Whether a module is `package` or lies in it."""
    return module == package or module.startswith(f"{package}.")


def imported_with(module: str, imports: list[Import], modules: set[str]) -> dict[str, list[Import]]:
    """All that an import of `module` imports: target to the chain of imports that leads to it, the shortest.

    A package's own `__init__` is imported with each of its modules.
    """
    outgoing: dict[str, list[Import]] = {}
    for one in imports:
        if one.at_import:
            outgoing.setdefault(one.importer, []).append(one)
    chains: dict[str, list[Import]] = {}
    waiting: list[tuple[str, list[Import]]] = [(name, []) for name in _with_packages(module, modules)]
    for name, chain in waiting:
        for one in outgoing.get(name, []):
            if one.target not in chains:
                chains[one.target] = [*chain, one]
                waiting += [(package, [*chain, one]) for package in _with_packages(one.target, modules)]
    return chains


def find_circles(imports: list[Import], modules: set[str]) -> list[list[str]]:
    """Groups of modules that import each other, late imports included; each sorted."""
    outgoing: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports:
        if one.target in modules and one.target != one.importer:
            outgoing[one.importer].add(one.target)
    reachable = {module: _reachable(module, outgoing) for module in modules}
    groups = {
        tuple(sorted(other for other in modules if other in reachable[module] and module in reachable[other]))
        for module in modules
    }
    return sorted([list(group) for group in groups if group])


def _with_packages(module: str, modules: set[str]) -> list[str]:
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return [name for name in names if name in modules]


def _reachable(start: str, outgoing: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(outgoing[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += outgoing[module]
    return found
