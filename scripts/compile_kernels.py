"""Compiles the kernels anew, once, before the tests' processes would each do it at the same time.

Numba keeps what it compiled beside each module and looks at the date of that module alone: after a change to a kernel
that others call, the callers would go on with the old one. So everything kept goes first.
"""

from __future__ import annotations

from pathlib import Path

import profile_service
from profile_service import kernel_cache

PACKAGE = Path(profile_service.__file__).parent


def main() -> None:
    """Drops what numba kept of the package, then runs every kernel of the shipped schemas."""
    for kept in PACKAGE.rglob("*.nb[ics]"):
        kept.unlink(missing_ok=True)

    from profile_service.domain.schema import load_schema
    from profile_service.shard.warm import warm_kernels, warm_stored_kernels
    from profile_service.wire.warm import warm_scanning

    warm_scanning()
    for name in ("marketplace", "retail"):
        schema = load_schema(name)
        warm_kernels(schema)
        warm_stored_kernels(schema)
        for is_local in (True, False):
            kernel_cache.note_complete(schema.fingerprint, is_local=is_local)


if __name__ == "__main__":
    main()
