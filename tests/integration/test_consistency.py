"""What reads may miss: per router, session, block and statement; tokens that travel."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Ran, Shop, until
from models import Customer
from sqlalchemy import select, text, update

from sqlroute import (
    ForeignToken,
    InvalidToken,
    NoEligibleNode,
    ReadOnlyRefused,
    Router,
    RoutingSession,
    Token,
    UnknownName,
)
from sqlroute.routing.token import Position

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture
def key(shop: Shop) -> int:
    """A customer of shard s0, known to every server."""
    (key,) = shop.keys("s0")
    shop.add(Customer(id=key, name="old"))
    return key


def name_of(key: int) -> Any:
    return select(Customer.name).where(Customer.id == key)


def rename(session: RoutingSession, key: int, name: str) -> None:
    session.execute(update(Customer).where(Customer.id == key).values(name=name))
    session.commit()


class TestLevels:
    def test_of_a_router(self, held: Shop, key: int, make_router: Callable[..., Router]) -> None:
        """A replica 3 s behind: eventual and bounded read from it, session and strong do not."""
        from sqlroute import Consistency

        for level, expected in [
            (Consistency.EVENTUAL, False),
            (Consistency.BOUNDED, False),
            (Consistency.SESSION, True),
            (Consistency.STRONG, True),
        ]:
            with make_router(consistency=level, max_lag=60).sessionmaker()() as session:
                rename(session, key, level.value)
                assert (session.scalar(name_of(key)) == level.value) is expected, level

    @pytest.mark.parametrize(
        ("consistency", "expected"),
        [("eventual", "old"), ("bounded", "old"), ("session", "new"), ("strong", "new")],
    )
    def test_of_a_session_a_block_and_a_statement(
        self, key: int, held: Shop, router: Router, consistency: str, expected: str
    ) -> None:
        with router.sessionmaker(consistency=consistency)() as session:
            rename(session, key, "new")
            assert session.scalar(name_of(key)) == expected
        with router.sessionmaker()() as session:
            rename(session, key, "newer")
            rename(session, key, "new")
            option = {"sqlroute_consistency": consistency}
            assert session.scalar(name_of(key), execution_options=option) == expected
            assert session.scalar(name_of(key).execution_options(**option)) == expected
            with session.consistency(consistency):
                assert session.scalar(name_of(key)) == expected
            assert session.scalar(name_of(key)) == "new"

    def test_a_block_ends_with_an_error_too(self, router: Router, key: int) -> None:
        with router.sessionmaker()() as session:
            with contextlib.suppress(ZeroDivisionError), session.consistency("strong"):
                assert "strong" in str(session.explain(name_of(key)))
                raise ZeroDivisionError
            assert "strong" not in str(session.explain(name_of(key)))

    def test_options_reach_eager_loaders(self, shop: Shop, router: Router, ran: Ran) -> None:
        """A statement that reads from the primary loads its relationships from there."""
        from sqlalchemy.orm import selectinload

        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="x"))
        ran.clear()
        statement = select(Customer).where(Customer.id == key)
        statement = statement.options(selectinload(Customer.orders))
        with router.sessionmaker()() as session:
            session.scalars(statement, execution_options={"sqlroute_role": "primary"}).all()
            assert ran.nodes == ["s0-a", "s0-a"]


class TestIntents:
    def test_a_session_that_will_write_uses_one_node(
        self, key: int, held: Shop, router: Router, ran: Ran
    ) -> None:
        with router.sessionmaker(intent="writing")() as session:
            customer = session.get_one(Customer, key)
            customer.name = "new"
            session.commit()
            assert set(ran.nodes) == {"s0-a"}

    @pytest.mark.parametrize("intent", ["reading", "lag_tolerant"])
    def test_a_session_that_reads_sends_no_write(
        self, shop: Shop, router: Router, key: int, ran: Ran, intent: str
    ) -> None:
        """Each door refuses before anything is sent, and the session goes on."""
        with router.sessionmaker(intent=intent)() as session:
            customer = session.get_one(Customer, key)
            ran.clear()
            for write in (
                lambda: rename(session, key, "new"),
                lambda: session.execute(text("SELECT nextval('rate_id_seq')")),
                lambda: session.scalar(select(Customer).with_for_update()),
                lambda: session.connection(bind_arguments={"shard": "s0"}),
            ):
                with pytest.raises(ReadOnlyRefused, match=f"declared {intent}"):
                    write()
            customer.name = "new"
            with pytest.raises(ReadOnlyRefused, match="a flush"):
                session.commit()
            session.add(Customer(id=shop.keys("s1")[0], name="x"))
            with pytest.raises(ReadOnlyRefused):
                session.scalar(name_of(key))  # autoflush
            assert ran.statements == []
            session.expunge_all()
            assert session.scalar(name_of(key)) == "old"

    def test_lag_tolerant_reads_what_there_is(self, key: int, held: Shop, router: Router) -> None:
        with router.sessionmaker()() as session:
            rename(session, key, "new")
            with session.lag_tolerant():
                assert session.scalar(name_of(key)) == "old"
            assert session.scalar(name_of(key)) == "new"

    def test_begin_of_a_reading_session_is_read_only(
        self, shop: Shop, router: Router, key: int, ran: Ran
    ) -> None:
        ran.clear()
        with router.sessionmaker(intent="reading").begin() as session:
            assert session.scalar(name_of(key)) == "old"
            assert session.scalar(text("SHOW transaction_read_only"), execution_options={
                "sqlroute_shard": "s0", "sqlroute_role": "replica"}) == "on"  # fmt: skip
        assert set(ran.nodes) <= {"s0-b", "s0-c"}


class TestTokens:
    def test_a_new_session_with_the_token_sees_the_write(
        self, key: int, held: Shop, router: Router
    ) -> None:
        with router.sessionmaker()() as session:
            rename(session, key, "new")
            token = str(session.token)
        with router.sessionmaker()() as session:
            assert session.scalar(name_of(key)) == "old"  # the replicas are 3 s behind
        with router.sessionmaker(token=token)() as session:
            assert session.scalar(name_of(key)) == "new"
        with router.sessionmaker()() as session:
            session.follow(Token.parse(token))
            assert session.scalar(name_of(key)) == "new"

    def test_another_process_with_the_token_sees_the_write(
        self, key: int, held: Shop, router: Router
    ) -> None:
        with router.sessionmaker()() as session:
            rename(session, key, "new")
            token = session.token
        program = (
            "import sys; sys.path.insert(0, sys.argv[4])\n"
            "from models import Customer\n"
            "from sqlroute import Router\n"
            "with Router.from_config(sys.argv[1]) as router:\n"
            "    with router.sessionmaker(token=sys.argv[2])() as session:\n"
            "        print(session.get(Customer, int(sys.argv[3])).name)\n"
        )
        arguments = [held.servers.config_path, token, key, __file__.rsplit("/", 1)[0]]
        found = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )

        assert found.stdout == "new\n"

    def test_the_token_moves_on_reads(self, key: int, held: Shop, router: Router) -> None:
        """Monotonic reads over sessions: who has read a write hands on that it was seen."""
        with router.sessionmaker()() as session:
            rename(session, key, "new")
        with router.sessionmaker(consistency="strong")() as session:
            assert session.scalar(name_of(key)) == "new"
            token = session.token
        with router.sessionmaker(token=token)() as session:
            assert session.scalar(name_of(key)) == "new"

    def test_the_token_of_a_replica_covers_what_it_showed(
        self, shop: Shop, router: Router, key: int
    ) -> None:
        """The monitor's look before the read is no proof: the replica is asked after it."""
        with router.sessionmaker()() as session:
            for number in range(20):
                shop.on("s0", f"UPDATE customer SET name = '{number}' WHERE id = {key}")
                until(lambda n=number: shop.at("s0-b", "SELECT name FROM customer") == [(str(n),)])
                lsn = shop.on("s0", "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")[0][0]
                until(lambda n=number: session.scalar(name_of(key)) == str(n))
                position = session.token.of("s0")
                assert position is not None
                assert position.lsn >= int(lsn) - 8192  # what came after the commit record aside

    def test_reads_are_monotonic_when_a_session_changes_its_replica(
        self, shop: Shop, router: Router, key: int, ran: Ran
    ) -> None:
        """It has read from the fresh one; the stale one must not answer when that goes away."""
        stale = shop.servers.node("s0-c")
        stale.hold_replay(3.0)
        try:
            with router.sessionmaker()() as other:
                rename(other, key, "new")
                token = other.token
            until(lambda: shop.at("s0-b", "SELECT name FROM customer") == [("new",)])
            with router.sessionmaker(token=token)() as session:
                assert session.scalar(name_of(key)) == "new"
            with router.sessionmaker()() as session:
                session._affinity = session._affinity.reading("s0", "s0-b")
                assert session.scalar(name_of(key)) == "new"
                fresh = shop.servers.node("s0-b")
                fresh.stop()
                try:
                    until(lambda: not router.monitor.health.of("s0-b").is_readable)
                    ran.clear()
                    assert session.scalar(name_of(key)) == "new"
                    assert ran.nodes == ["s0-a"]
                finally:
                    fresh.start()
        finally:
            stale.hold_replay(0)

    def test_a_read_after_a_rollback_is_not_older(
        self, key: int, held: Shop, router: Router
    ) -> None:
        """What a rolled back transaction has read on the primary was seen, too."""
        with router.sessionmaker()() as session:
            rename(session, key, "new")
        with router.sessionmaker()() as session:
            session.begin()
            assert session.scalar(name_of(key)) == "new"
            session.rollback()
            assert session.scalar(name_of(key)) == "new"

    @pytest.mark.parametrize("level", ["eventual", "bounded"])
    def test_a_read_of_less_consistency_forgets_nothing(
        self, key: int, held: Shop, router: Router, level: str
    ) -> None:
        """It may be old; the next one may not be older than the one before it."""
        with router.sessionmaker()() as session:
            rename(session, key, "new")
        with router.sessionmaker()() as session:
            with session.consistency("strong"):
                assert session.scalar(name_of(key)) == "new"
            with session.consistency(level):
                assert session.scalar(name_of(key)) == "old"
            assert session.scalar(name_of(key)) == "new"
            token = session.token
        with router.sessionmaker(token=token)() as session:
            assert session.scalar(name_of(key)) == "new"

    def test_an_eventual_scatter_in_a_transaction_forgets_nothing(
        self, key: int, held: Shop, router: Router
    ) -> None:
        with router.sessionmaker()() as session:
            rename(session, key, "new")
        with router.sessionmaker()() as session:
            with session.consistency("strong"):
                assert session.scalar(name_of(key)) == "new"
            session.commit()
            with session.begin(read_only=True), session.consistency("eventual"):
                assert session.scalars(select(Customer.name)).all() == ["old"]
            assert session.scalar(name_of(key)) == "new"

    def test_a_token_that_its_shard_has_never_got_to(self, router: Router, key: int) -> None:
        """After the restore of a backup on the same timeline, say."""
        position = router.monitor.ask("s0", 1.0).primary("s0")
        assert position is not None
        ahead = Position("s0", 0, position.timeline, position.lsn + 2**30)
        with (
            router.sessionmaker(token=Token((ahead,)))() as session,
            pytest.raises(ForeignToken, match="whose primary has got to"),
        ):
            session.scalar(name_of(key))

    def test_what_others_commit_asynchronously_is_not_unseen(
        self, shop: Shop, router: Router, key: int
    ) -> None:
        """It is visible on the primary before it is flushed, so before a replica can have it."""
        shop.on("s0", "ALTER SYSTEM SET wal_writer_delay = '10s'; ")
        shop.on("s0", "SELECT pg_reload_conf()")
        try:
            for number in range(10):
                rename_it = f"UPDATE customer SET name = '{number}' WHERE id = {key}"
                shop.on("s0", f"SET synchronous_commit = off; {rename_it}")
                with router.sessionmaker()() as session:
                    with session.begin():
                        assert session.scalar(name_of(key)) == str(number)
                    assert session.scalar(name_of(key)) == str(number)
                    token = session.token
                with router.sessionmaker(token=token)() as session:
                    assert session.scalar(name_of(key)) == str(number)
                with router.sessionmaker()() as session:
                    with session.consistency("strong"):
                        assert session.scalar(name_of(key)) == str(number)
                    assert session.scalar(name_of(key)) == str(number)
        finally:
            shop.on("s0", "ALTER SYSTEM RESET wal_writer_delay; ")
            shop.on("s0", "SELECT pg_reload_conf()")

    @pytest.mark.parametrize("options", [{"sqlroute_role": "primary"}, {}])
    def test_a_write_after_a_streamed_read_is_seen(
        self, key: int, held: Shop, router: Router, options: dict[str, Any]
    ) -> None:
        """The stream's transaction on a primary is one like any other."""
        level = "session" if options else "strong"
        with router.sessionmaker(consistency=level)() as session:
            streamed = name_of(key).execution_options(yield_per=10, **options)
            assert session.scalars(streamed).all() == ["old"]
            session.execute(update(Customer).where(Customer.id == key).values(name="new"))
            with session.consistency("session"):
                assert session.scalar(name_of(key)) == "new"
                session.commit()
                assert session.scalar(name_of(key)) == "new"

    def test_without_reads_nothing_is_asked(self, shop: Shop, router: Router, key: int) -> None:
        with router.sessionmaker()() as session:
            assert not session.token
            rename(session, key, "new")
            known = session._affinity.token
            assert known.of("s0") is not None
            router.monitor.close()  # nobody to ask
            assert session.token == known
            router.monitor.start()

    @pytest.mark.parametrize("wrong", [b"s0@1.1.0/1", 5, ["s0@1.1.0/1"]])
    def test_a_token_that_is_no_text(self, router: Router, wrong: Any) -> None:
        with pytest.raises(InvalidToken, match="a token is a text"):
            router.sessionmaker(token=wrong)()

    def test_a_token_that_is_none(self, router: Router) -> None:
        for wrong in ("nonsense", "s0@1.1", "s0@1.1.0/1;DROP TABLE customer"):
            with pytest.raises(InvalidToken, match="no part of a token"):
                router.sessionmaker(token=wrong)()

    def test_a_token_of_other_servers(self, router: Router, key: int, ran: Ran) -> None:
        """An unknown shard at once; another cluster before anything is sent."""
        with pytest.raises(ForeignToken, match=r"shard 'moon'.*\(s0, s1\)"):
            router.sessionmaker(token="moon@1.1.0/1")()
        ran.clear()
        with router.sessionmaker(token="s0@1.1.0/1.abcdef")() as session:
            for statement in (name_of(key), update(Customer).where(Customer.id == key)):
                with pytest.raises(ForeignToken, match="made by cluster abcdef"):
                    session.execute(statement.values(name="x") if statement.is_dml else statement)
        assert ran.statements == []

    def test_a_token_from_a_newer_map(self, shop: Shop, router: Router, key: int) -> None:
        """A router with an older map reads it anew before it routes."""
        shop.on("s0", "UPDATE sqlroute.keyspace SET epoch = epoch + 1")
        shop.on("s1", "UPDATE sqlroute.keyspace SET epoch = epoch + 1")
        with router.sessionmaker()() as session:
            epoch = int(shop.on("s0", "SELECT epoch FROM sqlroute.keyspace")[0][0])
            session.follow(Token((Position("s0", epoch, 0, 0),)))
            assert session.explain(name_of(key)).epoch == epoch

    def test_async(self, key: int, held: Shop, make_router: Callable[..., Router]) -> None:
        renamed = update(Customer).where(Customer.id == key).values(name="new")

        async def body() -> None:
            router = make_router()
            async with router:
                async with router.async_sessionmaker()() as session:
                    await session.execute(renamed)
                    await session.commit()
                    token = await session.token
                async with router.async_sessionmaker(token=str(token))() as session:
                    assert await session.scalar(name_of(key)) == "new"
                    with session.consistency("eventual"):
                        assert await session.scalar(name_of(key)) == "old"
                    with session.reading(), pytest.raises(ReadOnlyRefused):
                        await session.execute(renamed)

        asyncio.run(body())


