"""Promotions as clients see them: how long nobody's write is acknowledged.

Eight writers in two processes, on three durable nodes. Beside it Patroni, on the same machine: the
same writers through plain SQLAlchemy, which find the primary by libpq's ``target_session_attrs``
and try again on each error.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import sqlalchemy as sa

from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import remove, up
from sqlroute.testing import free_ports
from sqlroute.testing.patroni import PatroniCluster, missing
from tests.chaos.promotion.clients import PAUSE, Clients, Process, Told
from tests.chaos.promotion.cluster import SHARD, Cluster
from tests.chaos.promotion.history import Ack, Stamp, longest_gap
from tests.chaos.promotion.trial import AFTER, Leg, Trial

from .pairs import Figure, figure_of

PORT = 29_400
WRITERS = 4
"""Of each of the two processes."""

CALM = 1.0
"""Seconds of load before each promotion."""

_PATIENCE = 60.0
_NOBODY = Stamp("", 0, 0)


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each thing is done."""

    switchovers: int = 20
    kills: int = 20
    patroni: int = 5


@dataclass(frozen=True, slots=True)
class _Kills:
    """What was seen of kills: milliseconds to the first write, seconds to the rejoin."""

    first_write: list[float]
    rejoined: list[float]


def promotion(directory: Path, counts: Counts = Counts()) -> list[Figure]:
    """Measure switchovers, failovers and rejoins, and Patroni's switchovers in the same run."""
    place = directory / "promotion"
    spec = LocalSpec(shards=1, replicas=2, port=PORT, directory=place, durable=True)
    topology = up(spec)
    try:
        with Cluster(topology, policy={}) as cluster:
            clients = Clients(cluster.config, writers=WRITERS, readers=0, is_mixed=False)
            with Trial(cluster, clients, Random(1)) as trial:
                legs = [_switchover(trial) for _ in range(counts.switchovers)]
                called = _killed(trial, counts.kills, trial.fail_over)
                typed = _killed(trial, counts.kills, _by_command_line(cluster))
                whole = trial.end()
    finally:
        remove(place)
    return [
        *_of_switchovers(legs, whole, _patroni_gaps(directory, counts.patroni)),
        _p95("failover: first write", 500, called.first_write, "ms"),
        _p95("failover: by command line", 500, typed.first_write, "ms"),
        _p95("rejoin: back as a replica", 5, called.rejoined + typed.rejoined, "s"),
    ]


def _of_switchovers(legs: list[Leg], whole: Leg, patroni: list[float]) -> list[Figure]:
    gaps = [leg.gap * 1000 for leg in legs]
    failed = sum(len(leg.failed) for leg in legs)
    lost = sum(leg.lost for leg in legs)
    broken = len(whole.broken)
    notes = (
        f"{failed} failed requests, {lost} lost writes, {broken} breaches of an invariant in all",
        *(str(failure) for leg in legs for failure in leg.failed[:2]),
        *whole.broken[:3],
    )
    gap = _p95("switchover: longest write gap", 250, gaps, "ms")
    wrong = float(failed + lost + broken)
    found = [
        gap,
        Figure("switchover: failed or lost", wrong, 0, (wrong, wrong), "requests", notes=notes),
    ]
    if not patroni:
        return found
    theirs = _p95("Patroni: longest write gap", math.inf, patroni, "ms")
    shares = [ours / median(patroni) for ours in gaps]
    share = replace(
        figure_of("switchover: to Patroni's", 0.2, shares, ""),
        value=gap.value / median(patroni),
        notes=("p95 of ours to the median of Patroni's",),
    )
    return [*found, theirs, share]


def _p95(name: str, limit: float, samples: Sequence[float], unit: str) -> Figure:
    ordered = sorted(samples)
    value = ordered[math.ceil(0.95 * len(ordered)) - 1]
    note = f"p95 of {len(ordered)}: median {median(ordered):.1f}, greatest {ordered[-1]:.1f} {unit}"
    return replace(figure_of(name, limit, ordered, unit, (note,)), value=value)


# sqlroute


def _switchover(trial: Trial) -> Leg:
    time.sleep(CALM)
    trial.began()
    trial.switch()
    return trial.check("switchover")


