"""Read the configuration: TOML, environment or a dict, to a topology and a policy.

The only module that knows how a configuration is written; nothing later in a statement's way reads
a file or an environment variable. It says what exists, never which node is the primary: that is
observed. All faults are found and reported together, each with its path, and no text made here
(fault, repr, JSON, exception chain) holds a password.

Imports pydantic, so import it where a configuration is loaded, not at the top of a library module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from sqlroute.errors import ConfigError
from sqlroute.operations import (
    PLACEHOLDERS,
    Command,
    DriverSpec,
    Operations,
    Operator,
    address,
    filled,
    is_pattern,
    unknown_placeholders,
)
from sqlroute.routing.policy import Balancing, Consistency, Policy
from sqlroute.topology import Coordinator, Keyspace, Node, RestApi, Secret, Shard, Topology

DEFAULT_FILE = "sqlroute.toml"
FILE_VARIABLE = "SQLROUTE_CONFIG"
POLICY_PREFIX = "SQLROUTE_POLICY__"

_LIBPQ = """
    application_name channel_binding client_encoding connect_timeout dbname
    fallback_application_name gssdelegation gssencmode gsslib host hostaddr keepalives
    keepalives_count keepalives_idle keepalives_interval krbsrvname max_protocol_version
    min_protocol_version oauth_client_id oauth_issuer oauth_scope options passfile password port
    require_auth requirepeer service ssl_max_protocol_version ssl_min_protocol_version sslcert
    sslcertmode sslcompression sslcrl sslcrldir sslkey sslkeylogfile sslmode sslnegotiation
    sslrootcert sslsni tcp_user_timeout user
"""
LIBPQ_PARAMETERS = frozenset(_LIBPQ.split())
"""What a node's URL may hand to libpq: the parameters of PostgreSQL 18's client library."""

_SECRET = "it is a secret that would be shown with the node; put it into a libpq service file"
_REFUSED = {
    "load_balance_hosts": "a node is one server; list each server as a node of its own",
    "oauth_client_secret": _SECRET,
    "replication": "a node is queried, not replicated from; remove it",
    "scram_client_key": _SECRET,
    "scram_server_key": _SECRET,
    "sslpassword": _SECRET,
    "target_session_attrs": "sqlroute observes which node is the primary; remove it",
}
_OWN_PARAMETERS = ("name", "zone", "weight", "discover", "pooler")
_PLACES = ("host", "port", "user", "password", "dbname")
_SCHEMES = ("postgresql", "postgresql+psycopg", "postgres")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_DEFAULTS = Policy()

_VARIABLE = re.compile(r"\$\{(?:(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|(?P<bad>))")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")
_NAME = re.compile(r"[\w.-]{1,63}")
_FUNCTION = re.compile(r"[a-z_][a-z0-9_$]*(\.[a-z_][a-z0-9_$]*)?")
_NAME_RULE = "a name has 1 to 63 letters, digits, '_', '-' or '.'"
_ONE_HOST = "must have one host, as name, address, or [IPv6 address], then :port"
_NODE_NAME = re.compile(r"[^\s@]{1,255}")
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?]*)(?:/(?P<database>[^?]*))?"
    r"(?:\?(?P<query>.*))?"
)
_AUTHORITY = re.compile(
    r"(?:(?P<user>[^:]*)(?::(?P<password>.*))?@)?"
    r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^:\[\]@]*))(?::(?P<port>[^@]*))?"
)

_ENDPOINT = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:/?#@\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?/?"
)
_PATRONI_PORT = 8008

_NOTHING = Operations()

_Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration without a fault.

    Attributes:
        path: the file it was read from, ``None`` for a dict.
        operations: what operators' commands need; routers do not.
    """

    topology: Topology
    policy: Policy
    path: Path | None = None
    operations: Operations = _NOTHING


@dataclass(frozen=True, slots=True)
class _Fault:
    path: _Path
    text: str

    def __str__(self) -> str:
        return f"{_shown_path(self.path)}: {self.text}"


