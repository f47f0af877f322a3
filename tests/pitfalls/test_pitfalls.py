"""Promises of a routed session in each known pitfall of routing, on servers that are 3 s behind.

The docstring of a test is the pitfall. Its scenarios are in ``cases.py``; the first wanted outcome
of each is what sqlroute promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sqlroute.testing import TopologyFactory

from .cases import CASES, observe, run
from .contenders import Recipe, Sqlroute
from .servers import World

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

Check = Callable[[int], None]


@pytest.fixture(scope="module")
def world(sqlroute_topology_factory: TopologyFactory) -> World:
    return World(sqlroute_topology_factory)


@pytest.fixture(scope="module")
def sqlroute(world: World) -> Iterator[Sqlroute]:
    found = Sqlroute(world.main)
    yield found
    found.close()


@pytest.fixture
def check(world: World, sqlroute: Sqlroute) -> Iterator[Check]:
    """Run the scenarios of a pitfall; each must have its promised outcome and leave nothing."""

    def check(number: int) -> None:
        cases = [case for case in CASES if case.number == number]
        assert cases
        outcomes = {case.name: run(case, Sqlroute, sqlroute, world) for case in cases}

        assert outcomes == {case.name: case.wanted[0] for case in cases}

    yield check
    assert sqlroute.held() == 0, "a connection was not given back"


def test_an_object_can_be_read_after_its_commit(check: Check) -> None:
    """#1: a commit expires the object, its next attribute is read from a replica without it."""
    check(1)


def test_no_update_is_lost_through_a_stale_read(check: Check) -> None:
    """#2: a changed object silently has its old value after the commit; the next change is lost."""
    check(2)


def test_a_new_object_can_be_refreshed(check: Check) -> None:
    """#3: ``refresh`` after add and commit does not find the row."""
    check(3)


def test_a_lazy_load_sees_what_was_flushed(check: Check) -> None:
    """#4: a collection that is loaded after a flush, or a commit, lacks the new child."""
    check(4)


def test_reads_after_a_write_of_the_transaction_see_it(check: Check) -> None:
    """#5: read, write, read: two connections and two snapshots in one transaction."""
    check(5)


def test_merge_decides_by_the_primary(check: Check) -> None:
    """#6: the SELECT of ``merge`` decides between INSERT and UPDATE on a stale replica."""
    check(6)


def test_row_locks_are_taken_on_the_primary(check: Check) -> None:
    """#7: FOR UPDATE and FOR SHARE, however deep in the statement, are refused by a replica."""
    check(7)


def test_functions_that_write_run_on_the_primary(check: Check) -> None:
    """#8: sequences and volatile functions, in the open or hidden in a view, look like reads."""
    check(8)


def test_sql_text_that_writes_runs_on_the_primary(check: Check) -> None:
    """#9: ``text()`` and driver SQL say nothing of themselves; a proved read may use a replica."""
    check(9)


def test_a_select_around_dml_is_a_write(check: Check) -> None:
    """#10: ``is_select`` is true for a SELECT from a CTE that inserts."""
    check(10)


def test_a_bare_connection_is_the_primarys(check: Check) -> None:
    """#11: ``session.connection()`` hands out a replica's connection."""
    check(11)


def test_synchronizing_dml_is_one_piece(check: Check) -> None:
    """#12: UPDATE and DELETE that synchronize the session read and write on different servers."""
    check(12)


def test_query_dml_is_a_write(check: Check) -> None:
    """#13: ``query.delete()`` and ``query.update()`` are no flush."""
    check(13)


def test_bulk_writes_are_writes(check: Check) -> None:
    """#14: the bulk APIs pass no event; what they wrote is missing in the reads that follow."""
    check(14)


def test_two_phase_commits_have_no_replica_in_them(check: Check) -> None:
    """#15: one read on a replica makes PREPARE fail."""
    check(15)


def test_savepoints_are_the_primarys(check: Check) -> None:
    """#16: a savepoint covers only the connections in use, reads within see another server."""
    check(16)


def test_serializable_is_serializable(check: Check) -> None:
    """#17: SERIALIZABLE is refused on a standby, or silently not in force."""
    check(17)


def test_settings_reach_every_connection_of_the_session(check: Check) -> None:
    """#18: a setting that row security depends on reaches one of two connections."""
    check(18)


def test_advisory_locks_exclude(check: Check) -> None:
    """#19: an advisory lock on a standby is granted and excludes nobody."""
    check(19)


def test_temporary_tables_work(check: Check) -> None:
    """#20: a temporary table cannot be made on a standby, and lives on one connection."""
    check(20)


def test_reads_hold_no_connection(check: Check) -> None:
    """#21: a replica's connection stays checked out until the session ends; pools run dry."""
    check(21)


def test_time_never_runs_backwards(check: Check) -> None:
    """#22: two reads use two replicas of different age, in one transaction or in two."""
    check(22)


def test_a_demoted_primary_gets_no_writes(check: Check) -> None:
    """#23: pooled connections go on to a server that is no primary any more."""
    check(23)


def test_a_read_that_a_replica_cancels_is_run_elsewhere(check: Check) -> None:
    """#24: a recovery conflict (40001) of the replica is an error of the application."""
    check(24)


def test_objects_know_their_shard(check: Check) -> None:
    """#25: objects of two shards meet in one identity map."""
    check(25)


def test_one_snapshot_is_one_snapshot(check: Check) -> None:
    """#26: REPEATABLE READ over several servers has no common snapshot."""
    check(26)


def test_what_a_session_knows_is_the_sessions(check: Check) -> None:
    """#27: stickiness in a context variable is lost in another thread, or is someone else's."""
    check(27)


def test_values_made_by_the_server_can_be_read(check: Check) -> None:
    """#28: a server default is read after the INSERT, from a replica without the row."""
    check(28)


def test_the_primary_is_found_not_told(check: Check) -> None:
    """#29: ``target_session_attrs`` finds the primary only when it connects; it is no router."""
    check(29)


def test_a_failed_commit_leaves_nothing_behind(check: Check) -> None:
    """#30: a commit that the server refuses leaves a pooled connection in its transaction."""
    check(30)


def test_what_sqlroute_reads_from_the_primary_is_known(check: Check) -> None:
    """No pitfall but the price: where reads do not use a replica, and what stays stale."""
    check(0)


def test_the_comparison_page_has_every_scenario() -> None:
    """``docs/comparison.md`` is of these scenarios: ``make comparison`` after each change."""
    page = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()

    assert [case.title for case in CASES if f"| {case.title} |" not in page] == []


def test_the_scenarios_tell_a_router_that_is_wrong(world: World) -> None:
    """A scenario that no router fails proves nothing: the recipe of the manual fails nearly all."""
    recipe = Recipe(world.main)
    alike = {12, 13, 30}  # there the recipe is right, in all or in part

    try:
        failed = {
            case.number
            for case in CASES
            if case.place == "main"
            and case.number not in alike
            and case.name != "many_sessions"  # it waits for connections
            and observe(case, recipe) not in case.wanted
        }
    finally:
        recipe.close()

    main = {case.number for case in CASES if case.place == "main" and case.number}
    assert failed >= main - alike
