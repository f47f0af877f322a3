"""Questions that are asked again whenever their last answer expires."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sqlroute.runtime import inquiry
from sqlroute.runtime.inquiry import Inquiry, NoAnswer, Reply


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Oracle:
    """Answers what it is told to, as often as it is asked."""

    def __init__(self) -> None:
        self.names = frozenset({"a"})
        self.answers: dict[str, Reply[str] | Exception] = {"a": Reply("one", math.inf)}
        self.asked: list[str] = []
        self.changes = 0
        self.fault: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.inquiry: Inquiry[str] = Inquiry("news", lambda: self.names, self.ask, self.note)

    def ask(self, name: str) -> Reply[str]:
        answer = self.answers[name]
        self.asked.append(name)
        self.may_answer.wait(5)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def note(self) -> None:
        self.changes += 1
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Oracle]:
    monkeypatch.setattr(inquiry, "PATIENCE", 0.01)
    found = Oracle()
    yield found
    found.may_answer.set()
    found.inquiry.close()


def test_an_answer_for_ever_is_not_asked_for_again(oracle: Oracle) -> None:
    """Until somebody knows better; then once."""
    assert oracle.inquiry.start().wait(5)
    assert oracle.inquiry.known == {"a": "one"}
    oracle.answers["a"] = Reply("two", math.inf)
    oracle.inquiry.wake()
    oracle.names = frozenset({"a", "b"})
    oracle.answers["b"] = Reply("other", math.inf)
    oracle.inquiry.wake()
    until(lambda: "b" in oracle.inquiry.known)
    assert oracle.inquiry.known["a"] == "one"
    oracle.inquiry.renew("a")
    until(lambda: oracle.inquiry.known["a"] == "two")

    assert oracle.asked == ["a", "b", "a"]
    assert oracle.changes == 3


def test_what_is_renewed_while_it_is_asked_for_is_asked_for_again(oracle: Oracle) -> None:
    """The answer that is on its way may be from before."""
    oracle.may_answer.clear()
    oracle.inquiry.start()
    until(lambda: oracle.asked == ["a"])
    oracle.answers["a"] = Reply("two", math.inf)
    oracle.inquiry.renew("a")
    oracle.may_answer.set()
    until(lambda: oracle.inquiry.known.get("a") == "two")

    assert oracle.asked == ["a", "a"]


def test_what_is_not_wanted_any_more_is_forgotten(oracle: Oracle) -> None:
    oracle.names = frozenset({"a", "b"})
    oracle.answers["b"] = Reply("other", math.inf)
    oracle.inquiry.start().wait(5)
    oracle.names = frozenset({"b"})
    oracle.inquiry.wake()
    until(lambda: oracle.inquiry.known == {"b": "other"})


@pytest.mark.parametrize("failure", [NoAnswer("away"), RuntimeError("a fault of ours")])
def test_a_failure_changes_nothing_and_is_tried_again(
    oracle: Oracle, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it keep the others from being asked for."""
    oracle.inquiry.start().wait(5)
    oracle.names = frozenset({"a", "b"})
    oracle.answers |= {"a": failure, "b": Reply("other", math.inf)}
    oracle.inquiry.renew("a")
    until(lambda: oracle.asked.count("a") > 3)
    assert oracle.inquiry.known == {"a": "one", "b": "other"}
    oracle.answers["a"] = Reply("two", math.inf)
    until(lambda: oracle.inquiry.known["a"] == "two")

    assert str(failure) in caplog.text


def test_who_fails_at_the_news_is_told_the_next(
    oracle: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on asking."""
    oracle.fault = RuntimeError("a fault of the listener's")
    oracle.inquiry.start().wait(5)
    oracle.answers["a"] = Reply("two", math.inf)
    oracle.inquiry.renew("a")
    until(lambda: oracle.changes == 2)

    assert "a fault of the listener's" in caplog.text


def test_after_its_end_nothing_is_told(oracle: Oracle) -> None:
    """Of an answer that was on its way; it can be started again."""
    oracle.may_answer.clear()
    oracle.inquiry.start()
    until(lambda: oracle.asked == ["a"])
    oracle.inquiry.close()
    oracle.may_answer.set()
    until(lambda: not any(t.name == "sqlroute news" for t in threading.enumerate()))
    assert oracle.changes == 0
    oracle.inquiry.renew("a")
    until(lambda: oracle.changes == 1)


def test_without_a_name_there_is_no_thread(oracle: Oracle) -> None:
    """And nothing to wait for."""
    oracle.names = frozenset()
    before = threading.active_count()
    assert oracle.inquiry.start().is_set()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_the_answers_and_asks_anew(oracle: Oracle) -> None:
    """Its parent's thread is not there."""
    oracle.inquiry.start().wait(5)
    child = os.fork()
    if child == 0:
        oracle.inquiry.forget()
        kept = dict(oracle.inquiry.known)
        oracle.answers["a"] = Reply("two", math.inf)
        oracle.inquiry.renew("a")
        deadline = time.monotonic() + 5
        while oracle.inquiry.known["a"] != "two" and time.monotonic() < deadline:
            time.sleep(0.002)
        os._exit(0 if kept == {"a": "one"} and oracle.inquiry.known["a"] == "two" else 1)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
