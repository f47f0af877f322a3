"""What must be so before a promotion, one line each: ok, a warning, or refused with the way out.

Pure: from the facts that servers have told to checks. All of them are made, also after one that
refuses, so that one look shows everything that is in the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlroute.ops import synchronous
from sqlroute.ops.fences import Level, epoch_of, is_synchronous_fence
from sqlroute.routing.token import parse_lsn

MUST_NOT_SHRINK = (
    "max_connections",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
    "max_locks_per_transaction",
    "max_replication_slots",
)
RIGHTS_OF_L3 = {
    "l3": "GRANT ALTER SYSTEM ON PARAMETER session_preload_libraries",
    "passes": "GRANT SET ON PARAMETER session_preload_libraries",
    "signal": "GRANT pg_signal_backend",
    "stats": "GRANT pg_monitor",
    "settings": "GRANT pg_monitor",
    "files": "GRANT SELECT ON pg_file_settings and EXECUTE ON FUNCTION pg_show_all_file_settings()",
}
"""Rights without which L3 cannot be put up, cannot be seen to hold, or cannot be passed by the
operator himself, who would lock himself out; and how a role that is no superuser gets them."""

LONG_TRANSACTION = 5.0
"""Seconds from which a transaction is named: it may be ended by the drain."""


class Outcome(StrEnum):
    """Of one check."""

    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a preflight."""

    name: str
    outcome: Outcome
    text: str

    def document(self) -> dict[str, str]:
        return {"check": self.name, "outcome": self.outcome.value, "text": self.text}


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node has told, or why it has not.

    Attributes:
        error: why it has told nothing; empty if it has.
        told: see :meth:`sqlroute.ops.server.Server.facts`.
        upstream: the node that it receives from, by name; empty if none of the shard's.
        managed_by: the engine of high availability that runs it; empty for none.
        abilities: of its driver; empty without one.
    """

    name: str
    error: str = ""
    is_refused: bool = False
    is_hung: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)
    upstream: str = ""
    managed_by: str = ""
    abilities: frozenset[str] = frozenset()

    @property
    def answers(self) -> bool:
        return not self.error

    @property
    def is_primary(self) -> bool:
        return self.answers and not self.told["standby"]

    @property
    def is_replica(self) -> bool:
        return self.answers and bool(self.told["standby"])

    @property
    def timeline(self) -> int:
        if not self.answers:
            return 0
        walfile = self.told["walfile"]
        return int(walfile, 16) if walfile else int(self.told["timeline"] or 0)

    @property
    def received(self) -> int:
        return parse_lsn(self.told["received"]) if self.told.get("received") else 0

    @property
    def replayed(self) -> int:
        return parse_lsn(self.told["replayed"]) if self.told.get("replayed") else 0

    @property
    def is_streaming(self) -> bool:
        receiver = self.told.get("receiver")
        return receiver is not None and receiver["status"] == "streaming"

    @property
    def version(self) -> int:
        return int(self.told["version"]) // 10000

    @property
    def can_rejoin(self) -> bool:
        """Its driver can make it a replica of another node."""
        return self.abilities.issuperset(("stop", "configure", "start"))

    def setting(self, name: str) -> str:
        return str(self.told["settings"].get(name) or "")

    def may(self, right: str) -> bool:
        rights = self.told["rights"]
        return bool(rights["superuser"] or rights[right])

    @property
    def fence(self) -> Level:
        """The strongest fence that is set on it in SQL.

        By its files, too: whoever was killed before they were read has left one for the next
        reload.
        """
        return max(_fence_in(self.told["settings"]), _fence_in(self.told.get("files") or {}))


def _fence_in(settings: Mapping[str, Any]) -> Level:
    if epoch_of(settings.get("session_preload_libraries") or "") is not None:
        return Level.L3
    if is_synchronous_fence(settings.get("synchronous_standby_names") or ""):
        return Level.L2
    return Level.L1 if settings.get("default_transaction_read_only") == "on" else Level.NONE


def possible_levels(facts: NodeFacts) -> list[Level]:
    """Return the fences that can be put on a node, the weakest first."""
    found = []
    if facts.answers and facts.may("reload") and facts.may("l1") and facts.may("signal"):
        found.append(Level.L1)
        if facts.may("l2"):
            found.append(Level.L2)
        if all(facts.may(right) for right in RIGHTS_OF_L3):
            found.append(Level.L3)
    if "stop" in facts.abilities:
        found.append(Level.L4)
    if "fence" in facts.abilities:
        found.append(Level.L5)
    return found


def strongest(facts: NodeFacts, wanted: Level | None = None) -> Level:
    """Return the fence to use: the one that is wanted, else the strongest; NONE if there is none.

    The user's hook is used where he wants it, or where nothing else is a full fence.
    """
    found = possible_levels(facts)
    if wanted is not None:
        return wanted if wanted in found else Level.NONE
    if Level.L4 in found:
        return Level.L4
    return found[-1] if found else Level.NONE


def strongest_in_sql(facts: NodeFacts) -> Level:
    """Return the strongest fence that needs neither a driver nor a hook; NONE if there is none."""
    return max((f for f in possible_levels(facts) if f <= Level.L3), default=Level.NONE)


def refusals(checks: Iterable[Check]) -> tuple[str, ...]:
    return tuple(check.text for check in checks if check.outcome is Outcome.REFUSED)


def switchover_checks(
    shard: str,
    nodes: Mapping[str, NodeFacts],
    former: str,
    candidate: str,
    *,
    max_lag_bytes: int,
    max_drain: float,
    level: Level | None,
    rejoins: bool,
) -> list[Check]:
    """Return all checks of a planned promotion."""
    old, new = nodes[former], nodes[candidate]
    checks = [
        *_of_roles(shard, nodes, former, candidate),
        *_of_candidate(old, new, max_lag_bytes),
        *_of_settings(old, new),
        *_of_rights(old, new, level),
        *_of_rejoining(old, new, rejoins),
        *_of_load(old, max_drain),
        *_of_synchronous(nodes, former, candidate, rejoins),
        *_of_copies(old, new),
    ]
    for facts in nodes.values():
        checks += _of_fences(facts)
    return checks


def _of_roles(
    shard: str, nodes: Mapping[str, NodeFacts], former: str, candidate: str
) -> Iterator[Check]:
    managed = sorted({f"{f.name} by {f.managed_by}" for f in nodes.values() if f.managed_by})
    if managed:
        yield _refused(
            "managed",
            f"shard {shard} is run by another engine ({', '.join(managed)}), which would undo a "
            "promotion in SQL; promote with its own command, or name its REST API in the "
            "configuration (patroni = [...])",
        )
    silent = [f for f in nodes.values() if not f.answers]
    for facts in silent:
        yield _warning(
            "nodes",
            f"{facts.name} does not answer ({facts.error}): it is left out, and must be rejoined",
        )
    primaries = [facts.name for facts in nodes.values() if facts.is_primary]
    if len(primaries) > 1:
        yield _refused(
            "roles",
            f"shard {shard} has {len(primaries)} nodes that are primaries "
            f"({', '.join(primaries)}); fence all but one with `sqlroute fence NODE`",
        )
    else:
        replicas = [facts.name for facts in nodes.values() if facts.is_replica]
        yield _ok("roles", f"{former} is the primary, {', '.join(replicas)} in recovery")
    timelines = {facts.timeline for facts in nodes.values() if facts.answers}
    if nodes[candidate].answers and nodes[candidate].timeline != nodes[former].timeline:
        yield _refused(
            "timelines",
            f"{candidate} is on timeline {nodes[candidate].timeline}, {former} on "
            f"{nodes[former].timeline}; run `sqlroute rejoin {candidate}` first",
        )
    elif len(timelines) == 1:
        yield _ok("timelines", f"all on timeline {timelines.pop()}")
    else:
        found = ", ".join(f"{f.name} {f.timeline}" for f in nodes.values() if f.answers)
        yield _warning("timelines", f"not all nodes are on one timeline: {found}")


def _of_candidate(old: NodeFacts, new: NodeFacts, max_lag_bytes: int) -> Iterator[Check]:
    if not new.answers:
        yield _refused(
            "candidate", f"{new.name} does not answer ({new.error}); name another with --to"
        )
        return
    if new.is_primary:
        yield _refused("candidate", f"{new.name} is no replica; name another with --to")
        return
    if new.told["system_identifier"] != old.told["system_identifier"]:
        yield _refused(
            "candidate",
            f"{new.name} belongs to another cluster (system identifier "
            f"{new.told['system_identifier']}, not {old.told['system_identifier']}); correct its "
            "address",
        )
    if not new.is_streaming:
        yield _refused(
            "streaming",
            f"{new.name} receives from nobody; look at its log, or run "
            f"`sqlroute rejoin {new.name}`",
        )
    elif new.upstream != old.name:
        where = new.upstream or f"{new.told['receiver']['sender_host']}, no node of the shard"
        yield _refused(
            "streaming",
            f"{new.name} receives from {where}, not from {old.name}; name a node that follows the "
            "primary itself with --to",
        )
    else:
        yield _ok("streaming", f"{new.name} streams from {old.name}")
    lag = max(0, old.received - new.replayed)
    if lag > max_lag_bytes:
        yield _refused(
            "lag",
            f"{new.name} is {lag} bytes behind {old.name} (limit {max_lag_bytes}); wait, or raise "
            "--max-lag-bytes",
        )
    else:
        yield _ok("lag", f"{new.name} is {lag} bytes behind")
    if new.told["pause_state"] not in (None, "not paused"):
        yield _refused(
            "replay",
            f"the replay of {new.name} is paused; run SELECT pg_wal_replay_resume() there",
        )
    delay = new.setting("recovery_min_apply_delay")
    if delay not in ("", "0"):
        yield _refused(
            "replay",
            f"{new.name} replays {delay} ms late (recovery_min_apply_delay); name another with "
            "--to, or reset it",
        )
    if new.version != old.version:
        yield _refused(
            "version",
            f"{new.name} runs PostgreSQL {new.version}, {old.name} {old.version}: a physical "
            "replica has the same version",
        )
    if not new.may("promote"):
        yield _refused(
            "rights",
            f"the operator's role may not promote {new.name}; "
            "GRANT EXECUTE ON FUNCTION pg_promote TO it, or name a superuser in [operator]",
        )


def _of_settings(old: NodeFacts, new: NodeFacts) -> Iterator[Check]:
    if not new.answers:
        return
    smaller = [
        f"{name} {new.setting(name)} (now {old.setting(name)})"
        for name in MUST_NOT_SHRINK
        if new.setting(name).isdigit() and int(new.setting(name)) < int(old.setting(name))
    ]
    if smaller:
        yield _warning("settings", f"{new.name} allows less: {', '.join(smaller)}")
    else:
        yield _ok("settings", "no limit shrinks")
    differing = [
        name for name in ("wal_level", "archive_mode") if new.setting(name) != old.setting(name)
    ]
    for name in differing:
        yield _warning(
            "settings", f"{name} is {new.setting(name)} on {new.name}, {old.setting(name)} now"
        )
    senders = int(new.setting("max_wal_senders") or 0)
    if senders == 0:
        yield _refused("walsenders", f"{new.name} allows no walsenders: nobody could follow it")
    else:
        used = len(new.told["senders"])
        wanted = len(old.told["senders"])
        text = f"{used} of {senders} walsenders of {new.name} in use, {wanted} to come"
        yield (_warning if used + wanted > senders else _ok)("walsenders", text)
    physical = [s["name"] for s in old.told["slots"] if s["type"] == "physical"]
    free = int(new.setting("max_replication_slots") or 0) - len(new.told["slots"])
    if physical and free < len(physical):
        yield _refused(
            "slots",
            f"{new.name} has {free} free replication slots, {len(physical)} are needed; raise "
            "max_replication_slots",
        )
    logical = [s for s in old.told["slots"] if s["type"] == "logical"]
    lost = [s["name"] for s in logical if old.version < 17 or s["failover"] != "true"]
    if lost:
        yield _warning(
            "logical slots",
            f"{', '.join(lost)} will not be there on {new.name}: their subscribers must start "
            "again (from 17 on slots with failover = true survive)",
        )


def _of_rights(old: NodeFacts, new: NodeFacts, level: Level | None) -> Iterator[Check]:
    chosen = strongest(old, level)
    found = ", ".join(f.name for f in possible_levels(old)) or "none"
    if chosen is Level.NONE:
        what = "no fence" if level is None else f"fence {level.name} not"
        yield _refused(
            "fence",
            f"{what} possible on {old.name} (possible: {found}): name a superuser in [operator], a "
            f"driver in [drivers], or give the operator's role what L3 needs: {_missing(old)}",
        )
    elif chosen < Level.L3:
        yield _warning(
            "fence",
            f"{chosen.name} on {old.name} (possible: {found}): a client can pass it and lose what "
            f"it writes; L3 needs: {_missing(old)}",
        )
    else:
        yield _ok("fence", f"{chosen.name} on {old.name} (possible: {found})")
    if chosen in (Level.L1, Level.L2, Level.L3) and old.told["subscriptions"]:
        yield _warning(
            "fence",
            f"{old.name} has {old.told['subscriptions']} running subscription(s), which "
            f"{chosen.name} does not stop: disable them first, or use a driver (L4)",
        )
    if new.answers and not new.may("repoint"):
        yield _warning("rights", "the operator's role may not repoint replicas")
    for facts in (old, new):
        if facts.answers and not (facts.may("stats") and facts.may("settings")):
            yield _refused(
                "rights",
                f"the operator's role sees neither the sessions nor the settings of {facts.name}; "
                "GRANT pg_monitor TO it",
            )


def _missing(facts: NodeFacts) -> str:
    needed = {"reload": "GRANT EXECUTE ON FUNCTION pg_reload_conf()", **RIGHTS_OF_L3}
    found = (how for right, how in needed.items() if not facts.may(right))
    return "; ".join(dict.fromkeys(found)) or "nothing more"


def _of_rejoining(old: NodeFacts, new: NodeFacts, rejoins: bool) -> Iterator[Check]:
    can_rewind = old.setting("wal_log_hints") == "on" or old.setting("data_checksums") == "on"
    if not can_rewind:
        yield _warning(
            "pg_rewind",
            f"{old.name} has neither checksums nor wal_log_hints: should it go past the fork, only "
            "a new base backup brings it back",
        )
    if new.answers and new.setting("full_page_writes") == "off":
        yield _warning("pg_rewind", f"full_page_writes is off on {new.name}: pg_rewind refuses it")
    if not rejoins:
        return
    if not old.can_rejoin:
        yield _warning(
            "rejoin",
            f"no driver can stop, configure and start {old.name}: it stays fenced until `sqlroute "
            f"rejoin {old.name}` can be run with one in [drivers]",
        )
    else:
        yield _ok("rejoin", f"{old.name} comes back by its driver")


def _of_load(old: NodeFacts, max_drain: float) -> Iterator[Check]:
    if old.told["prepared"]:
        yield _warning(
            "prepared transactions",
            f"{old.told['prepared']} on {old.name}: they survive, and hold their locks on the new "
            "primary; see `sqlroute 2pc recover`",
        )
    oldest = float(old.told["oldest_transaction"])
    if oldest > LONG_TRANSACTION:
        yield _warning(
            "long transactions",
            f"the oldest of {old.name} runs for {oldest:.0f} s; what is open after "
            f"--max-drain {max_drain:g} s is ended",
        )
    else:
        yield _ok("long transactions", f"none older than {LONG_TRANSACTION:g} s")
    if old.told["backups"]:
        yield _refused(
            "backup",
            f"{old.told['backups']} base backup(s) run on {old.name} and would fail; wait for them",
        )
    archiver = old.told["archiver"] or {}
    if old.setting("archive_mode") != "off" and archiver.get("failing"):
        yield _warning(
            "archive",
            f"the archiver of {old.name} fails ({archiver['failed_count']} times): a stop waits "
            "for it, and the archive has a gap",
        )


def _of_synchronous(
    nodes: Mapping[str, NodeFacts], former: str, candidate: str, rejoins: bool
) -> Iterator[Check]:
    new = nodes[candidate]
    text = new.setting("synchronous_standby_names") if new.answers else ""
    if not text:
        if nodes[former].setting("synchronous_standby_names"):
            yield _warning(
                "synchronous",
                f"{former} commits synchronously, {candidate} would not: set it there",
            )
        return
    there = {
        facts.setting("cluster_name") or facts.name
        for facts in nodes.values()
        if facts.answers and facts.name != candidate and (rejoins or facts.name != former)
    }
    quorum = synchronous.parsed(text)
    if quorum is not None and not quorum.can_be_met(there):
        yield _refused(
            "synchronous",
            f"after the swap {candidate} would wait for {quorum}, and only "
            f"{', '.join(sorted(there)) or 'nobody'} would be there: every commit would hang; "
            f"correct synchronous_standby_names on {candidate}",
        )
    else:
        yield _ok("synchronous", f"{candidate} will commit with {text}")


def _of_copies(old: NodeFacts, new: NodeFacts) -> Iterator[Check]:
    if not new.answers:
        return
    collations = {facts.name: facts.told["collation"] for facts in (old, new)}
    actual = {name: found[2] for name, found in collations.items() if found}
    if len(set(actual.values())) > 1:
        found = ", ".join(f"{name} {version}" for name, version in actual.items())
        yield _warning(
            "collation",
            f"the operating systems sort differently ({found}): indexes on text may be wrong on "
            f"{new.name}; REINDEX them",
        )
    else:
        yield _ok("collation", "the same version on both")


def _of_fences(facts: NodeFacts) -> Iterator[Check]:
    if facts.answers and facts.is_replica and facts.fence is not Level.NONE:
        yield _refused(
            "fence",
            f"{facts.name} carries a fence itself ({facts.fence.name}), copied from another node; "
            f"run `sqlroute unfence {facts.name}`",
        )


def _ok(name: str, text: str) -> Check:
    return Check(name, Outcome.OK, text)


def _warning(name: str, text: str) -> Check:
    return Check(name, Outcome.WARNING, text)


def _refused(name: str, text: str) -> Check:
    return Check(name, Outcome.REFUSED, text)
