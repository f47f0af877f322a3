"""What a caller asks of a session: consistency, intents, settings, and tokens to follow.

All of it is noted here and read elsewhere: demands by the planner, settings by the connections,
tokens by the choice of a node. Only :attr:`Asking.token` may ask a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlroute.errors import ForeignToken, TokenError
from sqlroute.routing.policy import Consistency, Demand, Intent, consistency_named, intent_named
from sqlroute.routing.token import Token
from sqlroute.runtime.limits import Limit

if TYPE_CHECKING:
    from sqlroute.router import Router
    from sqlroute.routing.affinity import Affinity
    from sqlroute.runtime.engines import Engines
    from sqlroute.runtime.settings import Settings


class Asking:
    """The part of a session that a caller speaks to beside SQLAlchemy's."""

    _router: Router
    _routes: Engines
    _affinity: Affinity
    _settings: Settings
    _transaction: Any
    _demand: Demand
    _base: Demand
    _blocks: tuple[dict[str, Any], ...] = ()
    _written: Token = Token()
    _limit: Limit | None = None
    refused_token: TokenError | None = None
    """The last error by which a token that the session follows was refused."""
    missing_shards: tuple[str, ...] = ()
    """The shards that the last statement with ``sqlroute_partial`` was answered without.

    Those of its eager loads are among them, as soon as its rows were fetched.
    """

    def _ask(
        self,
        demand: Demand,
        consistency: Consistency | str | None,
        intent: Intent | str | None,
    ) -> None:
        """Start with what the router asks for, over it what the session was made with."""
        if consistency is not None:
            demand = replace(demand, consistency=consistency_named(consistency))
        if intent is not None:
            demand = replace(demand, intent=intent_named(intent))
        self._demand = self._base = demand

    @property
    def token(self) -> Token:
        """What the session has seen: a later reader who follows it misses nothing of that.

        After a commit it is known already. After a read of something else the node that answered
        is asked how far it is, so that what was read is never missed either: one probe.

        Raises:
            NoEligibleNode: that node is gone, and the primary too.
        """
        self._affinity = self._router.observed(self._affinity, self._routes)
        return self._affinity.token

    @property
    def written(self) -> Token:
        """What the session has committed itself; false if nothing. Asks no server."""
        return self._written

    def follow(self, token: Token | str) -> None:
        """Never read a state from before a token from now on, beside what was seen already.

        Raises:
            InvalidToken: the text is none.
            ForeignToken: it names a shard that the topology does not have. That it was made by
                another cluster is found by the first statement.
        """
        given = token if isinstance(token, Token) else Token.parse(token)
        known = self._router.topology.keyspace_of_shard
        for position in given.positions:
            if position.shard not in known:
                raise ForeignToken(
                    f"the token names shard {position.shard!r}, which the topology does not have "
                    f"({', '.join(known)}); drop the token"
                )
        for position in given.positions:
            self._affinity = self._affinity.seen(position)

    def consistency(self, consistency: Consistency | str) -> AbstractContextManager[None]:
        """Read with another consistency within a ``with`` block.

        Raises:
            UnknownName: there is no such consistency.
        """
        return self._demanding(consistency=consistency_named(consistency))

    def reading(self) -> AbstractContextManager[None]:
        """Declare a ``with`` block to read only: a write in it is refused before it is sent."""
        return self._demanding(intent=Intent.READING)

    def writing(self) -> AbstractContextManager[None]:
        """Declare that a ``with`` block will write: its reads go to the primary at once."""
        return self._demanding(intent=Intent.WRITING)

    def lag_tolerant(self) -> AbstractContextManager[None]:
        """Declare a ``with`` block to read only, and data of any age."""
        return self._demanding(intent=Intent.LAG_TOLERANT)

    @contextmanager
    def _demanding(self, **changes: Any) -> Iterator[None]:
        self._blocks = (*self._blocks, changes)
        self._demand = self._demanded()
        try:
            yield
        finally:  # blocks need not end in the order in which they began
            self._blocks = tuple(block for block in self._blocks if block is not changes)
            self._demand = self._demanded()

    def _demanded(self) -> Demand:
        """Return what is asked for: of the session, its transaction and the blocks it is in."""
        changes = {name: value for block in self._blocks for name, value in block.items()}
        return replace(self._base, **changes) if changes else self._base

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Wait for nothing in a ``with`` block beyond so many seconds from now.

        Neither for a connection, nor for a primary, nor for a server's answer: a connection whose
        server does not answer in time is cut, and the transaction there is over. A session made
        with ``deadline=`` has one from its making on; a block can only shorten it.

        Raises:
            UnknownName: not a number of seconds above 0.
            DeadlineExceeded: from the statement that would take longer. What it did before may
                have been done; of a COMMIT nobody knows.
        """
        before = self._limit
        self._limited_by(Limit.after(seconds, before))
        try:
            yield
        finally:
            self._limited_by(before)

    def _limited_by(self, limit: Limit | None) -> None:
        """Give a limit to the session, and to the connections of its transaction."""
        self._limit = limit
        transaction: Any = self._transaction
        for connection, *_ in transaction._connections.values() if transaction else ():
            if not connection.closed and not connection.invalidated:
                connection.connection.driver_connection.sqlroute_limit = limit

    def settings(self, **settings: Any) -> AbstractContextManager[None]:
        """Give run-time parameters to every connection that the session takes from now on.

        ``session.settings(**{"app.tenant": "7"})`` holds for the rest of the session, or as a
        ``with`` block until its end. They reach replicas and shards alike before the first
        statement there, and the server undoes them at the end of each transaction. Reads with
        settings need a transaction of their own: three round trips instead of one. A connection
        of the transaction under way is given them before its next statement.

        Args:
            settings: names, with dots as they are, and values: text, numbers or bools.

        Raises:
            SettingRefused: a setting that sessions may not carry.
        """
        return self._settings.want(settings)
