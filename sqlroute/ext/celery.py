"""Celery tasks that read what their publisher has seen.

The token travels in a header of the message (:func:`carrying`); :meth:`RoutedTask.session` makes a
session that goes by it. A router may be made before the workers fork: each process opens its own
connections. Brokers are trusted, so nothing is signed here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Task
from celery.exceptions import Retry

from sqlroute.errors import ForeignToken, InvalidToken, UnknownName
from sqlroute.routing.balancing import Required, candidates
from sqlroute.routing.policy import Consistency
from sqlroute.routing.token import Token

HEADER = "sqlroute-token"
"""The message header with the text of the token."""

_DELAYED = "sqlroute-delayed"
_CONSISTENCIES = ("always", "sticky", "delayed")

log = logging.getLogger("sqlroute.celery")


def carrying(token: Token | str) -> dict[str, Any]:
    """Return the options that make a message carry a token.

    ``task.apply_async((1,), **carrying(session.token))``, and ``.set(**carrying(...))`` for
    signatures. Take the token after the commit that the task is to see.
    """
    return {"headers": {HEADER: str(token)}}


class RoutedTask(Task):  # type: ignore[misc]  # celery has no types
    """A task whose sessions have seen what its publisher had.

    ``Celery(task_cls=...)`` or ``@app.task(base=..., bind=True)`` with a subclass that has
    ``sessions``.

    Attributes:
        sessions: what makes sessions, ``router.sessionmaker()``.
        data_consistency: ``"always"``: it reads from the primary. ``"sticky"``: from a replica that
            has what the publisher has seen, else from the primary. ``"delayed"``: where no replica
            has it yet the task comes again, once, after ``delay``; then as sticky. A message
            without a token has seen nothing.
        delay: seconds.
    """

    abstract = True
    sessions: Callable[..., Any]
    data_consistency = "sticky"
    delay = 1.0

    def session(self, **options: Any) -> Any:
        """Return a new session for this run: ``with self.session() as session:``.

        A token that cannot be followed is as good as none: the session reads from the primary.

        Args:
            options: of the session.

        Raises:
            UnknownName: no such ``data_consistency``.
        """
        if self.data_consistency not in _CONSISTENCIES:
            known = ", ".join(_CONSISTENCIES)
            raise UnknownName(
                f"unknown data_consistency {self.data_consistency!r} of task {self.name}; "
                f"known: {known}"
            )
        if self.data_consistency == "always":
            options.setdefault("consistency", "strong")
        found = self.sessions(**options)
        try:
            found.follow((self.request.headers or {}).get(HEADER) or "")
        except (InvalidToken, ForeignToken) as error:
            log.warning("task %s reads from the primary: %s", self.name, error)
            found.close()
            return self.sessions(**{**options, "consistency": "strong"})
        return found

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Put a delayed task off, once, while no replica has what its publisher has seen.

        Raises:
            Retry: tells the worker that the task comes again; its retries are not counted up.
        """
        super().before_start(task_id, args, kwargs)
        request = self.request
        headers = request.headers or {}
        if self.data_consistency != "delayed" or request.is_eager or _DELAYED in headers:
            return
        if self._is_fresh(headers.get(HEADER) or ""):
            return
        again = self.signature_from_request(
            request,
            args,
            kwargs,
            countdown=self.delay,
            retries=request.retries,
            headers={**headers, _DELAYED: True},
        )
        again.apply_async()
        raise Retry("no replica has what the publisher has seen", when=self.delay, sig=again)

    def _is_fresh(self, text: str) -> bool:
        """Say if each shard of a token has a replica that has it, or the token is none."""
        with self.sessions() as session:
            router = session.router
        try:
            positions = Token.parse(text).positions
        except InvalidToken:
            return True
        for position in positions:
            if position.shard not in router.topology.keyspace_of_shard:
                return True
            health = router.monitor.ask(position.shard, router.policy.probe_deadline)
            required = Required(position, frozenset(), None)
            found = candidates(
                position.shard,
                health,
                router.topology,
                router.policy,
                Consistency.SESSION,
                required,
                frozenset(),
            )
            if not found.fresh:
                return False
        return True
