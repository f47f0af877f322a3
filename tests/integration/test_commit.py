"""Promises of COMMIT: all shards or none, whatever dies in between, and equal reference rows."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import Ran, Shop
from models import Country, Customer, Order, Rate
from sqlalchemy import exc, func, select

from sqlroute import CrossShardRefused, InDoubtCommit, Router, RoutingSession
from sqlroute.errors import TopologyError
from sqlroute.runtime import commit
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(30)]

STEPS = (
    ("before", "PREPARE TRANSACTION"),
    ("after", "PREPARE TRANSACTION"),
    ("after", "INSERT INTO sqlroute.commit_record"),
    ("after", "COMMIT; SELECT"),
    ("after", "COMMIT PREPARED"),
)
COUNT = "SELECT count(*) FROM customer"


def customers(shop: Shop) -> tuple[int, int]:
    """Count the customers on both shards."""
    return shop.on("s0", COUNT)[0][0], shop.on("s1", COUNT)[0][0]


def one_each(shop: Shop) -> list[Customer]:
    return [Customer(id=shop.keys(shard)[0], name=shard) for shard in ("s0", "s1")]


def interrupt(
    monkeypatch: pytest.MonkeyPatch, what: str, do: Callable[[Any], None], *, after: bool = False
) -> None:
    """Do something before or after the first command of a commit that begins so."""
    run, done = commit._run, []

    def interrupted(connection: Any, command: str, **options: Any) -> Any:
        if what not in command or done:
            return run(connection, command, **options)
        done.append(command)
        if not after:
            do(connection)
        found = run(connection, command, **options)
        if after:
            do(connection)
        return found

    monkeypatch.setattr(commit, "_run", interrupted)


def test_a_reader_that_dies_takes_nothing_back(shop: Shop, router: Router) -> None:
    """The shard that wrote decides alone, in whatever order the members come."""
    zero, one = shop.keys("s0", 7), shop.keys("s1")[0]
    shop.add(Customer(id=one, name="x"))
    for number, key in enumerate(zero):
        with router.sessionmaker()() as session:
            session.begin()
            session.scalar(select(Customer.id).where(Customer.id == one))
            session.add(Customer(id=key, name=str(number)))
            session.flush()
            shop.on(
                "s1",
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE state = 'idle in transaction' AND pid <> pg_backend_pid()",
            )
            session.commit()
        assert shop.on("s0", "SELECT count(*) FROM customer") == [(number + 1,)]


class TestAtomicity:
    def test_two_shards_commit_together(self, shop: Shop, session: RoutingSession) -> None:
        """Both hold the rows, and the session has a token of each."""
        session.add_all(one_each(shop))
        session.commit()

        assert customers(shop) == (1, 1)
        assert {token.shard for token in session.token.positions} == {"s0", "s1"}
        assert all(token.lsn > 0 and token.timeline == 1 for token in session.token.positions)

    def test_one_shard_commits_in_one_phase(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reads on another primary and an open but unused connection cost no second phase."""
        sent: list[str] = []
        run = commit._run
        monkeypatch.setattr(
            commit, "_run", lambda c, command, **o: (sent.append(command), run(c, command, **o))[1]
        )
        with session.begin():
            session.add(one_each(shop)[0])
            session.scalars(select(Customer)).all()
        assert all("PREPARE" not in command for command in sent)
        session.connection(bind_arguments={"shard": "s1"})
        session.add(Customer(id=shop.keys("s0", 2)[1], name="second"))
        session.commit()

        assert all("PREPARE" not in command for command in sent)
        assert customers(shop) == (2, 0)

    def test_a_position_is_not_before_its_commit(self, shop: Shop, session: RoutingSession) -> None:
        """A replica that has replayed the token has the row."""
        zero = shop.keys("s0")[0]
        session.add(Customer(id=zero, name="x"))
        session.commit()
        (token,) = session.token.positions

        (written,) = shop.on("s0", f"SELECT pg_current_wal_lsn() >= '{_lsn(token.lsn)}'::pg_lsn")
        assert written == (True,)
        first, _ = (
            token.lsn,
            session.execute(sa.update(Customer).where(Customer.id == zero).values(name="y")),
        )
        session.commit()
        assert session.token.positions[0].lsn > first

    @pytest.mark.parametrize("shard", ["s0", "s1"])
    def test_a_violation_at_commit_leaves_nothing(
        self, shop: Shop, session: RoutingSession, shard: str
    ) -> None:
        """A deferred constraint fails at COMMIT on one shard, or at PREPARE on the other."""
        session.add_all(one_each(shop))
        orphan = shop.keys(shard, 2)[1]
        session.execute(sa.insert(Order), [{"customer_id": orphan, "id": 1}])
        with pytest.raises(exc.IntegrityError, match="foreign key"):
            session.commit()
        session.rollback()

        assert customers(shop) == (0, 0)
        session.add_all(one_each(shop))
        session.commit()
        assert customers(shop) == (1, 1)

    @pytest.mark.parametrize("shard", ["s0", "s1"])
    def test_a_failed_part_fails_the_whole(
        self, shop: Shop, session: RoutingSession, shard: str
    ) -> None:
        """An error that the caller swallowed has aborted one shard: the other must not commit."""
        session.add_all(one_each(shop))
        session.flush()
        with pytest.raises(exc.DBAPIError):
            session.execute(sa.text("SELECT 1/0"), execution_options={"sqlroute_shard": shard})
        with pytest.raises(exc.SQLAlchemyError) as caught:
            session.commit()
        session.rollback()

        assert not isinstance(caught.value, InDoubtCommit)
        assert customers(shop) == (0, 0)

    def test_a_lost_server_before_the_decision_leaves_nothing(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The connection of the deciding shard dies before the record is written."""
        session.add_all(one_each(shop))
        session.flush()
        interrupt(monkeypatch, "INSERT INTO sqlroute", _terminate(shop, "s0"))
        with pytest.raises(exc.DBAPIError):
            session.commit()
        session.rollback()

        assert customers(shop) == (0, 0)

    def test_a_lost_connection_after_the_decision_is_said(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The outcome is fixed; the error says who finishes it, and recovery does."""
        session.add_all(one_each(shop))
        session.flush()
        interrupt(monkeypatch, "COMMIT PREPARED", _terminate(shop, "s1"))
        with pytest.raises(InDoubtCommit, match=r"committed, but not yet on s1.*recover"):
            session.commit()
        session.rollback()
        finished = shop.router.recover(older_than=0)

        assert [(f.shard, f.committed) for f in finished] == [("s1", True)]
        assert customers(shop) == (1, 1)

    def test_a_lost_answer_of_the_decision_is_said(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The deciding COMMIT was sent and its answer lost: in doubt, and recovery knows."""
        session.add_all(one_each(shop))
        session.flush()
        interrupt(monkeypatch, "COMMIT; SELECT", _terminate(shop, "s0"))
        with pytest.raises(InDoubtCommit, match="recover"):
            session.commit()
        session.rollback()
        shop.router.recover(older_than=0)

        assert customers(shop) in ((0, 0), (1, 1))

    def test_no_prepared_transactions_is_a_clear_error(
        self, sqlroute_topology_factory: TopologyFactory
    ) -> None:
        """max_prepared_transactions = 0 is named, and nothing is written."""
        import psycopg

        servers = sqlroute_topology_factory(shards=2, replicas=0, label="no 2pc")
        for node in servers.nodes:
            with psycopg.connect(**node.conninfo, autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET max_prepared_transactions = 0")
            node.stop()
            node.start()
        with Router.from_config(servers.config_path) as router:
            router.create_all(Customer.metadata)
            found = Shop(servers, router)
            with router.sessionmaker()() as session:
                session.add_all(one_each(found))
                with pytest.raises(TopologyError, match="max_prepared_transactions"):
                    session.commit()
                session.rollback()
                assert customers(found) == (0, 0)


class TestRecovery:
    @pytest.mark.parametrize(("when", "command"), STEPS, ids=[f"{w} {c}" for w, c in STEPS])
    def test_a_killed_process_leaves_all_or_nothing(
        self, shop: Shop, when: str, command: str
    ) -> None:
        """Killed at each step of a commit over two shards, any router finishes it one way."""
        keys = [customer.id for customer in one_each(shop)]
        script = f"""
            import os, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from models import Customer
            from sqlroute import Router
            from sqlroute.runtime import commit

            run = commit._run
            def dying(connection, command, **options):
                dies = {command!r} in command
                if dies and {when == "before"}:
                    os._exit(7)
                found = run(connection, command, **options)
                if dies:
                    os._exit(7)
                return found
            commit._run = dying
            router = Router.from_config({str(shop.servers.config_path)!r})
            with router.sessionmaker()() as session:
                session.add_all([Customer(id=key, name="x") for key in {keys}])
                session.commit()
        """
        died = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
        assert died.returncode == 7

        decided = command in ("COMMIT; SELECT", "COMMIT PREPARED")  # the COMMIT is in both
        finished = shop.router.recover(older_than=0)
        assert customers(shop) == ((1, 1) if decided else (0, 0))
        assert {f.committed for f in finished} <= {decided}
        assert shop.router.recover(older_than=0) == ()

    def test_a_slow_coordinator_loses_against_recovery(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Recovery has aborted what was prepared: the commit fails and nothing is written."""
        session.add_all(one_each(shop))
        session.flush()

        def recover(_: Any) -> None:
            assert [f.committed for f in shop.router.recover(older_than=0)] == [False]

        interrupt(monkeypatch, "PREPARE", recover, after=True)
        with pytest.raises(exc.DBAPIError):
            session.commit()
        session.rollback()

        assert customers(shop) == (0, 0)

    def test_recovery_may_finish_for_a_living_coordinator(
        self, shop: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Recovery commits the rest first: the coordinator's commit has simply succeeded."""
        session.add_all(one_each(shop))
        session.flush()
        interrupt(
            monkeypatch, "COMMIT PREPARED", lambda _: shop.router.recover(older_than=0) and None
        )
        session.commit()

        assert customers(shop) == (1, 1)
        assert {token.shard for token in session.token.positions} == {"s0", "s1"}

    def test_two_recoveries_do_not_disturb_each_other(self, shop: Shop) -> None:
        """Each finishes what the other has not."""
        for number, key in enumerate(shop.keys("s1", 20)):
            shop.on(
                "s1",
                f"BEGIN; INSERT INTO customer (id, name) VALUES ({key}, 'x'); "
                f"PREPARE TRANSACTION '{commit.gid_of('s1', 's0', f'{number:032x}')}'",
            )
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.extend(shop.router.recover(older_than=0)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(found) == 20
        assert customers(shop) == (0, 0)
        shop.on("s0", "DELETE FROM sqlroute.commit_record WHERE aborted")

    def test_young_transactions_are_left_alone(self, shop: Shop) -> None:
        """They may still be in the hands of their process."""
        gid = commit.gid_of("s1", "s0", "f" * 32)
        shop.on("s1", f"BEGIN; SELECT 1; PREPARE TRANSACTION '{gid}'")

        assert shop.router.recover(older_than=60) == ()
        assert [f.gid for f in shop.router.recover(older_than=0)] == [gid]


class TestReferenceTables:
    def equal(self, shop: Shop, table: str) -> list[tuple[Any, ...]]:
        """Return the rows of a reference table, checked to be the same on both shards."""
        statement = f"SELECT t::text FROM {table} t ORDER BY 1"
        rows = shop.on("s0", statement)
        assert rows == shop.on("s1", statement)
        return rows

    def test_flushed_rows_are_equal(self, shop: Shop, session: RoutingSession) -> None:
        """With serial ids, now(), JSON, and numbers that Python cannot hold; then changed, gone."""
        rates = [
            Rate(value=Decimal("1.1000"), extra={"a": [1, None]}),
            Rate(value=Decimal("1e-30"), lossy=sa.cast("0.123456789012345678", sa.Numeric(30, 18))),
            Rate(value=Decimal("NaN"), extra=None),
        ]
        session.add_all(rates)
        session.commit()
        assert len(self.equal(shop, "rate")) == 3
        assert shop.on("s1", "SELECT count(*) FROM rate WHERE lossy = 0.123456789012345678") == [
            (1,)
        ]
        rates[0].value = Decimal(2)
        session.delete(rates[1])
        session.commit()
        assert len(self.equal(shop, "rate")) == 2

    def test_rows_written_by_core_are_equal(self, shop: Shop, session: RoutingSession) -> None:
        """One statement for many rows, computed by the server."""
        session.execute(sa.insert(Rate), [{"value": Decimal(i)} for i in range(5)])
        session.execute(sa.insert(Rate.__table__).values(value=func.random()))  # type: ignore[arg-type]
        session.execute(sa.update(Rate).where(Rate.value > 2).values(value=func.random()))
        changed = session.execute(sa.update(Rate).values(extra={"k": 1}))
        gone = session.execute(sa.delete(Rate).where(Rate.value == 1))
        session.commit()

        assert (changed.rowcount, gone.rowcount) == (6, 1)  # type: ignore[attr-defined]
        assert len(self.equal(shop, "rate")) == 5

    def test_sql_null_and_json_null_stay_apart(self, shop: Shop, session: RoutingSession) -> None:
        """A copied SQL NULL is no JSON null."""
        session.execute(sa.insert(Rate), [{"value": 1}, {"value": 2, "extra": None}])
        session.add(Rate(value=Decimal(3)))
        session.commit()
        for shard in ("s0", "s1"):
            rows = shop.on(shard, "SELECT value::int, extra::text FROM rate ORDER BY value")
            assert rows == [(1, None), (2, "null"), (3, None)]

    def test_upserts_are_equal(self, shop: Shop, session: RoutingSession) -> None:
        """ON CONFLICT, updating and ignoring."""
        from sqlalchemy.dialects.postgresql import insert

        shop.add(Country(code="DE", name="Germany"))
        rows = [{"code": "DE", "name": "x"}, {"code": "FR", "name": "France"}]
        session.execute(insert(Country).on_conflict_do_nothing(), rows)
        update = insert(Country).values(code="DE", name="D")
        session.execute(
            update.on_conflict_do_update(index_elements=["code"], set_={"name": "Deutschland"})
        )
        session.commit()
        assert self.equal(shop, "country") == [("(DE,Deutschland)",), ("(FR,France)",)]

    def test_a_changed_primary_key_is_changed_everywhere(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """By flush; a Core UPDATE of the key is done everywhere or refused."""
        shop.add(Country(code="DE", name="Germany"))
        country = session.get_one(Country, "DE")
        country.code = "GER"
        session.commit()
        assert self.equal(shop, "country") == [("(GER,Germany)",)]
        try:
            session.execute(sa.update(Country).values(code="D"))
            session.commit()
        except CrossShardRefused:
            session.rollback()
        assert len(self.equal(shop, "country")) == 1

    def test_values_can_be_swapped(self, shop: Shop, session: RoutingSession) -> None:
        """A unique value moves from one row to another within one transaction."""
        shop.add(Country(code="A", name="a"), Country(code="B", name="b"))
        a, b = session.get_one(Country, "A"), session.get_one(Country, "B")
        session.delete(a)
        session.flush()
        b.name = "a"
        session.commit()
        assert self.equal(shop, "country") == [("(B,a)",)]

    def test_a_reference_row_and_its_users_in_one_flush(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """The foreign key holds on every shard at once, also when all go."""
        country = Country(code="DE", name="Germany")
        users = one_each(shop)
        for user in users:
            user.country = country
        session.add_all(users)
        session.commit()
        assert customers(shop) == (1, 1)
        for user in users:
            session.delete(user)
        session.delete(country)
        session.commit()
        assert customers(shop) == (0, 0)
        assert self.equal(shop, "country") == []

    def test_a_rollback_leaves_no_row_anywhere(self, shop: Shop, session: RoutingSession) -> None:
        """Neither after a flush nor after a failing statement."""
        session.add(Country(code="DE", name="Germany"))
        session.flush()
        session.rollback()
        session.add_all([Country(code="A", name="same"), Country(code="B", name="same")])
        with pytest.raises(exc.IntegrityError):
            session.commit()
        session.rollback()
        assert self.equal(shop, "country") == []

    def test_concurrent_writers_leave_equal_rows(self, shop: Shop, router: Router) -> None:
        """Sessions that write the same row at once, by flush and by Core, take turns."""
        shop.add(Country(code="A", name="0"), Country(code="B", name="1"))
        errors: list[BaseException] = []

        def write(number: int) -> None:
            try:
                for i in range(8):
                    with router.sessionmaker().begin() as session:
                        name = f"{number}.{i}"
                        if number % 2:
                            session.get_one(Country, "A").name = name
                        else:
                            where = Country.code == "A"
                            session.execute(sa.update(Country).where(where).values(name=name))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
        assert len(self.equal(shop, "country")) == 2

    def test_a_read_of_a_reference_table_asks_one_shard(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """Its rows are counted once."""
        shop.add(Country(code="A", name="a"), Country(code="B", name="b"))
        ran.clear()
        assert session.scalar(select(func.count()).select_from(Country)) == 2
        assert len(ran.statements) == 1


def _terminate(shop: Shop, shard: str) -> Callable[[Any], None]:
    def terminate(_: Any) -> None:
        shop.on(
            shard,
            "SELECT pg_terminate_backend(pid, 3000) FROM pg_stat_activity WHERE "
            "backend_type = 'client backend' AND pid <> pg_backend_pid() "
            "AND application_name NOT LIKE 'sqlroute%'",
        )
        shop.router.engines(is_async=False).expire(f"{shard}-a")  # for whoever comes next

    return terminate


def _lsn(position: int) -> str:
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"
