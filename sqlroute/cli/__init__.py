"""The command line: parse, call a function that one can import, show its answer.

Nothing here imports SQLAlchemy, Alembic or a driver before a command runs, so that ``--help`` and
completion answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from sqlroute.cli.output import FAILED, INTERRUPTED, OK, Output, is_expected


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the name of the program; ``None`` for those of the process.
    """
    try:
        import rich  # noqa: F401 - is it there?
        import typer  # noqa: F401 - is it there?
    except ImportError as exc:
        sys.stderr.write(f"error: the command line needs {exc.name}; install sqlroute[cli]\n")
        return FAILED
    from sqlroute.cli.app import app

    # What happens to nodes is part of the answer; without a handler Python prints warnings itself.
    logging.getLogger("sqlroute").addHandler(logging.NullHandler())
    output = Output()
    try:
        app(None if arguments is None else list(arguments), prog_name="sqlroute", obj=output)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK if end.code is None else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_expected(error):
            raise
        return output.failed(error)
    return OK
