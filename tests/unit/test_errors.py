"""The errors: rooted where a SQLAlchemy user already catches, drawn as they are."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
from sqlalchemy.exc import SQLAlchemyError

from sqlroute import errors

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and found.__module__ == errors.__name__
}


@pytest.mark.parametrize("name", CLASSES)
def test_handler_of_sqlalchemy_catches_it(name: str) -> None:
    assert issubclass(CLASSES[name], SQLAlchemyError)
    assert issubclass(CLASSES[name], errors.SQLRouteError)


def test_drawing_is_the_tree() -> None:
    """Each class stands in the docstring under its parent, with a word of why."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^(?P<tree>[ │├└─]*)(?P<name>[A-Z]\w+)(\s{2,}\S.*)?$", line)
        if found is None or found["name"] not in CLASSES:
            continue
        depth = len(found["tree"])
        above = [entry for entry in above if entry[0] < depth]
        drawn[found["name"]] = above[-1][1] if above else "SQLAlchemyError"
        above.append((depth, found["name"]))

    assert drawn == {name: found.__bases__[0].__name__ for name, found in CLASSES.items()}


def test_retryable_is_said_in_the_drawing() -> None:
    drawn = set(re.findall(r"(\w+) {2,}[^\n]*\(retryable\)", errors.__doc__ or ""))

    assert all(CLASSES[name].retryable for name in drawn)


@pytest.mark.parametrize(
    "name", ["PlanError", "CrossShardRefused", "MissingShardKey", "UnknownName", "ConfigError"]
)
def test_the_same_again_will_not_help(name: str) -> None:
    assert not CLASSES[name].retryable


@pytest.mark.parametrize("name", ["NoPrimary", "NoEligibleNode", "StaleShardMap"])
def test_the_same_again_may_help(name: str) -> None:
    assert CLASSES[name].retryable


def test_refusal_names_its_clause() -> None:
    error = errors.CrossShardRefused("HAVING", "not merged; filter in Python")

    assert error.clause == "HAVING"
    assert str(error) == "HAVING: not merged; filter in Python"


def test_configuration_lists_every_fault() -> None:
    error = errors.ConfigError(("a.b: wrong", "c: missing"))

    assert error.faults == ("a.b: wrong", "c: missing")
    assert str(error) == "a.b: wrong; c: missing"


MADE = [
    errors.ConfigError(("policy.max_lag: no number", "keyspaces: missing")),
    errors.CrossShardRefused("HAVING", "not merged"),
    errors.NoPrimary("shard s0 has no primary", "s0"),
    errors.LostTimeline("lost", shard="s0", timeline=1, fork=16),
    errors.StaleObjectRead((("Customer", (1,), ("name",)),)),
    errors.UnknownName("unknown"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_error_travels_between_processes(error: errors.SQLRouteError) -> None:
    """A job queue pickles what a worker raises."""
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)
