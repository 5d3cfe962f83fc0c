"""What a node has for the service: its data directory, the shards in it, the ports. Runs on the node itself; no Ray.

    DATA_DIR/
      node.json     {"name": …, "service": …, "grpc_port": …, "http_port": …}, a `Document`; `service` is the id of the
                    manifest. Made when the node first becomes part of the service, kept as long as the data
      shard-3/ …    those shards that have their home here

The name is in the directory, and goes where the data goes: a node that is started anew, or a disk that is attached to
another machine, is known by it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from profile_service.cluster.ports import bind
from profile_service.config import LOCAL, Settings
from profile_service.errors import DataLoss, StartupError
from profile_service.storage.data_directory import (
    MANIFEST,
    NODE,
    SHARD_PREFIX,
    STORE,
    DataDirectory,
    Manifest,
    shard_directory,
)
from profile_service.storage.document import Document
from profile_service.storage.fs import FileSystem, LockHeld, RealFileSystem


@dataclass(frozen=True)
class Survey:
    """What was found on a node."""

    name: str
    data_dir: Path
    grpc_port: int = 0
    http_port: int = 0
    shards: frozenset[int] = frozenset()
    fault: str = ""
    """Why no shard can be here; empty where nothing is wrong."""


def expand(path: Path) -> Path:
    """The path as it is on this machine: with its environment's variables and its user's home.

    Raises StartupError where a variable is not set here.

    >>> expand(Path("/data/$NO_SUCH_VARIABLE"))
    Traceback (most recent call last):
    profile_service.errors.StartupError: --data-dir /data/$NO_SUCH_VARIABLE: a variable in it is not set on this node
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise StartupError(f"--data-dir {path}: a variable in it is not set on this node")
    return Path(expanded).absolute()


def survey(settings: Settings, manifest: Manifest, address: str) -> Survey:
    """Looks at this node, and makes its data directory where there is none.

    Args:
        settings: with the data directory as it was given.
        manifest: of the service.
        address: of this node.
    """
    assert settings.storage.data_dir is not None, "the launcher has chosen one"
    path = settings.storage.data_dir
    try:
        path = expand(path)
        return _look(replace(settings, host=address), manifest, path)
    except (StartupError, DataLoss) as error:
        return Survey("", path, fault=error.message)
    except OSError as error:
        return Survey("", path, fault=f"{path} cannot be used: {error.strerror}")


def make_shard_directory(data_dir: Path, shard_id: int) -> None:
    """Returns when it is durable. Raises OSError."""
    fs = RealFileSystem()
    path = shard_directory(data_dir, shard_id)
    if path.name not in fs.names(data_dir):
        fs.make_directory(path)
        fs.sync_directory(data_dir)


def remove_shard_directory(data_dir: Path, shard_id: int) -> None:
    """Removes what a shard has stored that is no more. Its number is never given again."""
    shutil.rmtree(shard_directory(data_dir, shard_id), ignore_errors=True)


def prepare_head(settings: Settings, shards: int, store: str) -> tuple[Manifest, str | None]:
    """Makes the directory of the coordinator, on the node where that will be, or opens the one that is there.

    Args:
        settings: with the data directory as it was given.
        shards: how many a new one has.
        store: where profiles are to be, as it is shown.

    Returns:
        What it was made with, and the schema that it was last served with.

    Raises:
        StartupError: it cannot be used, or its profiles are elsewhere; says why. That it is in use or damaged is said
            so, too.
    """
    assert settings.storage.data_dir is not None, "the launcher has chosen one"
    path = expand(settings.storage.data_dir)
    fs = RealFileSystem()
    try:
        new = Manifest.new(settings.fixed.partition_bits, shards)
        fs.make_directory(path)
        _check_store(fs, path, store)
        directory = DataDirectory.open(fs, path, new, spread=True)
    except (DataLoss, LockHeld) as error:
        # As one that travels from process to process.
        raise StartupError(error.message) from None
    except OSError as error:
        raise StartupError(f"{path} on the head node cannot be used: {error}") from None
    before = directory.schema_text()
    directory.release()
    return directory.manifest, before


def _check_store(fs: FileSystem, path: Path, store: str) -> None:
    """A service that was told once where its profiles are shall not start empty because it is not told again. Raises
    StartupError."""
    document = Document(fs, path / STORE, "remove it, and give --store as before")
    known = document.read()
    if known is not None and known["store"] != store:
        raise StartupError(
            f"the profiles of the service in {path} are in {known['store']}: give that with --store; if they are "
            f"elsewhere by now, remove {path / STORE} on the head node"
        )
    if known is None and store != LOCAL:
        if MANIFEST in fs.names(path):
            raise StartupError(
                f"{path} on the head node is of a service whose profiles are in its data directories: give another one "
                "with --data-dir"
            )
        document.write({"store": store})


def _look(settings: Settings, manifest: Manifest, path: Path) -> Survey:
    fs = RealFileSystem()
    fs.make_directory(path)
    document = Document(fs, path / NODE, "put back the one of a backup, it changes only with the ports")
    names = fs.names(path)
    known = document.read()
    if known is None and MANIFEST not in names and any(_shard_id(name) is not None for name in names):
        raise StartupError(f"{path} holds shards and does not say of which service: it has no {NODE}")
    if known is not None and known["service"] != manifest.id:
        raise StartupError(f"{path} holds data of another service; give another directory with --data-dir")
    found = known or {"name": uuid.uuid4().hex, "service": manifest.id, "grpc_port": 0, "http_port": 0}
    # A port that was chosen stays: the frontend is found where it was.
    wanted = {"grpc_port": settings.grpc_port, "http_port": settings.http_port}
    held = {name: port or found[name] or _free_port(settings, name) for name, port in wanted.items()}
    if known is None or any(found[name] != port for name, port in held.items()):
        found |= held
        document.write(found)
    shards = frozenset(shard_id for shard_id in map(_shard_id, names) if shard_id is not None)
    return Survey(found["name"], path, found["grpc_port"], found["http_port"], shards)


def _free_port(settings: Settings, name: str) -> int:
    with bind(settings, 0, f"--{name.replace('_', '-')}") as taken:
        port: int = taken.getsockname()[1]
    return port


def _shard_id(name: str) -> int | None:
    number = name.removeprefix(SHARD_PREFIX)
    return int(number) if name.startswith(SHARD_PREFIX) and number.isdigit() else None
