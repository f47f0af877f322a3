"""Functions of PostgreSQL that a hot standby may run: they change nothing and take no lock.

Only what is listed here counts as a read; an unknown function sends its statement to the primary
(promise 3). All names are immutable or stable in ``pg_proc`` of PostgreSQL 15 to 18, or volatile
without an effect (``random``, ``clock_timestamp``...).
"""

from __future__ import annotations

_MATH = """abs acos asin atan atan2 cbrt ceil ceiling cos cot degrees div erf exp factorial floor
gcd lcm ln log log10 min_scale mod pi power pow radians round scale sign sin sqrt tan tanh
trim_scale trunc width_bucket random"""

_TEXT = """ascii bit_length btrim char_length character_length chr concat concat_ws convert_from
convert_to decode encode format initcap left length lower lpad ltrim md5 normalize octet_length
overlay parse_ident position quote_ident quote_literal quote_nullable regexp_count regexp_instr
regexp_like regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table
regexp_substr repeat replace reverse right rpad rtrim sha224 sha256 sha384 sha512 split_part
starts_with string_to_array string_to_table strpos substr substring to_ascii to_hex translate trim
unaccent unistr upper similarity word_similarity"""

_TIME = """age clock_timestamp current_date current_time current_timestamp date date_bin date_part
date_trunc extract isfinite justify_days justify_hours justify_interval localtime localtimestamp
make_date make_interval make_time make_timestamp make_timestamptz now statement_timestamp timeofday
timezone to_char to_date to_number to_timestamp transaction_timestamp"""

_VALUES = """coalesce greatest least nullif num_nonnulls num_nulls cast array array_append array_cat
array_dims array_fill array_length array_lower array_ndims array_position array_positions
array_prepend array_remove array_replace array_to_string array_upper cardinality trim_array unnest
generate_series generate_subscripts int4range int8range numrange tsrange tstzrange daterange
lower_inc upper_inc isempty range_merge row to_json to_jsonb json_build_object json_build_array
jsonb_build_object jsonb_build_array json_array_length jsonb_array_length json_array_elements
jsonb_array_elements json_array_elements_text jsonb_array_elements_text json_each jsonb_each
json_each_text jsonb_each_text json_extract_path jsonb_extract_path json_extract_path_text
jsonb_extract_path_text json_object_keys jsonb_object_keys json_typeof jsonb_typeof jsonb_set
jsonb_insert jsonb_pretty jsonb_strip_nulls jsonb_path_exists jsonb_path_match jsonb_path_query
jsonb_path_query_array jsonb_path_query_first to_tsvector to_tsquery plainto_tsquery
phraseto_tsquery websearch_to_tsquery ts_rank ts_rank_cd ts_headline setweight gen_random_uuid
hashint8extended hashtextextended host network masklen family"""

_AGGREGATES = """count sum avg min max bool_and bool_or every bit_and bit_or bit_xor array_agg
string_agg json_agg jsonb_agg json_object_agg jsonb_object_agg stddev stddev_pop stddev_samp
variance var_pop var_samp corr covar_pop covar_samp regr_avgx regr_avgy regr_count regr_intercept
regr_r2 regr_slope regr_sxx regr_sxy regr_syy mode percentile_cont percentile_disc rank dense_rank
percent_rank cume_dist row_number ntile lag lead first_value last_value nth_value grouping
grouping_sets cube rollup aggregate_strings any_value"""

_SYSTEM = """current_catalog current_database current_role current_schema current_schemas
current_setting current_user session_user user version pg_typeof pg_is_in_recovery
pg_last_wal_replay_lsn pg_last_wal_receive_lsn pg_last_xact_replay_timestamp pg_wal_lsn_diff
pg_column_size pg_database_size pg_relation_size pg_table_size pg_total_relation_size pg_size_pretty
to_regclass obj_description col_description inet_server_addr inet_server_port
satisfies_hash_partition pg_sleep"""

HARMLESS: frozenset[str] = frozenset(
    " ".join((_MATH, _TEXT, _TIME, _VALUES, _AGGREGATES, _SYSTEM)).split()
)
"""Names of functions that count as reads."""

AGGREGATES: frozenset[str] = frozenset(_AGGREGATES.split())
"""Names of aggregate, ordered-set and window functions among them."""
