"""The layers of the package: imports go one way, and the core stays pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sqlroute

PACKAGE = Path(sqlroute.__file__).parent

ORDER = [
    {"errors", "events"},
    {"topology"},
    {"health", "operations"},
    {"routing"},
    {"config"},
    {"runtime"},
    {"catalog"},
    {
        "asking",
        "columns",
        "coordination",
        "identity",
        "results",
        "references",
        "stale",
        "execution",
        "retry",
        "router",
        "session",
        "session_async",
        "local",
        "ops",
    },
    {"web", "ext", "testing", "demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

PURE = ("topology", "health", "routing")
IMPURE = {
    "asyncio", "concurrent", "datetime.now", "logging", "psycopg", "random", "socket", "subprocess",
    "threading", "time", "sqlalchemy.create_engine", "sqlalchemy.engine", "sqlalchemy.event",
    "sqlalchemy.orm", "sqlalchemy.pool",
}  # fmt: skip
ALLOWED_IN_PURE = {"random.Random"}
"""A type in a signature: the generator itself is given."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "migrations" in path.parts:
            continue
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree: ast.AST, *, typing_too: bool) -> Iterator[str]:
    """Yield dotted names that a module imports, the names of ``from`` imports included."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            skipped.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def toplevel_imports(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported when the module is: not what a function imports when it is called."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node, typing_too=False)


def test_every_module_has_a_layer() -> None:
    """A new module must say where it stands."""
    unknown = {layer(name) for name, _ in modules()} - set(RANK) - {"__init__"}

    assert unknown == set()


@pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_imports_go_one_way(name: str, tree: ast.Module) -> None:
    """A layer imports only itself and the layers before it."""
    if name == "__init__":
        return
    rank = RANK[layer(name)]
    wrong = [
        imported
        for imported in toplevel_imports(tree)
        if imported.startswith("sqlroute.")
        and (parts := imported.split("."))[1] in RANK
        and RANK[parts[1]] > rank
    ]

    assert wrong == []


@pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_core_is_pure(name: str, tree: ast.Module) -> None:
    """Topology, health and routing import no driver, engine, Session, thread, clock or log."""
    if layer(name) not in PURE:
        return
    wrong = [
        imported
        for imported in imports(tree, typing_too=False)
        if imported not in ALLOWED_IN_PURE
        and any(imported == bad or imported.startswith(f"{bad}.") for bad in IMPURE)
    ]

    assert wrong == []


def test_no_import_cycle() -> None:
    """Modules can be loaded in some order without a half-made one."""
    graph = {
        f"sqlroute.{name}" if name != "__init__" else "sqlroute": {
            imported.rsplit(".", 1)[0] if imported.rsplit(".", 1)[0] != "sqlroute" else imported
            for imported in toplevel_imports(tree)
            if imported.startswith("sqlroute")
        }
        for name, tree in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done or name not in graph:
            return
        for imported in graph[name]:
            visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_all_is_literal_sorted_and_true() -> None:
    """``__all__`` is what the documentation promises."""
    assert list(sqlroute.__all__) == sorted(sqlroute.__all__)
    for name in sqlroute.__all__:
        assert hasattr(sqlroute, name), name


def test_importing_sqlroute_loads_no_driver_and_no_tools() -> None:
    """psycopg, alembic, pydantic and the PostgreSQL dialect are imported when first needed."""
    heavy = "{'psycopg', 'alembic', 'pydantic', 'typer', 'rich', 'tenacity'}"
    code = f"import sys, sqlroute; print(sorted({heavy} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert seen.stdout.strip() == "[]"