def load(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read and check a configuration.

    Args:
        source: the path of a TOML file, or its content as a mapping, which is not changed.
            ``None``: the file named by ``SQLROUTE_CONFIG``, else ``sqlroute.toml`` here.
        environ: in place of ``os.environ``, for ``${VAR}`` in texts of the file and for
            ``SQLROUTE_POLICY__MAX_LAG=2s`` and its like, which win over the file.

    Raises:
        ConfigError: with every fault; passwords are in none of them.
    """
    environ = os.environ if environ is None else environ
    path: Path | None = None
    if isinstance(source, Mapping):
        written: Mapping[str, Any] = source
    else:
        path = Path(source) if source is not None else _found_file(environ)
        content = _read(path)
        if isinstance(content, _Fault):
            raise ConfigError((str(content),))
        written = content
    checked = _check(written, environ, path)
    if isinstance(checked, Settings):
        return checked
    # Raised here, where no other exception is being handled: those of pydantic and tomllib keep
    # their input, and would travel with this one as its context.
    raise ConfigError(tuple(str(fault) for fault in checked))


def describe(settings: Settings) -> dict[str, Any]:
    """Return the configuration as values for JSON, passwords masked, durations in seconds."""
    policy = {
        field.name: getattr(settings.policy, field.name)
        for field in dataclasses.fields(settings.policy)
    }
    policy |= {name: list(value) for name, value in policy.items() if isinstance(value, tuple)}
    return {
        "path": None if settings.path is None else str(settings.path),
        "policy": {**policy, "consistency": settings.policy.consistency.value},
        "keyspaces": [
            {
                "name": keyspace.name,
                "buckets": keyspace.buckets,
                "coordinator": _described_coordinator(keyspace.coordinator),
                "shards": [_described_shard(shard) for shard in keyspace.shards],
            }
            for keyspace in settings.topology.keyspaces
        ],
        "operator": _described_operator(settings.operations.operator),
        "drivers": [_described_driver(spec) for spec in settings.operations.drivers],
    }


def _described_shard(shard: Shard) -> dict[str, Any]:
    api = shard.patroni
    return {
        "name": shard.name,
        "nodes": [_described(node) for node in shard.nodes],
        "patroni": None if api is None else _described_api(api, shard.login),
    }


def _described_api(api: RestApi, login: Node | None) -> dict[str, Any]:
    return {
        "endpoints": list(api.endpoints),
        "user": api.user,
        "password": None if api.password is None else str(api.password),
        "ca_file": api.ca_file,
        "cert_file": api.cert_file,
        "key_file": api.key_file,
        "interval": api.interval,
        "timeout": api.timeout,
        "login": None if login is None else _described(login),
    }


def _described_coordinator(coordinator: Coordinator | None) -> dict[str, Any] | None:
    if coordinator is None:
        return None
    fields = {
        field.name: getattr(coordinator, field.name) for field in dataclasses.fields(coordinator)
    }
    return {**fields, "nodes": [_described(node) for node in coordinator.nodes]}


def _described_operator(operator: Operator) -> dict[str, Any]:
    return {
        "user": operator.user,
        "password": None if operator.password is None else str(operator.password),
        "passfile": operator.passfile,
    }


def _described_driver(spec: DriverSpec) -> dict[str, Any]:
    """Return what is said of a driver; of the user's commands only which programs they are."""
    said = {
        name: getattr(spec, name)
        for name in _DriverTable.model_fields
        if getattr(spec, name) != _DRIVER_DEFAULTS[name]
    }
    return {
        "nodes": spec.pattern,
        "kind": spec.kind,
        **{k: str(v) if isinstance(v, Command) else v for k, v in said.items() if k != "kind"},
    }


def _described(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "host": node.host,
        "port": node.port,
        "database": node.database,
        "user": node.user,
        "password": None if node.password is None else str(node.password),
        "zone": node.zone,
        "weight": node.weight,
        "options": dict(node.options),
        "pooler": node.pooler,
    }


# Reading


def _found_file(environ: Mapping[str, str]) -> Path:
    if named := environ.get(FILE_VARIABLE):
        return Path(named)
    here = Path.cwd() / DEFAULT_FILE
    if here.exists():
        return here
    fault = _Fault(
        (DEFAULT_FILE,),
        f"not in {here.parent}, and {FILE_VARIABLE} is not set; `sqlroute local up` makes one "
        "with servers to try, or give the path of yours",
    )
    raise ConfigError((str(fault),))


def _read(path: Path) -> dict[str, Any] | _Fault:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return _Fault((str(path),), f"no such file; set {FILE_VARIABLE} or give another path")
    except OSError as exc:
        return _Fault((str(path),), f"cannot be read: {(exc.strerror or 'unknown').lower()}")
    except UnicodeDecodeError:
        return _Fault((str(path),), "is not encoded in UTF-8, as TOML must be")
    except tomllib.TOMLDecodeError as exc:
        what, _, where = str(exc).rstrip(")").partition(" (at ")
        text = f"{where or 'somewhere'}: no valid TOML: {what[:1].lower()}{what[1:]}"
        return _Fault((str(path),), text)


def _overrides(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of the policy that the environment gives."""
    source = EnvSettingsSource(_Environment)
    source.env_vars = {
        name.lower(): value
        for name, value in environ.items()
        if name.upper().startswith(POLICY_PREFIX)
    }
    found: dict[str, Any] = source().get("policy", {})
    return found


def _substituted(value: Any, environ: Mapping[str, str], path: _Path, faults: list[_Fault]) -> Any:
    """Return the value with ``${VAR}`` and ``${VAR:-default}`` replaced in all texts."""
    if isinstance(value, Mapping):
        return {k: _substituted(v, environ, (*path, k), faults) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_substituted(v, environ, (*path, i), faults) for i, v in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replaced(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name is None:
            faults.append(_Fault(path, "'${' begins no variable; write ${VAR} or ${VAR:-default}"))
            return ""
        if default is not None:
            return environ.get(name) or default
        if name not in environ:
            text = f"environment variable {name} is not set; set it or write ${{{name}:-default}}"
            faults.append(_Fault(path, text))
        return environ.get(name, "")

    return _VARIABLE.sub(replaced, value)


# The form of the file


def _seconds(value: object) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        number = float(match[1]) * _UNITS.get(match[2] or "s", math.nan)
    if not math.isfinite(number):
        raise PydanticCustomError(
            "rule", 'is no duration; write "250ms", "5s", "2min", "1h" or a number of seconds'
        )
    if number < 0:
        raise PydanticCustomError("rule", "must not be negative")
    return number


def _more_than_nothing(value: float) -> float:
    if value == 0:
        raise PydanticCustomError("rule", "must be more than 0 seconds")
    return value


def _number(value: object) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise PydanticCustomError("rule", "must be a number, 0 or more")
    return number


def _at_most_one(value: float) -> float:
    if value > 1:
        raise PydanticCustomError("rule", "must be a share, 0 to 1")
    return value


def _some_number(value: float) -> float:
    if value == 0:
        raise PydanticCustomError("rule", "must be more than 0")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("rule", "must be a whole number")
    return value


def _listed(value: object) -> object:
    """Return a list written as one text, as environment variables are: ``a, b``."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _function_name(value: str) -> str:
    if _FUNCTION.fullmatch(value) is None:
        raise PydanticCustomError(
            "rule", 'is no name of a function; write "name" or "schema.name", in lower case'
        )
    return value


def _power_of_two(value: int) -> int:
    if not (1 <= value <= 65_536 and value & (value - 1) == 0):
        raise PydanticCustomError("rule", "must be a power of two, 1 to 65536")
    return value


def _template(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("rule", "has a control character")
    if unknown := unknown_placeholders(value):
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise PydanticCustomError(
            "rule",
            "{unknown} stands for nothing; known: {known}",
            {"unknown": f"{{{unknown[0]}}}", "known": known},
        )
    return value


def _word(value: str) -> str:
    if not value or value.startswith("-") or " " in value:
        raise PydanticCustomError("rule", "must be one word that does not begin with '-'")
    return value


def _directory(value: str) -> str:
    if not value.startswith("/"):
        raise PydanticCustomError("rule", "must be a whole path, beginning with '/'")
    return value.rstrip("/") or "/"


def _address(value: str) -> str:
    try:
        address(filled(value, dict.fromkeys(PLACEHOLDERS, "1")), 5432)
    except ValueError:
        raise PydanticCustomError("rule", "must be host:port") from None
    return value


def _words(value: str) -> str:
    _split_words(value)
    return value


def _command(value: object) -> object:
    """Return a command written as one text, as for a shell, or as a list of words."""
    words = _split_words(value) if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise PydanticCustomError("rule", "must be a command, as one text or a list of words")
    if not words or not words[0].strip():
        raise PydanticCustomError("rule", "is empty; name a program")
    for word in words:
        _template(word)
    return Command(tuple(Secret(word) for word in words))


def _split_words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as exc:
        raise PydanticCustomError(
            "rule", "cannot be split into words: {why}", {"why": str(exc).lower()}
        ) from None


_Template = Annotated[str, AfterValidator(_template)]
_Word = Annotated[_Template, AfterValidator(_word)]
_Directory = Annotated[_Template, AfterValidator(_directory)]
_Address = Annotated[_Template, AfterValidator(_address)]
_Words = Annotated[_Template, AfterValidator(_words)]
_Command = Annotated[Any, BeforeValidator(_command)]
_Seconds = Annotated[float, BeforeValidator(_seconds)]
_SomeSeconds = Annotated[_Seconds, AfterValidator(_more_than_nothing)]
_Number = Annotated[float, BeforeValidator(_number)]
_SomeNumber = Annotated[_Number, AfterValidator(_some_number)]
_Share = Annotated[_Number, AfterValidator(_at_most_one)]
_Whole = Annotated[int, BeforeValidator(_whole)]
_Functions = Annotated[
    tuple[Annotated[str, AfterValidator(_function_name)], ...], BeforeValidator(_listed)
]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _PolicyTable(_Table):
    max_lag: _Seconds = _DEFAULTS.max_lag
    consistency: Consistency = _DEFAULTS.consistency
    probe_interval: _SomeSeconds = _DEFAULTS.probe_interval
    probe_deadline: _SomeSeconds = _DEFAULTS.probe_deadline
    map_lease: _SomeSeconds = _DEFAULTS.map_lease
    token_wait: _Seconds | None = _DEFAULTS.token_wait
    scatter_timeout: _SomeSeconds = _DEFAULTS.scatter_timeout
    primary_fallback: bool = _DEFAULTS.primary_fallback
    primary_fallback_share: _Share = _DEFAULTS.primary_fallback_share
    primary_fallback_free: _Number = _DEFAULTS.primary_fallback_free
    balancing: Balancing = _DEFAULTS.balancing
    latency_window: _Seconds = _DEFAULTS.latency_window
    zone: str = _DEFAULTS.zone
    replicas_per_process: Annotated[_Whole, Field(ge=0)] = _DEFAULTS.replicas_per_process
    probe_rate: _SomeNumber = _DEFAULTS.probe_rate
    connections_per_node: Annotated[_Whole, Field(ge=0)] = _DEFAULTS.connections_per_node
    pool_size: Annotated[_Whole, Field(ge=1)] = _DEFAULTS.pool_size
    max_overflow: Annotated[_Whole, Field(ge=-1)] = _DEFAULTS.max_overflow
    pool_timeout: _Seconds = _DEFAULTS.pool_timeout
    connect_timeout: _SomeSeconds = _DEFAULTS.connect_timeout
    primary_wait: _Seconds = _DEFAULTS.primary_wait
    max_held: Annotated[_Whole, Field(ge=0)] = _DEFAULTS.max_held
    max_scatter_rows: Annotated[_Whole, Field(ge=0)] = _DEFAULTS.max_scatter_rows
    no_scatter: bool = _DEFAULTS.no_scatter
    no_coordinator: bool = _DEFAULTS.no_coordinator
    deadline: _SomeSeconds | None = _DEFAULTS.deadline
    allow_functions: _Functions = _DEFAULTS.allow_functions
    deny_functions: _Functions = _DEFAULTS.deny_functions


class _ShardTable(_Table):
    name: str
    nodes: list[str] = []
    patroni: list[str] = []
    url: str = ""


class _PatroniTable(_Table):
    user: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    interval: _SomeSeconds = 10.0
    timeout: _SomeSeconds = 2.0


class _CoordinatorTable(_Table):
    nodes: list[str] = Field(min_length=1)
    max_rows: Annotated[_Whole, Field(ge=1)] = 1_000_000
    timeout: _SomeSeconds = 60.0
    fetch_size: Annotated[_Whole, Field(ge=1)] = 10_000
    use_remote_estimate: bool = True
    replicas: Annotated[_Whole, Field(ge=0)] = 1


class _KeyspaceTable(_Table):
    buckets: Annotated[_Whole, AfterValidator(_power_of_two)] = 64
    shards: list[_ShardTable] = Field(min_length=1)
    coordinator: _CoordinatorTable | None = None


class _OperatorTable(_Table):
    user: str = ""
    password: str = ""
    passfile: str = ""


class _DriverTable(_Table):
    kind: Literal["local", "docker", "ssh", "program", "hook"]
    advertise: _Address = ""
    data: _Directory = ""
    bin: _Directory = ""
    account: _Word = ""
    log: _Directory = ""
    options: _Words = ""
    config: _Directory = ""
    host: _Word = ""
    user: _Word = ""
    port: Annotated[_Whole, Field(ge=1)] | None = None
    sudo: _Word = ""
    unit: _Word = ""
    ssh_options: tuple[_Template, ...] = ()
    container: _Word = ""
    docker: _Word = "docker"
    stop: _Command | None = None
    start: _Command | None = None
    kill: _Command | None = None
    status: _Command | None = None
    fence: _Command | None = None
    unfence: _Command | None = None
    hook_timeout: _SomeSeconds = 30.0


_DRIVER_DEFAULTS = {name: each.default for name, each in _DriverTable.model_fields.items()}
_OF_ALL = {"kind", "advertise", "fence", "unfence", "hook_timeout"}
_OF_DATA = {"data", "bin", "config"}
_OF_KIND = {
    "local": _OF_ALL | _OF_DATA | {"account", "log", "options"},
    "docker": _OF_ALL | _OF_DATA | {"account", "container", "docker"},
    "ssh": _OF_ALL | _OF_DATA
    | {"log", "options", "host", "user", "port", "sudo", "unit", "ssh_options"},
    "program": _OF_ALL,
    "hook": _OF_ALL | {"stop", "start", "kill", "status"},
}  # fmt: skip
_NEEDED = {"local": ("data",), "docker": ("container",), "ssh": ("data",)}
_HOOKS = ("stop", "start", "kill", "fence")


class _Document(_Table):
    policy: _PolicyTable = _PolicyTable()
    keyspaces: dict[str, _KeyspaceTable] = Field(min_length=1)
    patroni: _PatroniTable = _PatroniTable()
    operator: _OperatorTable = _OperatorTable()
    drivers: dict[str, _DriverTable] = {}


class _Environment(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SQLROUTE_", env_nested_delimiter="__", hide_input_in_errors=True
    )

    policy: dict[str, str] = {}


# Checking


def _check(
    written: Mapping[str, Any], environ: Mapping[str, str], path: Path | None
) -> Settings | list[_Fault]:
    faults: list[_Fault] = []
    filled: dict[str, Any] = _substituted(written, environ, (), faults)
    unfilled = {fault.path for fault in faults}
    overrides = _overrides(environ)
    if isinstance(filled.get("policy", {}), Mapping):
        filled["policy"] = {**filled.get("policy", {}), **overrides}
    document, form_faults = _check_form(filled, written, overrides)
    nodes, node_faults = _check_nodes(filled, unfilled)
    logins, source_faults = _check_sources(filled, unfilled)
    faults += [fault for fault in form_faults if fault.path not in unfilled]
    faults += node_faults + source_faults
    if document is not None and not node_faults:
        faults += _patroni_faults(document)
        faults += _driver_faults(document.drivers, [node.name for node in nodes.values()])
    if document is None or faults:
        return faults
    keyspaces = tuple(
        Keyspace(
            name,
            _shards(name, document, {**nodes, **logins}),
            table.buckets,
            _coordinator(name, table.coordinator, nodes),
        )
        for name, table in document.keyspaces.items()
    )
    policy = Policy(**{name: getattr(document.policy, name) for name in _PolicyTable.model_fields})
    return Settings(Topology(keyspaces), policy, path, _operations(document))


def _operations(document: _Document) -> Operations:
    table = document.operator
    operator = Operator(
        user=table.user,
        password=Secret(table.password) if table.password else None,
        passfile=table.passfile,
    )
    drivers = []
    for pattern, each in document.drivers.items():
        values = {name: getattr(each, name) for name in _DriverTable.model_fields}
        drivers.append(DriverSpec(pattern, **values))
    return Operations(operator, tuple(drivers))


def _driver_faults(tables: Mapping[str, _DriverTable], nodes: Sequence[str]) -> Iterator[_Fault]:
    for name, table in tables.items():
        path: _Path = ("drivers", name)
        if name not in nodes and not is_pattern(name):
            yield _Fault(
                path,
                f"no node has this name{_guess(name, nodes)}; a name with * stands for all nodes "
                "like it, those that are added later too",
            )
        given = {key for key in table.model_fields_set if getattr(table, key) not in (None, ())}
        for key in sorted(given - _OF_KIND[table.kind]):
            yield _Fault((*path, key), f"is nothing of a driver of kind {table.kind}")
        for key in _NEEDED.get(table.kind, ()):
            if not getattr(table, key):
                yield _Fault((*path, key), f"is missing: a driver of kind {table.kind} needs it")
        if table.kind == "hook" and not given.intersection(_HOOKS):
            yield _Fault(path, f"has no command; add one of {', '.join(_HOOKS)}")


def _shards(keyspace: str, document: _Document, nodes: Mapping[_Path, Node]) -> tuple[Shard, ...]:
    shards = []
    for i, table in enumerate(document.keyspaces[keyspace].shards):
        path: _Path = ("keyspaces", keyspace, "shards", i)
        own = tuple(nodes[(*path, "nodes", j)] for j in range(len(table.nodes)))
        api = _rest_api(document.patroni, table.patroni) if table.patroni else None
        shards.append(Shard(table.name, own, api, nodes.get((*path, "url"))))
    return tuple(shards)


def _rest_api(table: _PatroniTable, endpoints: Sequence[str]) -> RestApi:
    values = {name: getattr(table, name) for name in _PatroniTable.model_fields}
    values["password"] = Secret(table.password) if table.password else None
    return RestApi(tuple(dict.fromkeys(filter(None, map(_endpoint, endpoints)))), **values)


def _patroni_faults(document: _Document) -> Iterator[_Fault]:
    table = document.patroni
    shards = [shard for keyspace in document.keyspaces.values() for shard in keyspace.shards]
    if table.model_fields_set and not any(shard.patroni for shard in shards):
        yield _Fault(("patroni",), "no shard has patroni = [...], for which this would stand")
    for name, needed in (("password", "user"), ("user", "password"), ("key_file", "cert_file")):
        if getattr(table, name) and not getattr(table, needed):
            yield _Fault(("patroni", needed), f"is missing: {name} is given")


def _coordinator(
    keyspace: str, table: _CoordinatorTable | None, nodes: Mapping[_Path, Node]
) -> Coordinator | None:
    if table is None:
        return None
    values = {name: getattr(table, name) for name in _CoordinatorTable.model_fields}
    path: _Path = ("keyspaces", keyspace, "coordinator", "nodes")
    values["nodes"] = tuple(nodes[(*path, i)] for i in range(len(table.nodes)))
    return Coordinator(**values)


def _check_form(
    filled: Mapping[str, Any], written: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[_Document | None, list[_Fault]]:
    try:
        return _Document.model_validate(filled), []
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
    faults = []
    for error in errors:
        place: _Path = error["loc"]
        shown = _shown_value(written, place)
        if len(place) == 2 and place[0] == "policy" and place[1] in overrides:
            shown = repr(overrides[str(place[1])])
            path: _Path = (f"{POLICY_PREFIX}{str(place[1]).upper()}",)
        else:
            path = place
        faults.append(_Fault(path, _explained(error, shown)))
    return None, faults


def _explained(error: ErrorDetails, shown: str) -> str:
    """Return pydantic's fault in our words."""
    value = f"{shown} " if shown else ""
    context = error.get("ctx", {})
    match error["type"]:
        case "rule":
            return value + error["msg"]
        case "literal_error":
            return f"{value}must be one of {context['expected']}"
        case "missing":
            return "is missing" + _example(error["loc"])
        case "extra_forbidden":
            return "unknown setting" + _guess(str(error["loc"][-1]), _known(error["loc"]))
        case "too_short":
            return "is empty" + _example(error["loc"])
        case "greater_than_equal":
            return f"{value}must be at least {context['ge']}"
        case "enum":
            return f"{value}must be one of {context['expected']}"
        case "string_type":
            return f"must be a text, not {_kind(error['input'])}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"must be a table, not {_kind(error['input'])}"
        case "list_type" | "tuple_type":
            return f"must be a list, not {_kind(error['input'])}"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return f"{value}must be a whole number"
        case "bool_type" | "bool_parsing":
            return f"{value}must be true or false"
        case other:
            return f"{value}is not valid ({other})"


def _example(place: _Path) -> str:
    match place:
        case ("keyspaces",):
            return "; add a table [keyspaces.NAME] with [[keyspaces.NAME.shards]]"
        case (*_, "shards"):
            return '; a shard is a table with name = "s0" and nodes = ["postgresql://..."]'
        case (*_, "nodes"):
            return '; a node is a text, "postgresql://user@host:5432/database"'
        case (*_, "patroni"):
            return '; the REST API of a member is a text, "http://host:8008"'
        case (*_, "url"):
            return '; write "postgresql://user@/database": as whom the members are connected'
        case _:
            return ""


def _known(place: _Path) -> Iterable[str]:
    match place:
        case ("policy", _):
            return _PolicyTable.model_fields
        case ("keyspaces", _, _):
            return _KeyspaceTable.model_fields
        case ("keyspaces", _, "coordinator", _):
            return _CoordinatorTable.model_fields
        case ("keyspaces", _, "shards", _, _):
            return _ShardTable.model_fields
        case ("patroni", _):
            return _PatroniTable.model_fields
        case ("operator", _):
            return _OperatorTable.model_fields
        case ("drivers", _, _):
            return _DriverTable.model_fields
        case _:
            return _Document.model_fields


def _guess(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    if close := difflib.get_close_matches(name.lower(), names, n=1):
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names)}" if len(names) < 30 else ""


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    return "a text" if isinstance(value, str) else type(value).__name__


def _shown_value(written: Mapping[str, Any], place: _Path) -> str:
    """Return a value as the file has it, ``${VAR}`` unfilled; empty if it might hold a secret."""
    value: Any = written
    for step in place:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return ""
    if not isinstance(value, str | int | float) or "nodes" in place or place[0] == "operator":
        return ""
    if place[0] == "patroni" and place[-1] not in ("interval", "timeout"):
        return ""
    if place[0] == "drivers" and place[-1] not in ("kind", "port", "hook_timeout"):
        return ""
    text = repr(value)
    return "" if "://" in text or "@" in text or len(text) > 60 else text


def _shown_path(path: _Path) -> str:
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        elif "://" in step or "@" in step:
            shown += ".***"
        else:
            shown += f".{step}"
    return shown.removeprefix(".")


# Nodes


def _check_sources(
    filled: Mapping[str, Any], unfilled: set[_Path]
) -> tuple[dict[_Path, Node], list[_Fault]]:
    """Look at what says which nodes each shard has; return the logins of Patroni's members."""
    logins: dict[_Path, Node] = {}
    faults: list[_Fault] = []
    for path, shard in _shard_tables(filled):
        if not isinstance(shard, Mapping):
            continue
        nodes, endpoints, url = shard.get("nodes"), shard.get("patroni"), shard.get("url")
        if endpoints is None:
            faults += _without_patroni(path, nodes, url)
            continue
        if endpoints == []:
            faults.append(_Fault((*path, "patroni"), "is empty" + _example((*path, "patroni"))))
        faults += _endpoint_faults((*path, "patroni"), _list(endpoints), unfilled)
        if isinstance(url, str) and (*path, "url") not in unfilled:
            login, texts = _login(url)
            faults += [_Fault((*path, "url"), text) for text in texts]
            if login is not None:
                logins[(*path, "url")] = login
        elif url is None and not nodes:
            faults.append(_Fault((*path, "url"), "is missing" + _example((*path, "url"))))
        for i, node in enumerate(_list(nodes)):
            if isinstance(node, str) and "discover=" in node:
                text = "discover stands beside patroni, which tells the servers; remove it"
                faults.append(_Fault((*path, "nodes", i), text))
    return logins, faults


def _without_patroni(path: _Path, nodes: object, url: object) -> Iterator[_Fault]:
    if nodes is None or nodes == []:
        what = "is missing" if nodes is None else "is empty"
        yield _Fault((*path, "nodes"), what + _example((*path, "nodes")))
    if url is not None:
        yield _Fault((*path, "url"), "is for the members of Patroni; name its APIs in patroni")


def _endpoint_faults(
    path: _Path, endpoints: Sequence[object], unfilled: set[_Path]
) -> Iterator[_Fault]:
    for i, endpoint in enumerate(endpoints):
        if not isinstance(endpoint, str) or (*path, i) in unfilled:
            continue
        if "@" in endpoint:
            yield _Fault((*path, i), "has a user or password; these stand in the table [patroni]")
        elif _endpoint(endpoint) is None:
            yield _Fault((*path, i), "is no REST API; write http://host:8008 or https://host:8008")


def _endpoint(text: str) -> str | None:
    """Return the URL of a REST API in full, ``None`` for what is none."""
    found = _ENDPOINT.fullmatch(text)
    if found is None or not 1 <= int(found["port"] or _PATRONI_PORT) <= 65_535:
        return None
    return f"{found['scheme']}://{found['host']}:{found['port'] or _PATRONI_PORT}"


def _check_nodes(
    filled: Mapping[str, Any], unfilled: set[_Path]
) -> tuple[dict[_Path, Node], list[_Fault]]:
    """Read all URLs there are, whatever else is wrong, and look for what is there twice."""
    faults: list[_Fault] = []
    nodes: dict[_Path, Node] = {}
    shards: dict[str, _Path] = {}
    names: dict[str, _Path] = {}
    servers: dict[tuple[object, ...], _Path] = {}
    for path, shard, urls in (*_shards_written(filled), *_coordinators_written(filled)):
        if path[-1] == 0 and not _NAME.fullmatch(str(path[1])):
            faults.append(_Fault(path[:2], _NAME_RULE))
        if shard is not None and (*path, "name") not in unfilled:
            if _NAME.fullmatch(shard):
                _note(shards, shard, (*path, "name"), "shard name", faults)
            else:
                faults.append(_Fault((*path, "name"), _NAME_RULE))
        for place, url in urls:
            if place in unfilled:
                continue
            known = shard if shard and _NAME.fullmatch(shard) else "?"
            node, texts = _node(
                url, f"{path[1]}-coordinator" if path[-1] == "coordinator" else known
            )
            faults += [_Fault(place, text) for text in texts]
            if node is None:
                continue
            nodes[place] = node
            if _note(servers, _server(node), place, "server", faults):
                _note(names, node.name, place, "node name", faults)
    return nodes, faults


def _shards_written(
    filled: Mapping[str, Any],
) -> Iterator[tuple[_Path, str | None, list[tuple[_Path, str]]]]:
    """Yield path, name and URLs of each shard, passing over what has the wrong form."""
    for path, shard in _shard_tables(filled):
        name = _get(shard, "name")
        urls = [
            ((*path, "nodes", j), url)
            for j, url in enumerate(_list(_get(shard, "nodes")))
            if isinstance(url, str)
        ]
        yield path, name if isinstance(name, str) else None, urls


def _shard_tables(filled: Mapping[str, Any]) -> Iterator[tuple[_Path, object]]:
    for keyspace, table in _items(filled.get("keyspaces")):
        for i, shard in enumerate(_list(_get(table, "shards"))):
            yield ("keyspaces", keyspace, "shards", i), shard


def _coordinators_written(
    filled: Mapping[str, Any],
) -> Iterator[tuple[_Path, str | None, list[tuple[_Path, str]]]]:
    """Yield path and URLs of each coordinator, under the name that its nodes begin with."""
    for keyspace, table in _items(filled.get("keyspaces")):
        path: _Path = ("keyspaces", keyspace, "coordinator")
        urls = _list(_get(_get(table, "coordinator"), "nodes"))
        written = [((*path, "nodes", i), url) for i, url in enumerate(urls) if isinstance(url, str)]
        if written:
            yield path, None, written


def _items(value: object) -> Iterable[tuple[str, object]]:
    return value.items() if isinstance(value, Mapping) else ()


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _note(
    seen: dict[Any, _Path], key: object, path: _Path, what: str, faults: list[_Fault]
) -> bool:
    """Remember where a name stands; add a fault and return False if it stands elsewhere too."""
    first = seen.setdefault(key, path)
    if first == path:
        return True
    if what == "server":
        text = f"the same server and database as {_shown_path(first)}; each node is listed once"
    else:
        text = f"{what} {key} is taken by {_shown_path(first)}; names are unique over all keyspaces"
        text += "; write ?name= for another" if what == "node name" else ""
    faults.append(_Fault(path, text))
    return False


def _server(node: Node) -> tuple[object, ...]:
    options = dict(node.options)
    host = node.host if node.host.startswith("/") else node.host.lower()
    return (host, options.get("hostaddr"), options.get("service"), node.port, node.database)


def _node(url: str, shard: str) -> tuple[Node | None, list[str]]:
    """Return the node of a URL, or the faults, none of which quotes a part that may be secret."""
    faults: list[str] = []
    if misread := _misread(url):
        return None, [misread]
    values, given = _taken_apart(url, faults)
    address = values["host"] or given.get("hostaddr") or given.get("service")
    if "," in values["host"]:
        faults.append(_ONE_HOST)
    if not address and not faults:
        faults.append("no host; write one, or ?host=/socket/directory, or ?service=name")
    port = _port(values["port"] or "5432", faults)
    weight = _weight(given.pop("weight", "1"), faults)
    shown = f"[{address}]" if address and ":" in address else address
    name = given.pop("name", f"{shard}-{shown}:{port}")
    if not _NODE_NAME.fullmatch(name):
        faults.append("name must be a text without spaces and '@'")
    zone = given.pop("zone", "")
    pooler = given.pop("pooler", "")
    if pooler not in ("", "transaction"):
        faults.append(
            f"pooler {pooler[:20]!r} is not known; write pooler=transaction, or leave it out for "
            "none or one that gives a session a connection of its own"
        )
    discover = given.pop("discover", "")
    if discover not in ("", "dns"):
        faults.append("discover must be dns: the host is a name of several servers")
    elif discover and (not values["host"] or values["host"].startswith("/")):
        faults.append("discover=dns needs a host name")
    if faults:
        return None, faults
    node = Node(
        name=name,
        host=values["host"],
        port=port,
        database=values["dbname"],
        user=values["user"],
        password=Secret(values["password"]) if values["password"] else None,
        zone=zone,
        weight=weight,
        options=tuple(given.items()),
        pooler=pooler,
        discovers=bool(discover),
    )
    return node, []


def _login(url: str) -> tuple[Node | None, list[str]]:
    """Return as whom, and to which database, a URL without a host connects, or the faults."""
    faults: list[str] = []
    if misread := _misread(url):
        return None, [misread]
    values, given = _taken_apart(url, faults)
    if values["host"] or values["port"] or given.get("hostaddr"):
        faults.append("has a host or port: Patroni tells them; write postgresql://user@/database")
    for name in _OWN_PARAMETERS:
        if name in given:
            faults.append(f"parameter {name} is of a single node; remove it")
    if faults:
        return None, faults
    password = Secret(values["password"]) if values["password"] else None
    options = tuple(given.items())
    return Node("", "", 5432, values["dbname"], values["user"], password, options=options), []


def _taken_apart(url: str, faults: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return a URL's places, and its other parameters.

    Not :func:`urllib.parse.urlsplit`: its messages quote what it cannot read.
    """
    parts, values = _split(url, faults)
    given = _parameters(parts.get("query") or "", faults)
    for place in _PLACES:
        if place in given and values.get(place):
            faults.append(f"{place} is given twice, before and after '?'")
        values[place] = given.pop(place, "") or values.get(place, "")
    return values, given


def _misread(url: str) -> str | None:
    """Return why a URL cannot be taken apart without mistaking a password for something else."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return "is no URL; write postgresql://user@host:5432/database"
    if scheme not in _SCHEMES:
        known = re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme)
        return f"scheme {scheme if known else '?'} is not one of {', '.join(_SCHEMES)}"
    if not rest.isprintable() or " " in rest:
        return "has a space or a control character; percent-encode it (a space is %20)"
    before = rest.partition("@")[0]
    if rest.count("@") > 1 or "#" in rest or ("@" in rest and re.search(r"[/?]", before)):
        return "has one of @ / ? # out of place; percent-encode these (%40 %2F %3F %23)"
    return None


def _split(url: str, faults: list[str]) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the URL's parts, raw, and those in libpq's words, decoded."""
    whole = _URL.fullmatch(url)
    parts = whole.groupdict() if whole else {}
    authority = _AUTHORITY.fullmatch(parts.get("authority") or "")
    if not authority:
        faults.append(_ONE_HOST)
        return parts, {}
    database = parts.get("database") or ""
    if "/" in database:
        faults.append("must have one database after the host; percent-encode a '/' in its name")
    raw = {
        "host": authority["v6"] or authority["host"],
        "port": authority["port"],
        "user": authority["user"],
        "password": authority["password"],
        "dbname": database,
    }
    return parts, {name: _decoded(text or "", name, faults) for name, text in raw.items()}


def _decoded(text: str, what: str, faults: list[str]) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = "\0"
    if "\0" in decoded or re.search(r"%(?![0-9A-Fa-f]{2})", text):
        faults.append(f"{what} has a wrong percent-encoding; '%' itself is %25")
        return ""
    return decoded


def _parameters(query: str, faults: list[str]) -> dict[str, str]:
    """Return what stands after '?'; ``+`` is a plus, as in libpq."""
    known = LIBPQ_PARAMETERS.union(_OWN_PARAMETERS)
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, text = part.partition("=")
        if not re.fullmatch("[A-Za-z_]{1,40}", name) or not equals:
            faults.append("a parameter after '?' is not of the form name=value")
        elif name in _REFUSED:
            faults.append(f"parameter {name} is refused: {_REFUSED[name]}")
        elif name not in known:
            faults.append(f"unknown parameter {name}{_guess(name, known)}")
        elif name in given:
            faults.append(f"parameter {name} is given twice")
        else:
            given[name] = _decoded(text, name, faults)
    return given


def _port(text: str, faults: list[str]) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= 65_535:
        return int(text)
    faults.append("port must be a number, 1 to 65535")
    return 0


def _weight(text: str, faults: list[str]) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        faults.append(f"weight {text[:20]!r} must be a number, 0 or more")
    return weight
