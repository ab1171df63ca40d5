"""Reads who imports whom out of source files: import statements wherever they stand, and module names in strings.

Nothing is imported, so that what a machine lacks doesn't hide an import. Imports in functions and under TYPE_CHECKING
count: a reader follows them as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "qwen_aot"
FACE = "__init__"  # the package's own module
_MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+")


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a module of ours.

    Attributes:
        importer: module that imports, dotted, without the package's name: "engines.build".
        imported: the same of what is imported.
        place: the file and the line.
        runs_on_import: it stands at the module's top and not under TYPE_CHECKING.
        is_entry: a name in a table, for whoever looks it up; the table's module doesn't need what it names.
    """

    importer: str
    imported: str
    place: str
    runs_on_import: bool
    is_entry: bool = False


def read_imports(root: Path) -> list[Import]:
    """Every import among the modules of a package's folder, links followed.

    Args:
        root: holds the package's `__init__.py`.
    """
    files = {_module_name(path.relative_to(root)): path for path in _python_files(root)}
    return [
        found
        for importer, path in files.items()
        for found in _imports(path, str(path.relative_to(root)), importer, files)
        if found.imported != importer
    ]


def _python_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":  # is_dir follows the links to the four folders
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or FACE


def _imports(path: Path, shown: str, importer: str, files: Mapping[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_package = path.name == "__init__.py"
    called = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and _imports_by_name(node)}
    for node, runs_on_import in _nodes(tree, True):
        is_entry = False
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = _base(node, importer, is_package)
                names = [f"{base}.{alias.name}" for alias in node.names]
            case ast.Constant(value=str(text)) if _MODULE_NAME.fullmatch(text):
                names, is_entry = [text] if text.partition(".")[2] in files else [], id(node) not in called
            case _:
                continue
        for name in names:
            if (module := _module_of(name, files)) is not None:
                yield Import(importer, module, f"{shown}:{node.lineno}", runs_on_import and not is_entry, is_entry)


def _imports_by_name(call: ast.Call) -> bool:
    return bool(call.args) and ast.unparse(call.func).endswith(("import_module", "__import__"))


def _nodes(tree: ast.AST, runs_on_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    later = {id(node) for node in _bodies_run_later(tree)}
    for child in ast.iter_child_nodes(tree):
        runs = runs_on_import and id(child) not in later
        yield child, runs
        yield from _nodes(child, runs)


def _bodies_run_later(node: ast.AST) -> list[ast.AST]:
    """Children that don't run with their parent: a function's body (its decorators and defaults do), type checkers'."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return list(node.body)
        case ast.Lambda():
            return [node.body]
        case ast.If() if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return list(node.body)
        case _:
            return []


def _base(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = [PACKAGE] if importer == FACE else [PACKAGE, *importer.split(".")]
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _module_of(name: str, files: Mapping[str, Path]) -> str | None:
    """The module of ours that a dotted name stands in; None: it is another's, or the package itself."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 1, -1):
        if (module := ".".join(parts[1:end])) in files:
            return module
    return FACE


def is_within(module: str, place: str) -> bool:
    """Whether a module is `place`, or lies in that folder; the place "" is everywhere."""
    return not place or module == place or module.startswith(place + ".")


@dataclass(frozen=True, slots=True)
class Arrow:
    """A permission: modules of `source` may import those of `target`.

    Attributes:
        source: a module or a folder.
        target: the same.
        reason: why that is right.
        in_functions_only: an import there must not run when the module is imported.
        in_tables_only: names in a table, for whoever looks them up.
    """

    source: str
    target: str
    reason: str
    in_functions_only: bool = False
    in_tables_only: bool = False


def forbidden(imports: Iterable[Import], arrows: Sequence[Arrow], folders: Sequence[str]) -> list[str]:
    """What no arrow permits, one line each; imports within one of `folders` are free.

    Args:
        imports: of the tree.
        arrows: what is allowed between folders.
        folders: the units of the rule; a module that lies in none is a unit of its own.
    """
    found = []
    for entry in imports:
        if unit_of(entry.importer, folders) == unit_of(entry.imported, folders):
            continue
        fitting = [
            arrow
            for arrow in arrows
            if is_within(entry.importer, arrow.source)
            and is_within(entry.imported, arrow.target)
            and (entry.is_entry or not arrow.in_tables_only)
        ]
        if not fitting:
            found.append(f"{entry.place}: {entry.importer} imports {entry.imported}, and no arrow allows it")
        elif entry.runs_on_import and all(arrow.in_functions_only for arrow in fitting):
            found.append(f"{entry.place}: {entry.importer} imports {entry.imported} at its top: do it in a function")
    return found


def unit_of(module: str, folders: Sequence[str]) -> str:
    """The innermost of `folders` that a module lies in, or itself."""
    return max((folder for folder in folders if is_within(module, folder)), key=len, default=module)


def downwards(layers: Sequence[tuple[str, str]]) -> list[Arrow]:
    """Arrows from each layer to all below it.

    Args:
        layers: (units, reason) from the lowest up; units at one height, "a | b", don't know each other.
    """
    heights = [(units.split(" | "), reason) for units, reason in layers]
    return [
        Arrow(upper, lower, reason)
        for height, (uppers, reason) in enumerate(heights)
        for lowers, _ in heights[:height]
        for upper in uppers
        for lower in lowers
    ]


def unused(imports: Sequence[Import], arrows: Iterable[Arrow]) -> list[Arrow]:
    """Arrows that nothing needs any more."""
    return [
        arrow
        for arrow in arrows
        if not any(is_within(one.importer, arrow.source) and is_within(one.imported, arrow.target) for one in imports)
    ]


def edges_between(imports: Iterable[Import], folders: Sequence[str] = ()) -> set[tuple[str, str]]:
    """Who needs whom, as modules or as units of `folders`; table entries aside."""
    return {
        (unit_of(entry.importer, folders), unit_of(entry.imported, folders)) for entry in imports if not entry.is_entry
    }


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, each sorted: Tarjan's strongly connected components of two or more."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        if source != target:
            graph.setdefault(source, set()).add(target)
            graph.setdefault(target, set())
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in sorted(graph[node]):
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)
