"""The command line without a service: help, the schema's check, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from profile_service.config import Capacity, Limits, Storage
from tests.e2e.serving import run

COMMANDS = (
    ["serve"],
    ["demo"],
    ["ingest"],
    ["get"],
    ["status"],
    ["snapshot"],
    ["inspect"],
    ["migrate"],
    ["schema", "check"],
    ["bench", "ingest"],
    ["bench", "recovery"],
    ["bench", "snapshot"],
    ["bench", "startup"],
    ["bench", "stores"],
)
HEAVY = ("ray", "numba", "numpy", "pyarrow", "grpc", "pydantic", "google.protobuf")

FAULTY = """\
name: my shop!
events:
  view: {weight: -1}
  buy: {wieght: 2}
half_life: soon
ttl: 180d
features:
  color: {kind: categorical, attribute: color, values: []}
  make: {kind: top_k, attribute: make, k: 0}
  price: {kind: distribution, attribute: price, bins: {scale: log, min: 0, max: 10, count: 4}}
  size: {kind: histogram, attribute: size}
  seen: {kind: counter, events: [sees]}
  last: {kind: latest}
"""


def assert_fails(done: CompletedProcess[str], *parts: str) -> None:
    """The command says one clear line, with these parts, and no traceback."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0], errors[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_a_flag_is_explained(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert f"profile-service {' '.join(command)}" in done.stdout


def test_the_help_states_every_limit_and_lets_it_be_set() -> None:
    done = run("serve", "--help")
    for settings in (Limits(), Capacity(), Storage()):
        for field in dataclasses.fields(settings):
            name = "reset_feature" if field.name == "reset_features" else field.name
            assert f"--{name.replace('_', '-')}" in done.stdout
            if value := getattr(settings, field.name):
                assert str(value) in done.stdout


def test_every_fault_of_the_storage_flags_is_said_at_once() -> None:
    flags = [
        "--segment-bytes",
        "1000",
        "--snapshot-log-bytes",
        "7",
        "--snapshot-interval-s",
        "0",
        "--sync-interval-s",
        "-1",
    ]
    done = run("serve", *flags, "--reset-feature", "color", "--reset-feature", "color")
    assert_fails(done, *flags[::2], "--reset-feature", "color is given more than once")
    assert run("serve", "--sync", "sometimes").returncode == 2


def test_a_feature_to_reset_that_there_is_not_is_named() -> None:
    done = run("serve", "--reset-feature", "colour", "--grpc-port", "0", "--http-port", "0")
    assert done.returncode == 1
    assert "--reset-feature colour" in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys, profile_service.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["marketplace", "retail"])
def test_schema_check_prints_the_row_and_what_a_user_costs(name: str) -> None:
    shown = run("schema", "check", name)
    assert shown.returncode == 0
    facts = json.loads(run("schema", "check", name, "--json").stdout)
    assert facts["name"] == name
    for feature in facts["features"]:
        assert feature["name"] in shown.stdout
        if feature["kind"] == "distinct":
            assert 0 < feature["standardError"] < 0.2
            assert f"standard error {feature['standardError']:.1%}" in shown.stdout
    taken = sum(feature["rowBytes"] for feature in facts["features"])
    assert taken < facts["rowBytes"] < facts["bytesPerUser"]
    assert f"{facts['bytesPerUser']:,}" in shown.stdout


def test_schema_check_says_every_fault_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(FAULTY)
    done = run("schema", "check", str(path))
    assert_fails(done, "faulty.yaml", "faults")
    said = [line for line in done.stderr.splitlines() if line.startswith(f"{path}: line ")]
    assert len(said) >= 10, done.stderr
    lines = {int(line.split(": line ")[1].split(":")[0]) for line in said}
    assert lines == {1, 3, 4, 5, 8, 9, 10, 11, 12, 13}, lines


