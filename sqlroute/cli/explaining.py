"""Explain a statement: a SQLAlchemy one by its name, or SQL text through PostgreSQL's parser."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import BindParameter

from sqlroute.cli.cluster import tables_of
from sqlroute.errors import SQLRouteError, UnknownName
from sqlroute.router import Router
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.plan import Plan
from sqlroute.routing.planner import Described, Shape
from sqlroute.routing.policy import Demand, Intent, consistency_named, intent_named, role_named
from sqlroute.routing.sqltext import TextStatement, describe_text
from sqlroute.routing.token import Token

NOTE = (
    "as text() in a session; there the ordinary tables in it must be declared as reference tables"
)
"""True of every plan for text on several shards, and said with it."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the session of an explained statement asks for; ``None`` for nothing."""

    consistency: str | None = None
    intent: str | None = None
    role: str | None = None
    token: str | None = None


NONE = Wishes()


def explain_text(
    router: Router, sql: str, parameters: Mapping[str, Any], wishes: Wishes = NONE
) -> dict[str, Any]:
    """Return the plan for SQL text.

    Raises:
        PlanError: it cannot be parsed or routed.
        UnknownName: a table or parameter that nobody knows.
    """
    engines = router.engines(is_async=False)
    tables = tables_of(router)
    for keyspace in router.topology.keyspaces:
        router.learn_functions(keyspace, engines)
    text = describe_text(sql, tables, router.topology, router.planner.functions)
    described = described_text(text, parameters)
    rows = described.rows() if text.statement.row_keys is not None else None
    demand = Demand(
        consistency_named(wishes.consistency or router.policy.consistency),
        intent_named(wishes.intent or Intent.AUTOMATIC),
        role=role_named(wishes.role) if wishes.role else None,
    )
    affinity = Affinity()
    for position in Token.parse(wishes.token or "").positions:
        router.topology.shard(position.shard)
        affinity = affinity.seen(position)
    found = router.plan(described, affinity, engines, demand=demand, keys=rows)
    sent = found._replace(sql=(" ".join(sql.split()),) * len(found.targets))
    return {"statement": sql, **sent.describe(), "note": NOTE}


def described_text(text: TextStatement, parameters: Mapping[str, Any]) -> Described:
    """Return SQL text with values for its parameters, for the planner.

    Raises:
        UnknownName: it has no such parameter, or one that decides about shards has no value.
    """
    for name in parameters:
        if name not in text.names:
            known = ", ".join(sorted(text.names)) or "none"
            raise UnknownName(f"the SQL text has no parameter {name!r}; it has: {known}")
    needed = [bind for row in text.statement.row_keys or () for bind in row.values()]
    needed += [bind for use in text.statement.occurrences for bind in use.recipe.binds]
    for bind in needed:
        if bind.key in text.names and bind.key not in parameters:
            raise UnknownName(
                f"parameter {bind.key!r} is compared with a key and has no value; "
                f"give it by --param {bind.key}=..."
            )
    return Described(text.sql, Shape(text.statement, {}, text.constants), (), parameters)


def explain_named(
    router: Router, name: str, parameters: Mapping[str, str], wishes: Wishes = NONE
) -> dict[str, Any]:
    """Return the plan for a statement of SQLAlchemy.

    Args:
        name: ``module:name`` of the statement, or of a callable that returns it.
        parameters: values of its bind parameters, as text.

    Raises:
        PlanError: it cannot be routed.
        UnknownName: there is no such module, name or parameter.
    """
    statement = load_statement(name)
    values = _typed(statement, parameters)
    if wishes.role:
        statement = statement.execution_options(sqlroute_role=wishes.role)
    found: Plan = router.explain(
        statement,
        values or None,
        consistency=wishes.consistency,
        intent=wishes.intent,
        token=wishes.token,
    )
    return {"statement": " ".join(str(statement).split()), **found.describe(), "note": ""}


def load_statement(name: str) -> Any:
    """Return the statement that ``module:name`` means; the current directory is looked in too.

    Raises:
        UnknownName: there is none.
        SQLRouteError: the module or the callable failed.
    """
    module_name, colon, path = name.partition(":")
    if not module_name or not colon or not path:
        raise UnknownName(f"--statement {name!r} is not module:name")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise SQLRouteError(f"importing {module_name} failed: {exc}") from exc
        raise UnknownName(f"no module {module_name!r}; looked in {here} and sys.path") from None
    except Exception as exc:
        raise SQLRouteError(f"importing {module_name} failed: {_said(exc)}") from exc
    for part in path.split("."):
        if not hasattr(found, part):
            raise UnknownName(f"module {module_name} has no {path!r}")
        found = getattr(found, part)
    if not isinstance(found, Executable) and callable(found):
        try:
            found = found()
        except Exception as exc:
            raise SQLRouteError(f"calling {name} failed: {_said(exc)}") from exc
    if not isinstance(found, Executable):
        what = type(found).__name__
        raise UnknownName(f"{name} is a {what}, no statement and no callable returning one")
    return found


def _typed(statement: Any, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the values as the types of the statement's bind parameters have them."""
    types = {
        element.key: element.type
        for element in visitors.iterate(statement)
        if isinstance(element, BindParameter)
    }
    typed: dict[str, Any] = {}
    for name, text in parameters.items():
        if name not in types:
            named = sorted(key for key in types if not key.startswith("%("))
            known = ", ".join(named) or "none with a name"
            raise UnknownName(f"the statement has no parameter {name!r}; it has: {known}")
        try:
            is_integer = types[name].python_type is int
        except NotImplementedError:
            is_integer = False
        typed[name] = int(text) if is_integer and text.lstrip("-").isdecimal() else text
    return typed


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
