"""Node drivers: how the machine of a node is reached, beside SQL.

:func:`driver_of` makes one from the configuration; what it can do is
:class:`~sqlroute.ops.drivers.base.Driver`.
"""

from __future__ import annotations

from dataclasses import replace

from sqlroute.operations import Operations
from sqlroute.ops.drivers.base import Ability, Control, Driver, Rewound
from sqlroute.topology import Node

__all__ = ["Ability", "Control", "Driver", "Rewound", "driver_of", "operator_node"]


def driver_of(node: Node, shard: str, operations: Operations) -> Driver | None:
    """Return the driver of a node, ``None`` where ``[drivers]`` has none. Reaches nothing yet."""
    spec = operations.spec_of(node, shard)
    if spec is None:
        return None
    match spec.kind:
        case "local":
            from sqlroute.ops.drivers.local import LocalDriver

            return LocalDriver(node.name, spec)
        case "docker":
            from sqlroute.ops.drivers.docker import DockerDriver

            return DockerDriver(node.name, spec)
        case "ssh":
            from sqlroute.ops.drivers.ssh import SshDriver

            return SshDriver(node.name, spec)
        case "program":
            from sqlroute.ops.drivers.program import ProgramDriver

            return ProgramDriver(node.name, spec, operator_node(node, operations))
        case "hook":
            from sqlroute.ops.drivers.hook import HookDriver

            return HookDriver(node.name, spec)
        case other:
            raise ValueError(f"unknown kind of driver {other!r}")


def operator_node(node: Node, operations: Operations) -> Node:
    """Return the node with the operator's credentials; what ``[operator]`` leaves out is its own.

    Another user never gets the password of the node's: without one of its own, libpq looks into
    the password file.
    """
    operator = operations.operator
    options = dict(node.options)
    changes_user = bool(operator.user) and operator.user != node.user
    password = operator.password or (None if changes_user or operator.passfile else node.password)
    if changes_user or operator.password or operator.passfile:
        options.pop("passfile", None)
    if operator.passfile:
        options["passfile"] = operator.passfile
    return replace(
        node,
        user=operator.user or node.user,
        password=password,
        options=tuple(options.items()),
    )
