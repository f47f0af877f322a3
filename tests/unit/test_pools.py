"""The pools of nodes: what they keep, what they open, what they say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import exc

from sqlroute.errors import PoolExhausted
from sqlroute.runtime.limits import Limit, waiting_for
from sqlroute.runtime.pools import LimitedPool


class Connection:
    """As much of a driver's connection as a pool needs."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def rollback(self) -> None:
        pass


class Pool:
    """A pool, and all connections that it ever opened."""

    def __init__(self, **options: Any) -> None:
        self.made: list[Connection] = []
        self.pool = LimitedPool(self._make, logging_name="s0-a", **options)

    def _make(self) -> Any:
        self.made.append(Connection())
        return self.made[-1]

    def take(self, count: int) -> list[Any]:
        return [self.pool.connect() for _ in range(count)]

    @property
    def open(self) -> int:
        return sum(not connection.closed for connection in self.made)


def give_back(taken: list[Any]) -> None:
    for one in taken:
        one.close()


class TestFit:
    def test_what_is_too_much_is_closed_when_it_comes_back(self) -> None:
        """A process's part of a node may shrink while it uses all of it."""
        found = Pool(pool_size=5, max_overflow=5, timeout=0.01)
        taken = found.take(10)
        found.pool.fit(2, 3)
        with pytest.raises(PoolExhausted):
            found.take(1)
        give_back(taken)
        assert found.open == 2
        taken = found.take(3)
        with pytest.raises(PoolExhausted):
            found.take(1)
        give_back(taken)
        assert (found.open, found.pool.checkedout()) == (2, 0)

    def test_it_grows_again(self) -> None:
        """As when a node has been back for a while."""
        found = Pool(pool_size=1, max_overflow=0, timeout=0.01)
        found.pool.fit(3, 4)
        taken = found.take(4)
        with pytest.raises(PoolExhausted):
            found.take(1)
        give_back(taken)
        assert (found.open, found.pool.checkedout()) == (3, 0)

    def test_without_a_limit(self) -> None:
        """-1 is any number."""
        found = Pool(pool_size=1, max_overflow=0, timeout=0.01)
        found.pool.fit(2, -1)
        give_back(found.take(20))
        assert found.open == 2

    def test_one_connection_is_always_kept(self) -> None:
        """SQLAlchemy takes a pool size of 0 for any number."""
        found = Pool(pool_size=5, max_overflow=5, timeout=0.01)
        found.pool.fit(0, 1)
        give_back(found.take(1))
        assert found.open == 1


def test_a_retired_pool_keeps_nothing() -> None:
    """Its node has left the topology."""
    found = Pool(pool_size=5)
    taken = found.take(3)
    found.pool.is_retired = True
    give_back(taken)
    assert found.open == 0


def test_a_connection_that_was_cut_is_not_lent_again() -> None:
    """It notices at its next use only, which would be somebody else's."""
    found = Pool(pool_size=1, max_overflow=0)
    (taken,) = found.take(1)
    found.made[0].sqlroute_cut = True  # type: ignore[attr-defined]
    taken.close()
    (taken,) = found.take(1)
    assert taken.dbapi_connection is found.made[1]
    assert [connection.closed for connection in found.made] == [True, False]


class TestExhausted:
    def test_it_names_who_holds_longest(self) -> None:
        """Five of them, and how many more there are."""
        found = Pool(pool_size=7, max_overflow=0, timeout=0.01)
        taken: list[Any] = []
        for number in range(7):
            thread = threading.Thread(
                target=lambda: taken.extend(found.take(1)), name=f"worker {number}"
            )
            thread.start()
            thread.join()
        with pytest.raises(exc.TimeoutError) as caught:
            found.take(1)
        text = str(caught.value)
        assert text.startswith("no connection to s0-a within 0.0 s: all 7 (pool_size 7, ")
        assert text.count("which has ended for 0.0 s") == 5
        assert "and 2 more" in text
        give_back(taken)

    def test_a_limit_shortens_the_wait(self) -> None:
        """Of one call, not of the pool."""
        found = Pool(pool_size=1, max_overflow=0, timeout=30)
        taken = found.take(1)
        with waiting_for(Limit.after(0.01)), pytest.raises(PoolExhausted):
            found.take(1)
        give_back(taken)
        assert found.pool._timeout == 30
