"""Decide which functions a replica may run: those that change nothing and take no lock.

The rule, first match wins: the policy's ``deny_functions``, then its ``allow_functions``; then
:data:`HARMLESS_VOLATILE` and the names known to be no reads, since ``pg_proc`` tells less than we
know (a stable function may run a query given as text); then ``pg_proc`` itself, read by
:mod:`sqlroute.catalog.functions`: a name is a read if no function that it may mean is volatile.
Until that was read, the names of :data:`HARMLESS` count as reads and no other: unknown means
primary (promise 3).

What this does not see, since no name in a statement says it: functions behind operators, casts,
views, row security and ``table.function`` for ``function(table)``. A replica refuses those that
write (25006); one that takes an advisory lock belongs behind a name of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

from sqlroute.routing.policy import Policy

_MATH = """abs acos asin atan atan2 cbrt ceil ceiling cos cot degrees div erf exp factorial floor
gcd lcm ln log log10 min_scale mod pi power pow radians round scale sign sin sqrt tan tanh
trim_scale trunc width_bucket"""

_TEXT = """ascii bit_length btrim char_length character_length chr concat concat_ws convert_from
convert_to decode encode format initcap left length lower lpad ltrim md5 normalize octet_length
overlay parse_ident position quote_ident quote_literal quote_nullable regexp_count regexp_instr
regexp_like regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table
regexp_substr repeat replace reverse right rpad rtrim sha224 sha256 sha384 sha512 split_part
starts_with string_to_array string_to_table strpos substr substring to_ascii to_hex translate unistr
upper"""

_TIME = """age date date_bin date_part date_trunc extract isfinite justify_days justify_hours
justify_interval make_date make_interval make_time make_timestamp make_timestamptz now
statement_timestamp timezone to_char to_date to_number to_timestamp transaction_timestamp"""

_VALUES = """num_nonnulls num_nulls array_append array_cat
array_dims array_fill array_length array_lower array_ndims array_position array_positions
array_prepend array_remove array_replace array_to_string array_upper cardinality trim_array unnest
generate_series generate_subscripts int4range int8range numrange tsrange tstzrange daterange
lower_inc upper_inc isempty range_merge to_json to_jsonb json_build_object json_build_array
jsonb_build_object jsonb_build_array json_array_length jsonb_array_length json_array_elements
jsonb_array_elements json_array_elements_text jsonb_array_elements_text json_each jsonb_each
json_each_text jsonb_each_text json_extract_path jsonb_extract_path json_extract_path_text
jsonb_extract_path_text json_object_keys jsonb_object_keys json_typeof jsonb_typeof jsonb_set
jsonb_insert jsonb_pretty jsonb_strip_nulls jsonb_path_exists jsonb_path_match jsonb_path_query
jsonb_path_query_array jsonb_path_query_first to_tsvector to_tsquery plainto_tsquery
phraseto_tsquery websearch_to_tsquery ts_rank ts_rank_cd ts_headline setweight hashint8extended
hashtextextended host network masklen family"""

_AGGREGATES = """count sum avg min max bool_and bool_or every bit_and bit_or bit_xor array_agg
string_agg json_agg jsonb_agg json_object_agg jsonb_object_agg stddev stddev_pop stddev_samp
variance var_pop var_samp corr covar_pop covar_samp regr_avgx regr_avgy regr_count regr_intercept
regr_r2 regr_slope regr_sxx regr_sxy regr_syy mode percentile_cont percentile_disc rank dense_rank
percent_rank cume_dist row_number ntile lag lead first_value last_value nth_value any_value"""

_SYSTEM = """current_database current_schema current_schemas current_setting current_user
session_user version pg_typeof pg_wal_lsn_diff pg_column_size pg_size_pretty to_regclass
obj_description col_description inet_server_addr inet_server_port satisfies_hash_partition"""

_EXTENSIONS = "similarity unaccent word_similarity"

_GROUPINGS = "aggregate_strings cube grouping grouping_sets rollup"

_CONSTRUCTS = """array cast coalesce current_catalog current_date current_role current_time
current_timestamp greatest least localtime localtimestamp nullif row trim user"""

_VOLATILE = """array_sample array_shuffle clock_timestamp gen_random_uuid pg_database_size
pg_is_in_recovery pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp
pg_relation_size pg_sleep pg_sleep_for pg_sleep_until pg_table_size pg_total_relation_size random
random_normal timeofday uuidv4 uuidv7"""

_DENIED = """connectby currtid2 currval lastval loread lowrite nextval pg_backend_pid
pg_current_xact_id pg_current_xact_id_if_assigned pg_cursor pg_export_snapshot
pg_get_replication_slots pg_is_other_temp_schema pg_listening_channels pg_my_temp_schema pg_notify
pg_prepared_statement set_config setseed setval ts_stat txid_current txid_current_if_assigned
xpath_table"""

_DENIED_PREFIXES = """binary_upgrade_ crosstab cursor_to_xml database_to_xml dblink lo_ pg_advisory_
pg_cancel_ pg_logical_ pg_promote pg_replication_ pg_stat_ pg_terminate_ pg_try_advisory_
pg_wal_replay_ query_to_xml schema_to_xml table_to_xml"""

CONSTRUCTS: frozenset[str] = frozenset((*_CONSTRUCTS.split(), *_GROUPINGS.split()))
"""Names that SQL or SQLAlchemy gives to what is no function in ``pg_proc``."""

HARMLESS_VOLATILE: frozenset[str] = frozenset(_VOLATILE.split())
"""Names of functions that are volatile only because two calls differ."""

EXTENSIONS: frozenset[str] = frozenset(_EXTENSIONS.split())
"""Names of much used functions of extensions, stable or immutable where they are installed."""

HARMLESS: frozenset[str] = (
    frozenset(" ".join((_MATH, _TEXT, _TIME, _VALUES, _AGGREGATES, _SYSTEM)).split())
    | CONSTRUCTS
    | HARMLESS_VOLATILE
    | EXTENSIONS
)
"""Names that count as reads without a look at ``pg_proc``."""

AGGREGATES: frozenset[str] = frozenset((*_AGGREGATES.split(), *_GROUPINGS.split()))
"""Names of aggregate, ordered-set and window functions among them."""

GROUPINGS: frozenset[str] = frozenset(("cube", "grouping", "grouping_sets", "rollup"))
"""Names of what makes several groupings at once."""

SEQUENCES: frozenset[str] = frozenset(("nextval", "setval", "next_value"))
"""Names that advance a sequence: known to be writes."""

FunctionName: TypeAlias = tuple[str, str]
"""Schema and name as PostgreSQL stores them; an empty schema when the statement gives none."""


class Volatility(Enum):
    """What ``pg_proc`` says of all functions that a name may mean.

    Attributes:
        PLAIN: immutable, of one row, one value for one row: the same on every shard.
        READ: immutable or stable; an aggregate, or it may read tables.
        VOLATILE: at least one of them is volatile, or is an aggregate made of such.
    """

    PLAIN = "plain"
    READ = "read"
    VOLATILE = "volatile"


class Verdict(Enum):
    """What a call means for its statement.

    Attributes:
        PLAIN: a read, and what it computes does not depend on the shard.
        READ: a read; what it looks at nobody knows.
        DENIED: no read, by a list.
        VOLATILE: no read, by ``pg_proc``.
        UNDECIDED: no list and no catalog knows it.
    """

    PLAIN = "plain"
    READ = "read"
    DENIED = "denied"
    VOLATILE = "volatile"
    UNDECIDED = "undecided"

    @property
    def is_read(self) -> bool:
        return self in (Verdict.PLAIN, Verdict.READ)


_OF_CATALOG: Mapping[Volatility | None, Verdict] = {
    Volatility.PLAIN: Verdict.PLAIN,
    Volatility.READ: Verdict.READ,
    Volatility.VOLATILE: Verdict.VOLATILE,
    None: Verdict.UNDECIDED,
}
_SEVERITY = tuple(Volatility)

FunctionCatalog: TypeAlias = Mapping[FunctionName, Volatility]
"""The functions of a keyspace: by schema and name, and by name alone over all schemas."""


@dataclass(frozen=True, slots=True)
class Functions:
    """All that is known of functions: the policy's lists, and the catalog of each keyspace.

    Attributes:
        allow, deny: names, with their schema or without; a name without means every schema.
        catalogs: by the name of the keyspace, once they were read.
    """

    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()
    catalogs: Mapping[str, FunctionCatalog] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        read = ", ".join(f"{name}: {len(of)}" for name, of in self.catalogs.items())
        return f"Functions(allow={len(self.allow)}, deny={len(self.deny)}, catalogs={{{read}}})"

    def verdict(self, called: FunctionName, keyspace: str) -> Verdict:
        """Return what a call of a function means in a statement of a keyspace."""
        schema, name = called
        own = (name, f"{schema}.{name}") if schema else (name,)
        if self.deny and (self.deny.intersection(own) or (not schema and self._is_denied(name))):
            return Verdict.DENIED
        is_harmless = name in HARMLESS and schema in ("", "pg_catalog")
        if self.allow.intersection(own):
            return Verdict.PLAIN if is_harmless else Verdict.READ
        if name in HARMLESS_VOLATILE and schema in ("", "pg_catalog"):
            return Verdict.PLAIN
        if name in _DENIED_NAMES or name.startswith(_DENIED_STARTS):
            return Verdict.DENIED
        catalog = self.catalogs.get(keyspace)
        if catalog is None or (is_harmless and name in CONSTRUCTS):
            return Verdict.PLAIN if is_harmless else Verdict.UNDECIDED
        found = _OF_CATALOG[catalog.get(called)]
        # The aggregates and stable functions of the list are known to merge, or to be refused.
        return Verdict.PLAIN if found is Verdict.READ and is_harmless else found

    def _is_denied(self, name: str) -> bool:
        """Say whether a name without its schema may mean a function denied with its schema."""
        return any(denied.rpartition(".")[2] == name for denied in self.deny)

    def learnt(self, keyspace: str, catalog: FunctionCatalog) -> Functions:
        """Return the same with the catalog of a keyspace; itself when that says nothing new."""
        if self.catalogs.get(keyspace) == catalog:
            return self
        catalogs = MappingProxyType({**self.catalogs, keyspace: catalog})
        return Functions(self.allow, self.deny, catalogs)


_DENIED_NAMES = frozenset(_DENIED.split())
_DENIED_STARTS = tuple(_DENIED_PREFIXES.split())
BUILT_IN = Functions()
"""What is known without a server."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the calls of one statement mean for it.

    Attributes:
        unknown: why it is not proved to be a read.
        opaque: a call that may look at other rows than the statement, which a shard alone lacks.
        undecided: a catalog that is read now might know more.
    """

    unknown: tuple[str, ...] = ()
    opaque: str | None = None
    undecided: bool = False


_HARMLESS = Judgement()


def judge(calls: Collection[FunctionName], keyspace: str, functions: Functions) -> Judgement:
    """Return what the calls of a statement of a keyspace mean for it."""
    if not calls:
        return _HARMLESS
    unknown: list[str] = []
    opaque: str | None = None
    undecided = False
    for called in dict.fromkeys(calls):
        verdict = functions.verdict(called, keyspace)
        if verdict is Verdict.PLAIN:
            continue
        name = ".".join(filter(None, called))
        if verdict is Verdict.READ:
            opaque = opaque or f"{name}()"
        elif verdict is Verdict.VOLATILE:
            unknown.append(f"function {name}() is volatile in pg_proc, so it may write")
        else:
            unknown.append(f"function {name}() is not known to be read-only")
            undecided |= verdict is Verdict.UNDECIDED
    return Judgement(tuple(unknown), opaque, undecided)


def known(policy: Policy) -> Functions:
    """Return what is known without a server, with the lists of a policy."""
    return Functions(frozenset(policy.allow_functions), frozenset(policy.deny_functions))


def catalog_of(rows: Iterable[tuple[str, str, bool, bool]]) -> FunctionCatalog:
    """Return the catalog of one server.

    Args:
        rows: schema, name, whether any such function is volatile, whether all are plain.
    """
    found: dict[FunctionName, Volatility] = {}
    for schema, name, is_volatile, is_plain in rows:
        volatility = Volatility.PLAIN if is_plain else Volatility.READ
        if is_volatile:
            volatility = Volatility.VOLATILE
        found[schema, name] = volatility
        found["", name] = _worse(volatility, found.get(("", name), volatility))
    return MappingProxyType(found)


def in_common(catalogs: Iterable[FunctionCatalog]) -> FunctionCatalog | None:
    """Return what holds on every shard: the names that all have, each at its worst."""
    found: FunctionCatalog | None = None
    for catalog in catalogs:
        if found is None or found == catalog:
            found = catalog
            continue
        both = {n: _worse(v, catalog[n]) for n, v in found.items() if n in catalog}
        found = MappingProxyType(both)
    return found


def _worse(one: Volatility, other: Volatility) -> Volatility:
    return max(one, other, key=_SEVERITY.index)