def test_schema_check_says_what_a_restart_does_to_stored_profiles(tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    head = "name: shop\nevents: {view: {weight: 1}}\nfeatures:\n  size: {kind: latest, attribute: size}\n"
    old.write_text(head + "  make: {kind: top_k, attribute: make, k: 3}\n  views: {kind: counter, half_life: 1d}\n")
    new.write_text(head + "  make: {kind: top_k, attribute: make, k: 5}\n  views: {kind: counter, half_life: 2d}\n")
    check = ("schema", "check", str(new), "--against", str(old))
    refused = run(*check)
    assert_fails(refused, "the stored profiles cannot follow", "half_life was 1d, is 2d", "--reset-feature views")
    for part in ("keeps", "converts", "k was 3, is 5", "refuses"):
        assert part in refused.stdout
    assert json.loads(run(*check, "--json").stdout)["changes"]["refused"] == {"views": "half_life was 1d, is 2d"}
    told = run(*check, "--reset-feature", "views", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["changes"] == {
        "kept": {"size": ""},
        "converted": {"make": "k was 3, is 5"},
        "added": [],
        "reset": {"views": "half_life was 1d, is 2d"},
        "dropped": [],
        "refused": {},
        "faults": [],
    }
    twice = run(*check, "--reset-feature", "view")
    assert_fails(twice, "2 faults")
    assert [line.split(": ")[0] for line in twice.stderr.splitlines()[:2]] == ["feature views", "--reset-feature view"]
    assert "did you mean views?" in twice.stderr
    assert_fails(run("schema", "check", str(new), "--reset-feature", "views"), "--against")


def test_serve_with_a_faulty_schema_says_the_same_faults(tmp_path: Path) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(FAULTY)
    served = run("serve", "--schema", str(path), "--grpc-port", "0", "--http-port", "0")
    checked = run("schema", "check", str(path))
    assert_fails(served, "faulty.yaml")
    assert served.stderr == checked.stderr


def test_a_missing_schema_file_is_named() -> None:
    assert_fails(run("schema", "check", "no/such.yaml"), "no/such.yaml", "marketplace")
    assert_fails(run("serve", "--schema", "no/such.yaml"), "no/such.yaml", "marketplace")


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_port_in_use_is_named(flag: str) -> None:
    other = "--http-port" if flag == "--grpc-port" else "--grpc-port"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_fails(run("serve", flag, port, other, "0"), port, flag)


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    directories = [file / "data"]
    if os.geteuid() != 0:  # nothing is closed to root
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        directories.append(closed)
    for directory in directories:
        done = run("serve", "--data-dir", str(directory), "--grpc-port", "0", "--http-port", "0")
        assert_fails(done, str(directory), "--data-dir")


@pytest.mark.parametrize("store", ["redis://", "mongodb://localhost"])
def test_a_store_that_is_not_served_is_refused(store: str) -> None:
    assert_fails(run("serve", "--store", store), store, "redis")


@pytest.mark.parametrize("sides", [("./a", "./b"), ("redis://a", "redis://b"), ("./a", "mongodb://b")])
def test_a_migration_that_cannot_be_is_refused(sides: tuple[str, str]) -> None:
    assert_fails(run("migrate", *sides), "redis://" if "://" in sides[1] else "directory")


def test_a_store_is_asked_for_no_number_of_shards(tmp_path: Path) -> None:
    assert_fails(run("migrate", str(tmp_path), "redis://localhost", "--shards", "3"), "--shards", "data directory")


@pytest.mark.parametrize(
    "command", [["get", "u1"], ["status"], ["snapshot"], ["ingest", __file__, "--format", "csv"]], ids=lambda c: c[0]
)
def test_a_service_that_is_not_there_is_said_at_once(command: list[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        done = run(*command, "--address", address)
    assert_fails(done, address, "profile-service serve", "--address")


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["serve", "--shards", "0"],
        ["nonsense"],
        ["ingest", "x.csv", "--attribute", "price"],
        ["status", "--nope"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_flag_may_come_from_the_environment() -> None:
    def run_with(*arguments: str, **environment: str) -> CompletedProcess[str]:
        command = [sys.executable, "-m", "profile_service", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})

    assert_fails(run_with("serve", PROFILE_SERVICE_STORE="redis://elsewhere"), "redis://elsewhere")
    assert_fails(run_with("get", "u1", PROFILE_SERVICE_ADDRESS="127.0.0.1:1"), "127.0.0.1:1")


def test_an_interrupt_while_the_command_line_is_loaded_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
