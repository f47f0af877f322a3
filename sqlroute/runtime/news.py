"""What a change of health means to those who watch: events, and connections of another time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlroute.events import Held, NodeChanged, PrimaryChanged, Released
from sqlroute.health import Health, NodeHealth, Role, ShardHealth


def changes(
    old: Health, new: Health, now: float, waited: Callable[[str], int]
) -> Iterator[NodeChanged | PrimaryChanged | Held | Released]:
    """Yield what has changed of nodes, then of shards.

    Args:
        waited: returns how many have waited for a shard that was held.
    """
    for name, node in new.nodes.items():
        before = old.nodes.get(name)
        if before is not None and _is_news(before, node):
            yield NodeChanged(
                node.shard,
                name,
                before.state.value,
                node.state.value,
                node.role.value,
                node.timeline,
                node.last_error if node.failures else "",
                node.refused,
            )
    for shard, is_now in new.shards.items():
        was = old.shards.get(shard)
        if was is None or was is is_now:
            continue
        yield from _hold_changes(was, is_now, now, waited)
        if was.primary != is_now.primary:
            rivals = is_now.contenders if len(is_now.contenders) > 1 else ()
            yield PrimaryChanged(
                shard, was.primary, is_now.primary, is_now.highest_timeline, rivals
            )


def _hold_changes(
    was: ShardHealth, now: ShardHealth, at: float, waited: Callable[[str], int]
) -> Iterator[Held | Released]:
    """Yield the end of a hold, then the begin of another one."""
    before, hold = was.hold, now.hold
    if before is not None and (hold is None or hold.operation != before.operation):
        yield Released(now.name, max(at - before.since, 0.0), waited(now.name))
    if hold is not None and (before is None or hold.operation != before.operation):
        yield Held(now.name, hold.operation)


def is_another(before: NodeHealth, now: NodeHealth) -> bool:
    """Say if connections to a node are of another time: its role or its timeline was another."""
    known = before.role is not Role.UNKNOWN and now.role is not Role.UNKNOWN
    return known and (before.role is not now.role or 0 < before.timeline != now.timeline)


def _is_news(before: NodeHealth, now: NodeHealth) -> bool:
    return before is not now and (
        before.state is not now.state
        or before.role is not now.role
        or before.refused != now.refused
    )
