"""Time two functions in turn and compare the medians."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: the ratio of two medians.

    Attributes:
        limit: what the ratio may be at most.
        routed_us, plain_us: medians in microseconds, for orientation only.
        spread: first and third quartile of the ratio over rounds.
    """

    name: str
    ratio: float
    limit: float
    routed_us: float
    plain_us: float
    spread: tuple[float, float]

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.limit

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "limit": self.limit,
            "met": self.is_met,
            "routed_us": round(self.routed_us, 1),
            "plain_us": round(self.plain_us, 1),
            "ratio_quartiles": [round(value, 3) for value in self.spread],
        }


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
    times: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    gc.collect()
    for number in range(rounds):
        spent = []
        for side in (0, 1) if number % 2 else (1, 0):
            function = (routed, plain)[side]
            own = [_one(function, number * calls + i) for i in range(calls)]
            times[side].extend(own)
            spent.append((side, median(own)))
        sides = dict(spent)
        ratios.append(sides[0] / sides[1])
    return _figure(name, limit, times, ratios)


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
    times: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    gc.collect()
    for number in range(rounds):
        sides: dict[int, float] = {}
        for side in (0, 1) if number % 2 else (1, 0):
            function = (routed, plain)[side]
            own = []
            for i in range(calls):
                start = time.perf_counter()
                await function(number * calls + i)
                own.append(time.perf_counter() - start)
            times[side].extend(own)
            sides[side] = median(own)
        ratios.append(sides[0] / sides[1])
        await asyncio.sleep(0)
    return _figure(name, limit, times, ratios)


def _one(function: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    function(number)
    return time.perf_counter() - start


def _figure(
    name: str, limit: float, times: tuple[list[float], list[float]], ratios: list[float]
) -> Figure:
    low, _, high = quantiles(ratios, n=4)
    routed, plain = median(times[0]) * 1e6, median(times[1]) * 1e6
    return Figure(name, routed / plain, limit, routed, plain, (low, high))
