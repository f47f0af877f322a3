"""Merge sorted rows of several shards block by block.

The heap of a textbook compares and moves each row by Python code. Here each part gives a block of
rows at a time, and of all blocks what surely comes before everything unread is sorted at once:
``sorted`` finds the runs that are there already, and merges them in C.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from sqlroute.routing.ordering import BlockKey

BLOCK = 250
"""Rows that are taken from a part at a time."""


def in_order(
    parts: Sequence[Iterable[Any]], keys_of: BlockKey, block: int = BLOCK
) -> Iterator[Any]:
    """Return the rows of all parts in order; ties come in the order of the parts.

    Args:
        parts: rows, sorted by their keys.
        keys_of: the keys of some rows.
        block: rows that are held of each part at a time.
    """
    return chain.from_iterable(_runs(parts, keys_of, block))


def _runs(parts: Sequence[Iterable[Any]], keys_of: BlockKey, block: int) -> Iterator[Iterator[Any]]:
    heads = [head for part in parts if (head := _Head(part, keys_of, block)).fill()]
    while heads:
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
        heads = [head for head in heads if head.start < len(head.keys) or head.fill()]


class _Head:
    """A part of which one block has been read.

    Attributes:
        rows, keys: of the block.
        start: how many of them were taken.
    """

    __slots__ = ("_block", "_keys_of", "_rows", "keys", "rows", "start")

    def __init__(self, part: Iterable[Any], keys_of: BlockKey, block: int) -> None:
        self._rows, self._keys_of, self._block = iter(part), keys_of, block
        self.rows: list[Any] = []
        self.keys: list[Any] = []
        self.start = 0

    def fill(self) -> bool:
        """Read the next block; say if there was one."""
        self.rows = list(islice(self._rows, self._block))
        self.keys = self._keys_of(self.rows)
        self.start = 0
        return bool(self.rows)
