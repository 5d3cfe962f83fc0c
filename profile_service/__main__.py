"""The command `profile-service`, and `python -m profile_service`.

Loading the command line takes a moment, in which it can be interrupted, too: nobody should be shown a traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line (`cli.py`)."""
    try:
        from profile_service.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
