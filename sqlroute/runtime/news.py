"""What a change of health means to those who watch: events, and connections of another time."""

from __future__ import annotations

from collections.abc import Iterator

from sqlroute.events import NodeChanged, PrimaryChanged
from sqlroute.health import Health, NodeHealth, Role


def changes(old: Health, new: Health) -> Iterator[NodeChanged | PrimaryChanged]:
    """Yield what has changed of nodes, then of shards."""
    for name, now in new.nodes.items():
        before = old.nodes.get(name)
        if before is not None and _is_news(before, now):
            yield NodeChanged(
                now.shard,
                name,
                before.state.value,
                now.state.value,
                now.role.value,
                now.timeline,
                now.last_error if now.failures else "",
                now.refused,
            )
    for shard, is_now in new.shards.items():
        was = old.shards.get(shard)
        if was is not None and was is not is_now and was.primary != is_now.primary:
            rivals = is_now.contenders if len(is_now.contenders) > 1 else ()
            yield PrimaryChanged(
                shard, was.primary, is_now.primary, is_now.highest_timeline, rivals
            )


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
