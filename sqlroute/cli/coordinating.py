"""What the commands of coordinators answer, as documents of plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlroute.config import Settings
from sqlroute.ops import coordinator
from sqlroute.ops.coordinator import Report
from sqlroute.router import Router


def install(settings: Settings, analyze: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Build every coordinator; see :func:`sqlroute.ops.coordinator.install`."""
    with Router(settings.topology, settings.policy) as router:
        return _document(coordinator.install(router, settings.operations, analyze=analyze, say=say))


def refresh(settings: Settings, analyze: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Build every coordinator anew; see :func:`sqlroute.ops.coordinator.refresh`."""
    with Router(settings.topology, settings.policy) as router:
        return _document(coordinator.refresh(router, settings.operations, analyze=analyze, say=say))


def check(settings: Settings) -> dict[str, Any]:
    """Look at every coordinator; see :func:`sqlroute.ops.coordinator.check`."""
    with Router(settings.topology, settings.policy) as router:
        return _document(coordinator.check(router))


def remove(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Take every coordinator's tables away; see :func:`sqlroute.ops.coordinator.remove`."""
    with Router(settings.topology, settings.policy) as router:
        return _document(coordinator.remove(router, settings.operations, say))


def _document(reports: Iterable[Report]) -> dict[str, Any]:
    documents = [report.document() for report in reports]
    return {"healthy": not any(d["faults"] for d in documents), "coordinators": documents}
