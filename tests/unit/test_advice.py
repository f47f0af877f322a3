"""Which statements stay on one shard, and under which key more of them would."""

from __future__ import annotations

import pytest

from sqlroute.errors import PlanError
from sqlroute.routing.advice import (
    FOUR_SHARDS,
    Judged,
    Reach,
    Scheme,
    Shape,
    advise,
    judge_shape,
    schemes,
    under,
)
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.sqltext import statements
from sqlroute.routing.sqltree import Role, TableInfo

NUMBER, TEXT = KeyKind.INTEGER, KeyKind.TEXT
_TABLES = (
    TableInfo("customer", Role.REFERENCE, {"id": NUMBER, "name": TEXT, "country": TEXT}),
    TableInfo("orders", Role.REFERENCE, {"id": NUMBER, "customer_id": NUMBER, "total": None}),
    TableInfo("items", Role.REFERENCE, {"order_id": NUMBER, "customer_id": NUMBER, "sku": TEXT}),
    TableInfo("country", Role.REFERENCE, {"code": TEXT, "name": TEXT}),
    TableInfo("report", Role.UNKNOWN, why="a view"),
)
TABLES = {info.name: info for info in _TABLES}
BY_CUSTOMER = Scheme((("customer", "id"), ("items", "customer_id"), ("orders", "customer_id")))


def judged(sql: str, scheme: Scheme = BY_CUSTOMER) -> Judged:
    return judge_shape(Shape(sql), under(scheme, TABLES), FOUR_SHARDS)


@pytest.mark.parametrize(
    ("sql", "reach"),
    [
        ("SELECT * FROM customer WHERE id = $1", Reach.ONE),
        ("SELECT * FROM orders WHERE customer_id = $1 ORDER BY id LIMIT $2", Reach.ONE),
        ("SELECT count(DISTINCT total) FROM orders WHERE customer_id = 5", Reach.ONE),
        (
            "SELECT * FROM customer c JOIN orders o ON o.customer_id = c.id WHERE c.id = $1",
            Reach.ONE,
        ),
        ("SELECT * FROM country", Reach.ONE),
        ("INSERT INTO orders (id, customer_id) VALUES ($1, $2), ($3, $4)", Reach.ONE),
        ("UPDATE orders SET total = $1 WHERE id = $2 AND customer_id = $3", Reach.ONE),
        ("SELECT * FROM customer WHERE id IN ($1, $2)", Reach.MANY),
        ("SELECT * FROM customer WHERE id = ANY($1)", Reach.MANY),
        ("SELECT * FROM customer WHERE name = $1", Reach.MANY),
        ("SELECT name, count(*) FROM customer GROUP BY name ORDER BY name", Reach.MANY),
        ("UPDATE country SET name = $1", Reach.MANY),
        ("SELECT count(DISTINCT total) FROM orders", Reach.COORDINATOR),
        ("SELECT rank() OVER (ORDER BY id) FROM orders", Reach.COORDINATOR),
        ("SELECT DISTINCT ON (total) id FROM orders", Reach.COORDINATOR),
        ("SELECT id FROM orders UNION SELECT order_id FROM items", Reach.COORDINATOR),
        ("SELECT * FROM orders o JOIN items i ON i.order_id = o.id", Reach.COORDINATOR),
        ("UPDATE orders SET total = $1 WHERE id = $2", Reach.REFUSED),
        ("INSERT INTO orders (id) VALUES ($1)", Reach.REFUSED),
        ("SELECT * FROM orders FOR UPDATE", Reach.REFUSED),
        ("SELECT * FROM report", Reach.REFUSED),
        ("SELECT * FROM nowhere", Reach.REFUSED),
        ("SELEC 1", Reach.REFUSED),
        ("BEGIN", Reach.NONE),
        ("SELECT pg_size_pretty($1)", Reach.NONE),
        ("SELECT relname FROM pg_class", Reach.NONE),
    ],
)
def test_each_statement_reaches_as_far_as_its_conditions_say(sql: str, reach: Reach) -> None:
    assert judged(sql).reach is reach


def test_a_verdict_says_why() -> None:
    assert "total" not in judged("SELECT * FROM orders").why
    assert judged("SELECT * FROM orders").why == "no condition on the key (customer_id)"
    assert "unknown table 'nowhere'" in judged("SELECT * FROM nowhere").why


def test_tables_that_are_joined_are_sharded_together() -> None:
    """By the columns that are made equal, also over a subquery, and by those of one name."""
    join = Shape("SELECT 1 FROM customer c JOIN (SELECT * FROM orders) o ON o.customer_id = c.id")
    alone = Shape("SELECT * FROM items WHERE customer_id = $1")

    assert BY_CUSTOMER in schemes([join, alone], TABLES)


def test_only_columns_that_are_compared_are_tried() -> None:
    found = schemes([Shape("SELECT name FROM customer WHERE country = $1")], TABLES)

    assert found == (Scheme((("customer", "country"),)),)


def test_columns_that_only_share_a_common_name_are_not_taken_for_equal() -> None:
    shapes = [Shape(f"SELECT * FROM {table} WHERE id = $1") for table in ("customer", "orders")]

    assert all(len(scheme.columns) == 1 for scheme in schemes(shapes, TABLES))


def test_the_best_key_keeps_most_calls_on_one_shard_and_spreads_most_data() -> None:
    shapes = (
        Shape("SELECT * FROM customer WHERE id = $1", 100),
        Shape("SELECT * FROM customer c JOIN orders o ON o.customer_id = c.id WHERE c.id = $1", 50),
        Shape("SELECT * FROM items WHERE customer_id = $1", 50),
        Shape("SELECT * FROM orders WHERE id = $1", 5),
        Shape("SELECT * FROM country WHERE code = $1", 900),
    )

    best, *others = advise(shapes, TABLES, {"orders": 5000, "items": 9000, "customer": 100})

    assert best.scheme == BY_CUSTOMER
    assert (best.calls(Reach.ONE), best.calls(Reach.MANY)) == (1100, 5)
    assert best.spread > 0.99
    assert all(best.score > other.score for other in others)


def test_what_no_statement_compares_has_no_scheme() -> None:
    assert advise([Shape("SELECT * FROM customer")], TABLES, {}) == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SELECT 1; SELECT ';' ;\n", ["SELECT 1", "SELECT ';'"]),
        ("SELECT 1\n\n-- no\nSELECT :x\n", ["SELECT 1", "SELECT $1"]),
        ("SELECT\n  'é';SELECT 2", ["SELECT\n  'é'", "SELECT 2"]),
        ("", []),
    ],
)
def test_statements_are_parted_by_semicolons_or_lines(text: str, found: list[str]) -> None:
    assert statements(text) == found


def test_text_that_cannot_be_parted_is_refused() -> None:
    with pytest.raises(PlanError, match="syntax error"):
        statements("SELEC 1; SELECT 2")