class TestUnknown:
    """Named with the rule, before anything is sent; the session stays usable."""

    def test_names(self, router: Router, key: int, ran: Ran) -> None:
        with pytest.raises(UnknownName, match="unknown consistency 'strict'; known: eventual"):
            router.sessionmaker(consistency="strict")()
        with pytest.raises(UnknownName, match="unknown intent 'read'; known: automatic"):
            router.sessionmaker(intent="read")()
        ran.clear()
        with router.sessionmaker()() as session:
            with pytest.raises(UnknownName, match="unknown consistency 'strict'"):
                session.consistency("strict")
            for options, message in [
                ({"sqlroute_consistency": "strict"}, "unknown consistency 'strict'"),
                ({"sqlroute_role": "master"}, "unknown role 'master'; known: primary, replica"),
                (
                    {"sqlroute_rôle": "primary"},
                    "unknown execution option sqlroute_rôle; known: sql",
                ),
            ]:
                with pytest.raises(UnknownName, match=message):
                    session.scalar(name_of(key), execution_options=options)
            assert ran.statements == []
            assert session.scalar(name_of(key)) == "old"

    def test_no_eligible_node_says_what_the_replicas_lack(
        self, key: int, held: Shop, make_router: Callable[..., Router]
    ) -> None:
        router = make_router(primary_fallback=False, max_lag=60)
        with router.sessionmaker()() as session:
            rename(session, key, "new")
            with pytest.raises(NoEligibleNode, match="not known to have replayed what the session"):
                session.scalar(name_of(key))
