"""Questions that are asked again whenever their last answer expires, in a thread of their own.

What was answered is kept until there is another answer: a failure changes nothing, since whoever is
asked may be away for a minute and must not take the databases with it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

log = logging.getLogger("sqlroute.discovery")

PATIENCE = 5.0
"""Seconds after which a question without an answer is asked again."""

V = TypeVar("V")


class Reply(NamedTuple, Generic[V]):
    """An answer.

    Attributes:
        value: compared with the one before: equal values are no news.
        seconds: for which it may be believed.
    """

    value: V
    seconds: float


class NoAnswer(OSError):
    """Whoever was asked says nothing, or nothing of use."""


class Inquiry(Generic[V]):
    """Asks for some things, each by its name, again and again.

    The thread is started only when there is something to ask for.

    Args:
        what: is asked for, as the log is to call it.
        names: returns what to ask for now.
        ask: returns the reply for a name; raises ``OSError`` if there is none.
        on_change: called from the thread when an answer is another one than before.
    """

    _lock: threading.Lock
    _all_asked: threading.Event
    _life: _Life | None

    def __init__(
        self,
        what: str,
        names: Callable[[], frozenset[str]],
        ask: Callable[[str], Reply[V]],
        on_change: Callable[[], None],
    ) -> None:
        self.what = what
        self.known: Mapping[str, V] = {}
        self._names = names
        self._ask = ask
        self._on_change = on_change
        self._failing: set[str] = set()
        self._due: dict[str, float] = {}
        self._make_locks()

    def __repr__(self) -> str:
        return f"<Inquiry for {self.what}, {len(self.known)} of {len(self._names())} known>"

    def start(self) -> threading.Event:
        """Start the thread, if there is something to ask for and it does not run: all is due then.

        Returns:
            What is set while all was asked for, with or without an answer.
        """
        if not self._names():
            self._all_asked.set()
            return self._all_asked
        with self._lock:
            if self._life is None:
                self._life, self._due = _Life(), {}
                name = f"sqlroute {self.what}"
                threading.Thread(
                    target=self._run, args=(self._life,), name=name, daemon=True
                ).start()
        return self._all_asked

    def renew(self, name: str) -> None:
        """Ask for something now: the answer before may be old."""
        with self._lock:
            self._due.pop(name, None)
            self._all_asked.clear()
        self.start()
        self.wake()

    def wake(self) -> None:
        """Look again what there is to ask for."""
        life = self._life
        if life is not None:
            life.news.set()

    def close(self) -> None:
        """End the thread, after the question whose answer it may be waiting for."""
        with self._lock:
            life, self._life = self._life, None
        if life is not None:
            life.is_over = True
            life.news.set()

    def forget(self) -> None:
        """Start anew in a child after a fork, where the thread is not; the answers are kept."""
        self._make_locks()

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # over what is due, and over who asks; never over a question
        self._all_asked = threading.Event()
        self._life = None

    def _run(self, life: _Life) -> None:
        while not life.is_over:
            life.news.clear()
            try:
                self._look(life)
            except Exception:  # of on_change: the thread goes on
                log.exception("%s: the news cannot be used, by a fault of sqlroute", self.what)
            life.news.wait(min(self._pause(time.monotonic()), threading.TIMEOUT_MAX))

    def _pause(self, now: float) -> float:
        """Return how long nothing is due; then all was asked for."""
        with self._lock:
            due = min((self._due.get(name, now) for name in self._names()), default=math.inf)
            if due > now:
                self._all_asked.set()
        return max(due - now, 0.0)

    def _look(self, life: _Life) -> None:
        """Ask for what is due; tell once if any answer is another."""
        names, before = self._names(), self.known
        known = {name: value for name, value in before.items() if name in names}
        for name in sorted(names):
            if life.is_over:
                return
            if self._take(name, time.monotonic()):
                reply = self._reply(name)
                if reply is not None:
                    known[name] = reply.value
                self._put_off(name, PATIENCE if reply is None else reply.seconds)
        if life.is_over:
            return
        with self._lock:
            self._due = {name: at for name, at in self._due.items() if name in names}
        self.known = known
        if known != before:
            self._on_change()

    def _take(self, name: str, now: float) -> bool:
        """Say if something is due, and that it is being asked for: :meth:`renew` undoes that."""
        with self._lock:
            is_due = self._due.get(name, now) <= now
            if is_due:
                self._due[name] = math.inf
        return is_due

    def _put_off(self, name: str, seconds: float) -> None:
        with self._lock:
            if name in self._due:
                self._due[name] = time.monotonic() + seconds

    def _reply(self, name: str) -> Reply[V] | None:
        try:
            reply = self._ask(name)
        except OSError as error:
            if name not in self._failing:
                self._failing.add(name)
                log.warning("%s of %s: no answer, nothing changes: %s", self.what, name, error)
            return None
        except Exception:  # the thread goes on, and asks for the others
            log.exception("%s of %s: failed by a fault of sqlroute", self.what, name)
            return None
        if name in self._failing:
            self._failing.discard(name)
            log.info("%s of %s: there are answers again", self.what, name)
        if reply.value != self.known.get(name):
            log.info("%s of %s: %s", self.what, name, reply.value)
        return reply


class _Life:
    """One life of the thread."""

    def __init__(self) -> None:
        self.news = threading.Event()
        self.is_over = False