def _killed(trial: Trial, count: int, fail_over: Callable[..., Any]) -> _Kills:
    found = _Kills([], [])
    for _ in range(count):
        time.sleep(CALM)
        trial.began()
        primary = trial.cluster.primary()
        trial.cluster.node(primary).kill()
        began = time.monotonic()
        fail_over(accepts_loss=True)
        found.first_write.append((_first_write(trial, primary, began) - began) * 1000)
        began = time.monotonic()
        trial.rejoin(primary)
        found.rejoined.append(time.monotonic() - began)
        leg = trial.check("failover")
        if leg.broken:
            raise AssertionError(f"a failover broke an invariant: {leg.broken[0]}")
    return found


def _first_write(trial: Trial, former: str, began: float) -> float:
    """Return when the first write was acknowledged by another node."""
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        trial.clients.listen()
        acks = trial.clients.told.acks
        times = [a.answered for a in acks if a.answered > began and a.stamp.node != former]
        if times:
            return min(times)
        time.sleep(0.005)
    raise TimeoutError(f"no write was acknowledged {_PATIENCE:g} s after the failover")


def _by_command_line(cluster: Cluster) -> Callable[..., None]:
    program = "from sqlroute.cli import main; main()"
    words = ("failover", SHARD, "--yes", "--accept-data-loss", "--json")
    path = str(cluster.topology.config_path)

    def fail_over(**_: Any) -> None:
        command = [sys.executable, "-c", program, *words, "--config", path]
        subprocess.run(command, check=True, capture_output=True)

    return fail_over


# Patroni


def _patroni_gaps(directory: Path, count: int) -> list[float]:
    """Return the longest write gap of each switchover in milliseconds; none without Patroni."""
    if not count:
        return []
    if lacking := missing():
        print(f"Patroni is not compared: {lacking}", file=sys.stderr)
        return []
    place = directory / "patroni"
    place.mkdir()
    place.chmod(0o755)
    with ExitStack() as stack:
        cluster = stack.enter_context(PatroniCluster(place, free_ports(8), durable=True))
        processes = []
        with _plain_engine(_anywhere(cluster)).begin() as connection:
            connection.execute(sa.text("CREATE TABLE written (writer text, number bigint)"))
        for name in ("plain-0", "plain-1"):
            processes.append(Process(name, by_engine, _anywhere(cluster)))
            stack.callback(processes[-1].kill)
        return [_patroni_gap(cluster, processes) * 1000 for _ in range(count)]


def _patroni_gap(cluster: PatroniCluster, processes: list[Process]) -> float:
    told = Told()
    cluster.wait_settled()
    time.sleep(CALM)
    for process in processes:
        process.ask("tell")
    leader = cluster.leader()
    began = time.monotonic()
    body = json.dumps({"leader": leader}).encode()
    request = urllib.request.Request(f"{cluster.nodes[0].api}/switchover", body, method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=_PATIENCE):
        pass
    cluster.wait_settled()
    time.sleep(AFTER)
    for process in processes:
        told.add(process.ask("tell"))
    return longest_gap(told.acks, began, time.monotonic())


def by_engine(pipe: Pipe, name: str, where: dict[str, Any]) -> None:
    """Write through a plain engine, in threads, and try again on each error."""
    told, over = Told(), threading.Event()
    engine = _plain_engine(where)
    insert = sa.text("INSERT INTO written (writer, number) VALUES (:writer, :number)")

    def keep_writing(writer: str) -> None:
        for number in itertools.count(1):
            sent = time.monotonic()
            while not over.wait(PAUSE):
                try:
                    with engine.begin() as connection:
                        connection.execute(insert, {"writer": writer, "number": number})
                except sa.exc.DBAPIError:
                    continue
                told.acks.append(Ack(writer, number, _NOBODY, sent, time.monotonic()))
                break
            if over.is_set():
                return

    threads = [threading.Thread(target=keep_writing, args=(f"{name}-{i}",)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    while pipe.recv() != "stop":
        pipe.send(told.take())
    over.set()
    for thread in threads:
        thread.join()
    pipe.send(told.take())


def _anywhere(cluster: PatroniCluster) -> dict[str, Any]:
    """Return parameters with which libpq finds the primary among all nodes."""
    nodes = [cluster.conninfo(node.name) for node in cluster.nodes]
    return {
        **nodes[0],
        "host": ",".join(node["host"] for node in nodes),
        "port": ",".join(str(node["port"]) for node in nodes),
        "target_session_attrs": "read-write",
    }


def _plain_engine(where: dict[str, Any]) -> sa.Engine:
    return sa.create_engine("postgresql+psycopg://", connect_args=where, pool_size=WRITERS)
