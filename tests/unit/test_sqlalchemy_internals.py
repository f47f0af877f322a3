"""The few internals of SQLAlchemy that sqlroute leans on are as it expects them.

A new SQLAlchemy that changes one fails here, by name, not somewhere in a session.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Integer, column, select, union
from sqlalchemy import inspect as inspect_mapped
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import QueuePool
from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.sql.selectable import _CompoundSelectKeyword

from sqlroute.routing.blocks import EXTENSION_CLAUSES


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_every_statement_passes_execute_internal() -> None:
    """The first door: its parameters are those that the override hands on."""
    assert parameters(Session._execute_internal) == [
        "self",
        "statement",
        "params",
        "execution_options",
        "bind_arguments",
        "_parent_execute_state",
        "_add_event",
        "_scalar_result",
    ]
    for method in (Session.execute, Session.scalar, Session.scalars):
        assert "_execute_internal" in inspect.getsource(method)


def test_an_added_event_runs_after_the_listeners() -> None:
    """The plan is made of what the application's listeners left."""
    source = inspect.getsource(Session._execute_internal)

    assert "list(events_todo) + [_add_event]" in source


@pytest.mark.parametrize(
    "name", ["_autobegin_t", "_autoflush", "_is_clean", "_identity_lookup", "_connection_for_bind"]
)
def test_session_has(name: str) -> None:
    """Methods that RoutingMixin calls or overrides."""
    assert callable(getattr(Session, name))


def test_flush_asks_for_a_connection_per_object() -> None:
    """``connection_callable`` is read by the unit of work, once per flushed object."""
    from sqlalchemy.orm import persistence

    assert Session.connection_callable is None
    assert "connection_callable(base_mapper, state.obj())" in inspect.getsource(
        persistence._connections_for_states
    )


def test_a_flush_says_when_it_writes() -> None:
    """``_warn_on_events`` is true from the first to the last row, not in the flush's own events."""
    source = inspect.getsource(Session._flush)
    written = source.index("flush_context.execute()")

    assert source.index("dispatch.before_flush") < source.index("_warn_on_events = True") < written
    assert written < source.index("_warn_on_events = False") < source.index("dispatch.after_flush")


def test_objects_are_stamped_with_the_number_of_their_load() -> None:
    """A load's number can be replaced by an equal one before its first row becomes an object."""
    from sqlalchemy.orm import InstanceState, QueryContext, loading

    assert InstanceState.runid is None
    assert "runid" in QueryContext.__slots__
    assert "state.runid = context.runid" in inspect.getsource(loading._populate_full)
    assert "state.runid != runid" in inspect.getsource(loading._instance_processor)
    instances = inspect.getsource(loading.instances)
    assert "context=context" in instances
    assert instances.index('"prebuffer_rows"') < instances.index("ChunkedIteratorResult(")


def test_a_result_makes_its_objects_when_it_is_read() -> None:
    """Not when it is made: ``chunks`` and ``iterator`` do the work."""
    from sqlalchemy.engine.result import ChunkedIteratorResult

    source = inspect.getsource(ChunkedIteratorResult.__init__)

    assert "self.chunks = chunks" in source
    assert "self.iterator = itertools.chain.from_iterable(self.chunks(None))" in source
    assert "self.context = context" in source


def test_what_fills_an_object_that_is_there_sends_an_event() -> None:
    """``refresh`` is sent with the load's context, for a part of the object as for all of it."""
    from sqlalchemy.orm import loading

    source = inspect.getsource(loading._instance_processor)

    assert "state.manager.dispatch.refresh(state, context, to_load)" in source
    assert "state, context, only_load_props" in source


def test_a_refresh_names_its_object() -> None:
    """Its load options hold the state whose columns are loaded."""
    from sqlalchemy.orm import QueryContext

    assert QueryContext.default_load_options._refresh_state is None


