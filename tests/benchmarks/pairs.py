"""Time two functions in turn and compare the medians."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

_Pair = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: the ratio of two medians, or a number of its own with a unit.

    Attributes:
        limit: what the value may be at most.
        spread: first and third quartile: of the ratio over rounds, of a number over its samples.
        unit: of the value; empty for a ratio.
        routed_us, plain_us: medians in microseconds, for orientation only.
        notes: what else was seen, one line each.
    """

    name: str
    value: float
    limit: float
    spread: tuple[float, float]
    unit: str = ""
    routed_us: float | None = None
    plain_us: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit

    def document(self) -> dict[str, Any]:
        what = "value" if self.unit else "ratio"
        found: dict[str, Any] = {
            "name": self.name,
            what: round(self.value, 3),
            "limit": self.limit,
            "met": self.is_met,
            f"{what}_quartiles": [round(value, 3) for value in self.spread],
        }
        if self.unit:
            found["unit"] = self.unit
        if self.routed_us is not None and self.plain_us is not None:
            found["routed_us"] = round(self.routed_us, 1)
            found["plain_us"] = round(self.plain_us, 1)
        if self.notes:
            found["notes"] = list(self.notes)
        return found

    def lines(self) -> Iterator[str]:
        """Yield the figure for people."""
        low, high = self.spread
        digits = 1 if self.unit else 3
        times = ""
        if self.routed_us is not None and self.plain_us is not None:
            times = f"  [{self.routed_us:.0f} us against {self.plain_us:.0f} us]"
        yield (
            f"{self.name:30} {self.value:7.{digits}f} {self.unit:11} (limit {self.limit:g}, "
            f"quartiles {low:.2f} to {high:.2f})  {'ok' if self.is_met else 'OVER'}{times}"
        )
        for note in self.notes:
            yield f"{'':30} {note}"


def compare(
    name: str,
    limit: float,
    routed: Callable[[int], object],
    plain: Callable[[int], object],
    *,
    rounds: int = 30,
    calls: int = 100,
) -> Figure:
    """Return the ratio of the medians of two functions that take a running number."""
    for i in range(calls):
        routed(i)
        plain(i)
    times: _Pair = ([], [])
    busy: _Pair = ([], [])
    ratios: list[float] = []
    gc.collect()
    for number in range(rounds):
        spent = []
        for side in (0, 1) if number % 2 else (1, 0):
            function = (routed, plain)[side]
            began = time.thread_time()
            own = [_one(function, number * calls + i) for i in range(calls)]
            busy[side].append((time.thread_time() - began) / calls)
            times[side].extend(own)
            spent.append((side, median(own)))
        sides = dict(spent)
        ratios.append(sides[0] / sides[1])
    return _figure(name, limit, times, busy, ratios)


async def compare_async(
    name: str,
    limit: float,
    routed: Callable[[int], Awaitable[object]],
    plain: Callable[[int], Awaitable[object]],
    *,
    rounds: int = 30,
    calls: int = 100,
) -> Figure:
    """Do the same with coroutines, one after another."""
    for i in range(calls):
        await routed(i)
        await plain(i)
    times: _Pair = ([], [])
    busy: _Pair = ([], [])
    ratios: list[float] = []
    gc.collect()
    for number in range(rounds):
        sides: dict[int, float] = {}
        for side in (0, 1) if number % 2 else (1, 0):
            function = (routed, plain)[side]
            own, began = [], time.thread_time()
            for i in range(calls):
                start = time.perf_counter()
                await function(number * calls + i)
                own.append(time.perf_counter() - start)
            busy[side].append((time.thread_time() - began) / calls)
            times[side].extend(own)
            sides[side] = median(own)
        ratios.append(sides[0] / sides[1])
        await asyncio.sleep(0)
    return _figure(name, limit, times, busy, ratios)


def _one(function: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    function(number)
    return time.perf_counter() - start


def _figure(name: str, limit: float, times: _Pair, busy: _Pair, ratios: list[float]) -> Figure:
    low, _, high = quantiles(ratios, n=4)
    routed, plain = median(times[0]) * 1e6, median(times[1]) * 1e6
    own, other = median(busy[0]) * 1e6, median(busy[1]) * 1e6
    note = f"processor time of the thread: {own:.0f} us against {other:.0f} us, {own / other:.3f}"
    return Figure(
        name,
        routed / plain,
        limit,
        (low, high),
        routed_us=routed,
        plain_us=plain,
        notes=(note,),
    )


def figure_of(
    name: str, limit: float, samples: Sequence[float], unit: str, notes: tuple[str, ...] = ()
) -> Figure:
    """Return the median of samples, which are numbers of a unit, as a figure."""
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return Figure(name, middle, limit, (low, high), unit, notes=notes)
