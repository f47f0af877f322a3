"""Merge sorted rows of several shards block by block.

The heap of a textbook compares and moves each row by Python code. Here each part gives a block of
rows at a time, and of all blocks what surely comes before everything unread is sorted at once:
``sorted`` finds the runs that are there already, and merges them in C. Parts whose blocks come to
their end at about the same time are read together, so that servers may work at the same time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from sqlroute.routing.ordering import BlockKey

BLOCK = 250
"""Rows that are taken from a part at a time."""


Read = Callable[[Mapping[int, Callable[[], None]]], object]
"""Calls functions that each read a block of the part of that index; in any order, or at once."""


def in_order(
    parts: Sequence[Iterable[Any]],
    keys_of: BlockKey,
    block: int = BLOCK,
    read: Read | None = None,
) -> Iterator[Any]:
    """Return the rows of all parts in order; ties come in the order of the parts.

    Args:
        parts: rows, sorted by their keys.
        keys_of: the keys of some rows.
        block: rows that are read of each part at a time.
        read: reads of several parts at once, where up to half a block is left of them; by default
            each is read when it has run out.
    """
    return chain.from_iterable(_runs(parts, keys_of, block, read))


def _runs(
    parts: Sequence[Iterable[Any]], keys_of: BlockKey, block: int, read: Read | None
) -> Iterator[Iterator[Any]]:
    every = [_Head(part, keys_of) for part in parts]
    enough = 0 if read is None else block // 2
    while True:
        if not all(head.left or head.is_over for head in every):
            low = [i for i, head in enumerate(every) if head.left <= enough and not head.is_over]
            fills = {i: partial(every[i].fill, block) for i in low}
            if read is None:
                for fill in fills.values():
                    fill()
            else:
                read(fills)
        heads = [head for head in every if head.left]
        if not heads:
            return
        bound = min(head.keys[-1] for head in heads)
        rows: list[Any] = []
        keys: list[Any] = []
        is_after = False
        for head in heads:
            # what ties with the bound may go on in the part that has it: its own tie behind that
            # block, and so must those of the parts after it
            end = (bisect_left if is_after else bisect_right)(head.keys, bound, head.start)
            is_after = is_after or end == len(head.keys)
            rows += head.rows[head.start : end]
            keys += head.keys[head.start : end]
            head.start = end
        yield map(rows.__getitem__, sorted(range(len(keys)), key=keys.__getitem__))


class _Head:
    """What has been read of a part, and not been taken.

    Attributes:
        rows, keys: that were read last.
        start: how many of them were taken.
        is_over: there are no more.
    """

    __slots__ = ("_keys_of", "_rows", "is_over", "keys", "rows", "start")

    def __init__(self, part: Iterable[Any], keys_of: BlockKey) -> None:
        self._rows, self._keys_of = iter(part), keys_of
        self.rows: list[Any] = []
        self.keys: list[Any] = []
        self.start = 0
        self.is_over = False

    @property
    def left(self) -> int:
        return len(self.keys) - self.start

    def fill(self, block: int) -> None:
        """Read the next block."""
        rows = list(islice(self._rows, block))
        self.is_over = len(rows) < block
        self.rows = self.rows[self.start :] + rows
        self.keys = self.keys[self.start :] + self._keys_of(rows)
        self.start = 0