def test_a_unit_of_work_knows_what_it_writes() -> None:
    """``states`` tells a delete from a save; the states of a mapper's hierarchy can be listed."""
    from sqlalchemy.orm import persistence
    from sqlalchemy.orm.unitofwork import UOWTransaction

    assert parameters(UOWTransaction.states_for_mapper_hierarchy) == [
        "self",
        "mapper",
        "isdelete",
        "listonly",
    ]
    assert "self.states[state] = (isdelete, listonly)" in inspect.getsource(
        UOWTransaction.register_object
    )
    for organize in ("save", "post_update", "delete"):
        function = getattr(persistence, f"_organize_states_for_{organize}")
        assert "_connections_for_states(" in inspect.getsource(function)


def test_all_mappers_can_be_listed() -> None:
    """Registries are known to the mapper module; a class's listeners can be asked for."""
    from sqlalchemy.orm import DeclarativeBase, mapped_column, mapperlib

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id = mapped_column(Integer, primary_key=True)

    assert Base.registry in mapperlib._all_registries()
    mapper = inspect_mapped(Thing)
    assert [manager.mapper for manager in Base.registry._managers if manager.is_mapped] == [mapper]
    assert not mapper.class_manager.dispatch.load
    assert not mapper.dispatch.before_update


def test_session_checks_the_state_of_its_transaction() -> None:
    """A read outside of it asks for that check itself."""
    assert parameters(TransactionalContext._trans_ctx_check) == ["subject"]
    assert parameters(SessionTransaction._raise_for_prerequisite_state)[1:] == [
        "operation_name",
        "state",
    ]
    assert SessionTransactionState.ACTIVE
    assert Session().binds == {}


def test_options_of_listeners_are_kept_apart() -> None:
    """``ORMExecuteState`` holds what ``update_execution_options`` added."""
    assert "_update_execution_options" in ORMExecuteState.__slots__


def test_dialect_doors_have_their_signatures() -> None:
    """Commit, begin and roll back get the pool's proxy; execute gets the cursor."""
    assert parameters(PGDialect_psycopg.do_commit) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_begin) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_rollback) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_execute)[:4] == [
        "self",
        "cursor",
        "statement",
        "parameters",
    ]
    assert isinstance(_ConnectionFairy.info, object)


def test_psycopg_remembers_a_two_phase_transaction() -> None:
    """As (xid, prepared); a PREPARE that failed is put right there."""
    from psycopg import Connection

    driver = Connection.__new__(Connection)

    assert "_tpc" in inspect.getsource(Connection._tpc_prepare_gen)
    assert parameters(PGDialect_psycopg.do_prepare_twophase) == ["self", "connection", "xid"]
    assert not getattr(driver, "_tpc", None)


def test_a_pool_expires_its_connections_by_time() -> None:
    """Connections older than ``_invalidate_time`` are replaced at checkout."""
    pool = QueuePool(lambda: None)  # type: ignore[arg-type,return-value]

    assert pool._invalidate_time == 0


def test_results_can_be_made_of_rows() -> None:
    """A merged result keeps what an ORM result knows of uniqueness and entities."""
    result = IteratorResult(SimpleResultMetaData(["a"]), iter([(1,)]))

    assert result._unique_filter_state is None
    assert hasattr(result, "_attributes")
    assert hasattr(result._metadata, "_reduce")


def test_a_session_makes_its_identity_map_in_two_places() -> None:
    """Where :class:`sqlroute.identity.OfAllShards` takes its place."""
    from sqlalchemy.orm import session

    made = "self.identity_map = identity._WeakInstanceDict()"
    assert inspect.getsource(session).count("self.identity_map = ") == 2
    for method in (session.Session.__init__, session.Session.expunge_all):
        assert made in inspect.getsource(method)


def test_relationships_come_with_what_orders_their_subquery_load() -> None:
    """Which :mod:`sqlroute.routing.relationships` reads."""
    from sqlalchemy.orm import strategies

    source = inspect.getsource(strategies._SubqueryLoader._setup_outermost_orderby)
    assert "compile_context.eager_order_by +=" in source
    assert "_setup_outermost_orderby, self.parent_property" in source


