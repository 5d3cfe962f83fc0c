"""A shop's file through `ingest` into `serve --schema retail`: every profile equals what the file says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e import serving
from tests.e2e.calls import GrpcCaller, delimited
from tests.e2e.serving import ServeProcess
from tests.e2e.shop_events import ShopFile, write_shop_events
from tests.e2e.stores import STORES, stored_in

# It starts a service of its own, which on a fresh machine compiles its kernels first.
pytestmark = pytest.mark.timeout(400)

VERIFY = Path(__file__).parents[2] / "scripts" / "verify_profiles.py"
ROWS = 6_000
USERS = 150


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, seed: int) -> ShopFile:
    return write_shop_events(tmp_path_factory.mktemp("shop") / "events.parquet", seed, ROWS, USERS)


@pytest.fixture(scope="module", params=STORES)
def retail(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with (
        stored_in(request.param, tmp_path_factory.mktemp("retail")) as where,
        ServeProcess("--schema", "retail", *where) as process,
    ):
        yield process


def verify(retail: ServeProcess, *files: Path) -> subprocess.CompletedProcess[str]:
    named = [argument for file in files for argument in ("--file", str(file))]
    verified = serving.run_python(str(VERIFY), "--schema", "retail", *named, "--address", retail.grpc_address)
    sys.stdout.write(verified.stdout + verified.stderr)
    return verified


def ingest(retail: ServeProcess, file: Path) -> dict[str, Any]:
    done = serving.run("ingest", str(file), "--address", retail.grpc_address, "--json")
    assert done.returncode == 0, done.stderr
    tally: dict[str, Any] = json.loads(done.stdout)
    return tally


def refused_by_field(tally: dict[str, Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for reason in tally["reasons"]:
        counts[reason["field"]] += reason["count"]
    return counts


def test_every_profile_equals_what_the_files_say(
    retail: ServeProcess, shop: ShopFile, tmp_path: Path, seed: int
) -> None:
    tally = ingest(retail, shop.path)
    assert (tally["accepted"], tally["rejected"]) == (shop.valid, ROWS - shop.valid)
    assert refused_by_field(tally) == shop.refused
    verified = verify(retail, shop.path)
    assert verified.returncode == 0
    assert f"{shop.valid:,} valid of {ROWS:,} rows" in verified.stdout
    assert f"users compared   {len(shop.users):,}" in verified.stdout

    # The same file again counts nothing twice.
    again = ingest(retail, shop.path)
    assert again["accepted"] + again["skipped"] + again["rejected"] >= shop.valid
    assert verify(retail, shop.path).returncode == 0

    # A second file goes on top.
    more = write_shop_events(tmp_path / "more.parquet", seed + 1, ROWS // 4, USERS + 20)
    assert ingest(retail, more.path)["accepted"] == more.valid
    assert verify(retail, shop.path, more.path).returncode == 0

    # The check is awake: it sees one event that no file holds, and a file that lacks some rows.
    shorter = tmp_path / "shorter.parquet"
    pq.write_table(pq.read_table(shop.path).slice(0, ROWS - 20), shorter)
    assert verify(retail, shorter, more.path).returncode == 1
    someone = min(shop.users)
    with GrpcCaller(retail.grpc_address) as rpc:
        rpc.ingest(delimited(1, delimited(1, someone.encode()) + delimited(2, b"view")))
    verified = verify(retail, shop.path, more.path)
    assert verified.returncode == 1
    assert f"user {someone}: event_count" in verified.stdout
