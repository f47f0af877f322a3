"""Compute the hash partition, the bucket, in which PostgreSQL puts a key. Pure arithmetic.

Stands between the keys of a statement and the shard map. The answer equals that of
``satisfies_hash_partition`` for every value of the kinds below, so a shard's own partitions refuse
what is sent to the wrong place; it never asks a server and keeps no state.

The parts, as in PostgreSQL 11 and later:

* bytes are hashed with Bob Jenkins' lookup3 (*Hash functions*, 2006, public domain), seeded with
  ``HASH_PARTITION_SEED``, as ``hash_bytes_extended`` of ``src/common/hashfn.c`` does;
* smallint, integer and bigint fold to one 32-bit word, so that equal numbers of different types
  meet; text is hashed over UTF-8, uuid over its 16 bytes;
* the columns are combined in order, NULL contributes nothing, and the 64-bit sum is reduced
  modulo the number of buckets as an unsigned number.

Three facts to know: a server on a big-endian machine hashes otherwise; so does one whose database
is not encoded in UTF-8, for text beyond ASCII; and text under a nondeterministic collation is
hashed by its sort key, which only the server can make. None of the three can be a shard key here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache, lru_cache
from itertools import islice
from uuid import UUID

from sqlroute.errors import InvalidShardKey

HASH_PARTITION_SEED = 0x7A5B22367996DCFD

_LOOKUP3_START = 0x9E3779B9 + 3923095
_COMBINE = 0x49A0F4DD15E5A8E3
_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
_LANES = 1024  # longer numbers gain nothing more: the CPU's cache is the limit


class KeyKind(Enum):
    """What PostgreSQL hashes alike: the kind of one column of a shard key."""

    INTEGER = "integer"
    TEXT = "text"
    UUID = "uuid"


_ONE_INTEGER = (KeyKind.INTEGER,)


def bucket_of(values: tuple[object, ...], kinds: tuple[KeyKind, ...], buckets: int) -> int:
    """Return the bucket of a key: the remainder of its partition.

    Args:
        values: one value per column of the key; ``None`` is NULL. INTEGER takes ``int``, TEXT
            ``str``, UUID ``uuid.UUID`` or the text of one.
        kinds: the kind of each column, in the order of ``PARTITION BY HASH``.
        buckets: the modulus of the partitions.

    Raises:
        InvalidShardKey: a value has no hash as its column's kind, or a column has no value.
    """
    if kinds == _ONE_INTEGER and len(values) == 1:
        value = values[0]
        if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
            return _hash_integer(value) % buckets
    return partition_hash(values, kinds) % buckets


@lru_cache(maxsize=16_384)  # a request often asks for one key again and again
def _hash_integer(value: int) -> int:
    return (_hash_word(_folded(value)) + _COMBINE) & _M64


def buckets_of(values: Iterable[object], kind: KeyKind, buckets: int) -> list[int]:
    """Return the bucket of each key of one column, for bulk loads.

    Equal to ``bucket_of((value,), (kind,), buckets)`` for each value, several times as fast: a
    thousand keys are hashed side by side in the 64-bit lanes of one long Python integer.

    Raises:
        InvalidShardKey: a value has no hash as this kind; the message says which one, from 0.
    """
    remaining = iter(values)
    found: list[int] = []
    while chunk := list(islice(remaining, _LANES)):
        hashes = _hashes_in_lanes(chunk, kind)
        if hashes is None:
            found.extend(_buckets_one_by_one(chunk, kind, buckets, first=len(found)))
        else:
            found.extend([((h + _COMBINE) & _M64) % buckets for h in hashes])
    return found


def partition_hash(values: tuple[object, ...], kinds: tuple[KeyKind, ...]) -> int:
    """Return the 64-bit hash, unsigned, by which PostgreSQL chooses the partition of a row.

    Raises:
        InvalidShardKey: a value has no hash as its column's kind, or a column has no value.
    """
    if len(values) != len(kinds):
        raise InvalidShardKey(
            f"a shard key of {len(kinds)} columns got {len(values)} values; give one per column, "
            "None for NULL"
        )
    row = 0
    for value, kind in zip(values, kinds, strict=True):
        if value is None:
            continue
        row ^= (_hash(value, kind) + _COMBINE + (row << 54) + (row >> 7)) & _M64
    return row


def _hash(value: object, kind: KeyKind) -> int:
    if kind is KeyKind.INTEGER:
        return _hash_word(_folded(_integer(value)))
    if kind is KeyKind.TEXT:
        return _hash_bytes(_utf8(value))
    return _hash_bytes(_uuid_bytes(value))


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refused(value, "integer", "an int")
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise InvalidShardKey(
            f"integer shard key {value} is outside of bigint, {_INT64_MIN} to {_INT64_MAX}"
            if value.bit_length() < 128
            else f"integer shard key of {value.bit_length()} bits is outside of bigint, 64 bits"
        )
    return value


def _utf8(value: object) -> bytes:
    if not isinstance(value, str):
        raise _refused(value, "text", "a str")
    try:
        data = value.encode()
    except UnicodeEncodeError:
        data = b"\0"  # a lone surrogate: like NUL, nothing that a text column can hold
    if b"\0" in data:
        raise InvalidShardKey(
            "text shard key of type str holds NUL or a lone surrogate; PostgreSQL stores neither"
        )
    return data


def _uuid_bytes(value: object) -> bytes:
    if isinstance(value, UUID):
        return value.bytes
    if not isinstance(value, str):
        raise _refused(value, "uuid", "a uuid.UUID or its text")
    try:
        return UUID(value).bytes
    except ValueError:
        raise InvalidShardKey(
            "uuid shard key of type str is not a UUID; give 32 hexadecimal digits or a uuid.UUID"
        ) from None


def _refused(value: object, kind: str, rule: str) -> InvalidShardKey:
    return InvalidShardKey(
        f"{kind} shard key of type {type(value).__qualname__} has no bucket; the rule: {rule}, "
        "converted before it is given"
    )


def _buckets_one_by_one(
    values: Sequence[object], kind: KeyKind, buckets: int, *, first: int
) -> list[int]:
    """Hash values that have no lanes: NULLs, subclasses, and those that are refused."""
    found: list[int] = []
    for value in values:
        try:
            found.append(partition_hash((value,), (kind,)) % buckets)
        except InvalidShardKey as exc:
            raise InvalidShardKey(f"value {first + len(found)}: {exc}") from None
    return found


# One message at a time. The words of the state are a, b, c as in lookup3. A rotation is written
# ``x << k | x >> 32 - k`` without a mask of its own: what it has above bit 31 falls to the mask of
# the sum it goes into. `-` binds closer than `>>` and `|`, hence the few parentheses.


def _folded(value: int) -> int:
    high = value >> 32
    return (value ^ (high if value >= 0 else ~high)) & _M32


def _hash_word(word: int) -> int:
    """Hash one 32-bit word: what is left of lookup3 once all constants are computed."""
    b, c = _WORD_B, _WORD_C
    a = (_WORD_A + word) & _M32
    a = ((a ^ c) - (c << 11 | c >> 21)) & _M32
    b = ((b ^ a) - (a << 25 | a >> 7)) & _M32
    c = ((c ^ b) - (b << 16 | b >> 16)) & _M32
    a = ((a ^ c) - (c << 4 | c >> 28)) & _M32
    b = ((b ^ a) - (a << 14 | a >> 18)) & _M32
    return b << 32 | ((c ^ b) - (b << 24 | b >> 8)) & _M32


def _hash_bytes(data: bytes) -> int:
    length = len(data)
    a, b, c = _start(length)
    whole = length - length % 12
    for at in range(0, whole, 12):
        x, y, z = _THREE_WORDS(data, at)
        a, b, c = _mix((a + x) & _M32, (b + y) & _M32, (c + z) & _M32)
    tail = data[whole:]
    a += int.from_bytes(tail[:4], "little")
    b += int.from_bytes(tail[4:8], "little")
    c += int.from_bytes(tail[8:], "little") << 8  # the lowest byte belongs to the length
    return _final(a & _M32, b & _M32, c & _M32)


_THREE_WORDS = struct.Struct("<3I").unpack_from


@lru_cache(maxsize=256)
def _start(length: int) -> tuple[int, int, int]:
    """Return the state after the length and the seed went in: the same for each message."""
    word = (_LOOKUP3_START + length) & _M32
    high, low = HASH_PARTITION_SEED >> 32, HASH_PARTITION_SEED & _M32
    return _mix((word + high) & _M32, (word + low) & _M32, word)


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    a = ((a - c) ^ (c << 4 | c >> 28)) & _M32
    c = (c + b) & _M32
    b = ((b - a) ^ (a << 6 | a >> 26)) & _M32
    a = (a + c) & _M32
    c = ((c - b) ^ (b << 8 | b >> 24)) & _M32
    b = (b + a) & _M32
    a = ((a - c) ^ (c << 16 | c >> 16)) & _M32
    c = (c + b) & _M32
    b = ((b - a) ^ (a << 19 | a >> 13)) & _M32
    a = (a + c) & _M32
    c = ((c - b) ^ (b << 4 | b >> 28)) & _M32
    b = (b + a) & _M32
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - (b << 14 | b >> 18)) & _M32
    a = ((a ^ c) - (c << 11 | c >> 21)) & _M32
    b = ((b ^ a) - (a << 25 | a >> 7)) & _M32
    c = ((c ^ b) - (b << 16 | b >> 16)) & _M32
    a = ((a ^ c) - (c << 4 | c >> 28)) & _M32
    b = ((b ^ a) - (a << 14 | a >> 18)) & _M32
    return b << 32 | ((c ^ b) - (b << 24 | b >> 8)) & _M32


_WORD_A, _WORD_B, _WORD_C = _start(4)
_WORD_C = ((_WORD_C ^ _WORD_B) - (_WORD_B << 14 | _WORD_B >> 18)) & _M32


# Many messages at a time: each word of the state is a long integer that holds one 32-bit word per
# 64-bit lane, so that one operation of the interpreter works on all messages. A difference adds
# 2**32 to each lane first, lest one lane borrow from the next.


def _hashes_in_lanes(values: Sequence[object], kind: KeyKind) -> Sequence[int] | None:
    """Hash plain values of the kind; ``None``: not all are, hash them one by one."""
    types = set(map(type, values))
    if kind is KeyKind.INTEGER and types == {int}:
        return _integer_lanes(values)
    if kind is KeyKind.UUID and types == {UUID}:
        return _lanes_hashed([value.bytes for value in values if isinstance(value, UUID)])
    if kind is KeyKind.TEXT and types == {str}:
        return _text_lanes([value for value in values if isinstance(value, str)])
    return None


def _integer_lanes(values: Sequence[object]) -> Sequence[int] | None:
    count = len(values)
    try:
        packed = struct.pack(f"<{count}q", *values)
    except struct.error:  # outside of bigint
        return None
    both = int.from_bytes(packed, "little")
    mask, ones = _lane_masks(count)
    sign = both >> 63 & ones
    folded = (both ^ both >> 32) & mask ^ (sign << 32) - sign
    return _finished([folded], 4, count)


def _text_lanes(values: Sequence[str]) -> Sequence[int] | None:
    try:
        encoded = [value.encode() for value in values]
    except UnicodeEncodeError:
        return None
    by_length: dict[int, list[int]] = {}
    for index, data in enumerate(encoded):
        if 0 in data:
            return None
        by_length.setdefault(len(data), []).append(index)
    hashes = [0] * len(encoded)
    for indexes in by_length.values():
        same_length = [encoded[index] for index in indexes]
        if len(indexes) < 4:
            found: Sequence[int] = [_hash_bytes(data) for data in same_length]
        else:
            found = _lanes_hashed(same_length)
        for index, value in zip(indexes, found, strict=True):
            hashes[index] = value
    return hashes


def _lanes_hashed(messages: Sequence[bytes]) -> Sequence[int]:
    """Hash messages of one length."""
    length, count = len(messages[0]), len(messages)
    padding = bytes(-length % 4)
    words = (length + 3) // 4
    flat = struct.unpack(f"<{words * count}I", b"".join([m + padding for m in messages]))
    lanes = [
        int.from_bytes(struct.pack(f"<{count}Q", *flat[at::words]), "little") for at in range(words)
    ]
    return _finished(lanes, length, count)


def _finished(lanes: list[int], length: int, count: int) -> Sequence[int]:
    """Run lookup3 over the words of all messages; the state of each lane starts the same."""
    mask, ones = _lane_masks(count)
    borrow = ones << 32
    a, b, c = (word * ones for word in _start(length))
    whole = length - length % 12
    for at in range(0, whole // 4, 3):
        a = (a + lanes[at]) & mask
        b = (b + lanes[at + 1]) & mask
        c = (c + lanes[at + 2]) & mask
        a, b, c = _mix_lanes(a, b, c, mask, borrow)
    tail = (*lanes[whole // 4 :], 0, 0, 0)
    a = (a + tail[0]) & mask
    b = (b + tail[1]) & mask
    c = (c + (tail[2] << 8)) & mask
    b, c = _final_lanes(a, b, c, mask, borrow)
    return struct.unpack(f"<{count}Q", (b << 32 | c).to_bytes(8 * count, "little"))


def _mix_lanes(a: int, b: int, c: int, mask: int, borrow: int) -> tuple[int, int, int]:
    a = ((a + borrow - c) ^ (c << 4 | c >> 28)) & mask
    c = (c + b) & mask
    b = ((b + borrow - a) ^ (a << 6 | a >> 26)) & mask
    a = (a + c) & mask
    c = ((c + borrow - b) ^ (b << 8 | b >> 24)) & mask
    b = (b + a) & mask
    a = ((a + borrow - c) ^ (c << 16 | c >> 16)) & mask
    c = (c + b) & mask
    b = ((b + borrow - a) ^ (a << 19 | a >> 13)) & mask
    a = (a + c) & mask
    c = ((c + borrow - b) ^ (b << 4 | b >> 28)) & mask
    b = (b + a) & mask
    return a, b, c


def _final_lanes(a: int, b: int, c: int, mask: int, borrow: int) -> tuple[int, int]:
    c = ((c ^ b) + borrow - ((b << 14 | b >> 18) & mask)) & mask
    a = ((a ^ c) + borrow - ((c << 11 | c >> 21) & mask)) & mask
    b = ((b ^ a) + borrow - ((a << 25 | a >> 7) & mask)) & mask
    c = ((c ^ b) + borrow - ((b << 16 | b >> 16) & mask)) & mask
    a = ((a ^ c) + borrow - ((c << 4 | c >> 28) & mask)) & mask
    b = ((b ^ a) + borrow - ((a << 14 | a >> 18) & mask)) & mask
    c = ((c ^ b) + borrow - ((b << 24 | b >> 8) & mask)) & mask
    return b, c


@cache
def _lane_masks(count: int) -> tuple[int, int]:
    """Return 2**32 - 1 in each of the lanes, and 1 in each of the lanes."""
    ones = ((1 << 64 * count) - 1) // _M64
    return ones * _M32, ones