def test_loading_asks_the_identity_map_in_two_ways() -> None:
    """Where :class:`sqlroute.identity.ByKey` fills in the shard of an object."""
    from sqlalchemy.orm import loading
    from sqlalchemy.orm.identity import IdentityMap, _WeakInstanceDict

    source = inspect.getsource(loading._instance_processor)
    assert "session_identity_map = context.session.identity_map" in source
    assert "session_identity_map.get(identitykey)" in source
    assert "session_identity_map._add_unpresent(state, identitykey)" in source
    assert source.count("session_identity_map") == 4  # and to note what is unchanged
    assert parameters(_WeakInstanceDict._add_unpresent) == ["self", "state", "key"]
    assert set(vars(IdentityMap())) == {"_dict", "_modified", "_wr"}


def test_rows_become_objects_at_once_where_that_is_asked_for() -> None:
    """While the identity map is another."""
    from sqlalchemy.orm import loading

    assert 'execution_options.get("prebuffer_rows"' in inspect.getsource(loading.instances)


def test_a_stream_closes_what_is_below_it() -> None:
    """A result tells ``raw`` to close, and batches are as large as ``_yield_per`` says."""
    below: list[bool] = []

    class Below:
        def _soft_close(self, **_: object) -> None:
            below.append(True)

    result = IteratorResult(SimpleResultMetaData(["a"]), iter([(1,), (2,), (3,)]), raw=Below())  # type: ignore[arg-type]
    result._yield_per = 2

    assert [len(part) for part in result.partitions()] == [2, 1]
    result.close()
    assert below


def test_a_select_tells_its_parts() -> None:
    """Where the analysis of a merge looks; and an alias without a name has a key that is None."""
    statement = select(column("a")).ext(distinct_on(column("b"))).fetch(3, with_ties=True)
    extension: Any = statement._pre_columns_clause

    assert [str(expression) for expression in extension._distinct_on] == ["b"]
    assert statement._distinct
    assert statement._fetch_clause_options == {"with_ties": True, "percent": False}
    assert statement._having_criteria == ()
    assert union(statement, statement).keyword is _CompoundSelectKeyword.UNION
    assert SimpleResultMetaData(["a"])._keys == ["a"]


def test_a_compiled_select_knows_its_columns() -> None:
    """What an engine without a server describes as its answer, in the order of the columns."""
    table = sa.table("t", sa.column("a"), sa.column("b"))
    compiled = sa.select(table.c.b, table.c.a.label("x")).compile(dialect=sa.make_url(
        "postgresql+psycopg://").get_dialect()())  # fmt: skip

    assert [column.keyname for column in compiled._result_columns] == ["b", "x"]  # type: ignore[attr-defined]


def test_params_of_a_statement_keep_its_shape() -> None:
    """Each shard of a scatter is sent its own list, and the statement is compiled once."""
    statement = sa.select(sa.column("a").in_([1, 2]))
    key = statement._generate_cache_key()
    assert key is not None
    own = statement.params({key.bindparams[0].key: [2]})
    own_key = own._generate_cache_key()

    assert own_key is not None
    assert own_key.key == key.key
    assert own.compile().params == {"a_1": [2]}


def test_text_has_its_parameters_and_entities_of_text_their_text() -> None:
    text = sa.text("SELECT 1 WHERE :a = 1").bindparams(sa.bindparam("a", type_=Integer))
    statement = FromStatement([sa.literal(1)], text)

    assert isinstance(text._bindparams["a"].type, Integer)
    assert statement.__visit_name__ == "orm_from_statement"
    assert statement.element is text


def test_clauses_of_extensions_have_their_places() -> None:
    """``DISTINCT ON`` of the dialect is one; where it stands is looked for by name."""
    statement = sa.select(sa.column("a")).ext(postgresql.distinct_on(sa.column("a")))
    places = [n for n in vars(statement) if n.startswith(("_pre_", "_post_")) and "clause" in n]

    assert set(places) <= set(EXTENSION_CLAUSES)
    assert places


def test_a_view_says_that_it_is_one() -> None:
    assert sa.CreateView(sa.select(sa.literal(1).label("a")), "v").table.is_view
