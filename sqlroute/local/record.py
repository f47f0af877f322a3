"""The state file: what ``up`` built in a directory, so that later commands find it.

It holds the password of the topology and is readable by its owner only.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlroute.errors import LocalTopologyError
from sqlroute.local.spec import LocalSpec
from sqlroute.topology import Secret

NAME = "topology.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A built topology.

    Attributes:
        spec: as built; its directory is where the record was found.
        version: PostgreSQL's major version of all nodes.
        pg_bin: the bin directory that built it.
    """

    spec: LocalSpec
    version: int
    pg_bin: Path
    password: Secret


def read_record(directory: Path) -> Record | None:
    """Return the record in a directory, None when there is none.

    Raises:
        LocalTopologyError: it is another user's, damaged, or of another version of sqlroute.
    """
    path = directory / NAME
    try:
        values = json.loads(path.read_text())
        if values["format"] != _FORMAT:
            raise LocalTopologyError(
                f"{path} has format {values['format']}, this sqlroute reads {_FORMAT}; "
                "use the sqlroute that wrote it, or remove the directory"
            )
        spec = LocalSpec(**_spec_values(values["spec"], directory))
        return Record(spec, values["version"], Path(values["pg_bin"]), Secret(values["password"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as exc:
        raise LocalTopologyError(
            f"{path} is another user's; run as the user who ran up, or name another directory"
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise LocalTopologyError(f"{path} is damaged ({exc!r}); remove the directory") from exc


def write_record(record: Record) -> None:
    spec = {key: value for key, value in asdict(record.spec).items() if key != "directory"}
    values = {
        "format": _FORMAT,
        "version": record.version,
        "pg_bin": str(record.pg_bin),
        "password": record.password.reveal(),
        "spec": {**spec, "pg_bin": str(record.spec.pg_bin) if record.spec.pg_bin else None},
        "nodes": [asdict(place) for place in record.spec.places()],
    }
    write_private(record.spec.directory / NAME, json.dumps(values, indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, never seen half written."""
    work = path.with_name(f".{path.name}.new")
    work.unlink(missing_ok=True)
    with os.fdopen(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    work.replace(path)


def refuse_mismatch(record: Record, spec: LocalSpec) -> None:
    """Compare what is there with what is asked for.

    Raises:
        LocalTopologyError: they differ; names every difference.
    """
    there, asked = asdict(record.spec), asdict(replace(spec, directory=record.spec.directory))
    differences = [
        f"{key}={there[key]} (asked {asked[key]})"
        for key in there
        if key != "pg_bin" and there[key] != asked[key]
    ]
    if differences:
        raise LocalTopologyError(
            f"the topology in {record.spec.directory} was built with {', '.join(differences)}; "
            "ask for the same, reset it, or name another directory"
        )


def _spec_values(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    pg_bin = values["pg_bin"]
    return {**values, "directory": directory, "pg_bin": Path(pg_bin) if pg_bin else None}
