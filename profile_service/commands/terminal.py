"""Where output goes: results to stdout, progress and errors to stderr. An error is one line, never a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from profile_service.errors import ProfileServiceError, SchemaChangeRefused, SchemaError

if TYPE_CHECKING:
    from rich.console import Console

TRACEBACK_VARIABLE = "PROFILE_SERVICE_TRACEBACK"


class CommandError(ProfileServiceError):
    """A command cannot do what it was asked: says why, and what to do."""


def stdout() -> Console:
    """Results."""
    from rich.console import Console

    return Console(highlight=False)


def stderr() -> Console:
    """Progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say_error(message: str) -> None:
    """Prints an error to stderr."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def exit_status_of(error: BaseException) -> int:
    """Says what ended a command, and gives the exit status for it."""
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return 130
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    if isinstance(error, SchemaError) and error.faults:
        for fault in error.faults:
            print(f"{error.source}: {fault}", file=sys.stderr)
        count = len(error.faults)
        say_error(f"{error.source}: {count} {'fault' if count == 1 else 'faults'}; correct the lines named above")
    elif isinstance(error, SchemaChangeRefused) and len(error.faults) > 1:
        print(*error.faults, sep="\n", file=sys.stderr)
        say_error(f"the stored profiles cannot follow the changed schema: {len(error.faults)} faults, named above")
    elif isinstance(error, ProfileServiceError):
        say_error(error.message)
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "pyarrow":
        say_error("Parquet and CSV need pyarrow: pip install 'profile-service[arrow]'")
    elif isinstance(error, OSError) and error.filename is not None:
        say_error(f"{error.filename}: {error.strerror}")
    else:
        first_line = str(error).strip().split("\n")[0]
        say_error(f"{type(error).__name__}: {first_line} (set {TRACEBACK_VARIABLE}=1 to see where)")
    return 1


def plain(text: str) -> str:
    r"""Text of a stranger as a terminal may show it: without control characters.

    >>> plain("red\x1b[2J")
    'red\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
