"""Clients that others wrote, each a producer and a reader: buf curl, grpcurl, curl, and @grpc/grpc-js under Node.js."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from tests.e2e.calls import new_user
from tests.e2e.serving import ServeProcess
from userprofile.v1.event_service_pb2 import IngestEventsResponse
from userprofile.v1.profile_pb2 import Profile

ROOT = Path(__file__).parents[2]
NODE_CLIENT = Path(__file__).parent / "node"
INSTALL_NODE = "install Node.js 16 or newer with npm (Debian, Ubuntu: apt-get install nodejs npm)"
TIMEOUT_S = 60.0

HALF_LIFE_S = 30 * 86_400
AGE_S = 3_600.0
SHOPPING = [
    # type, weight, attributes
    ("view", 1.0, {"color": "red", "price": 12_900.0, "item_id": "car-1", "make": "audi"}),
    ("contact", 8.0, {"color": "red", "price": 15_500.0, "item_id": "car-2", "make": "audi"}),
    ("favorite", 4.0, {"color": "blue", "price": 9_900.0, "item_id": "car-3", "make": "skoda", "query": "blue skoda"}),
]
"""What each client's user does, all at one moment."""


class Shopper:
    """A user of one client, who did all of `SHOPPING` an hour ago."""

    def __init__(self, client: str) -> None:
        self.user_id = new_user(client)
        self.seconds = int(time.time() - AGE_S)

    def events(self) -> list[dict[str, Any]]:
        """The events in proto3's JSON."""
        when = datetime.fromtimestamp(self.seconds, UTC).isoformat().replace("+00:00", "Z")
        return [
            {"userId": self.user_id, "type": kind, "time": when, "attributes": attributes}
            for kind, _, attributes in SHOPPING
        ]

    def check(self, profile: dict[str, Any], times: int = 1) -> None:
        """Compares the numbers of a profile, as proto3's JSON or grpc-js has it, with those of events sent `times`."""
        decay = times * 2 ** -((time.time() - self.seconds) / HALF_LIFE_S)
        features = profile["features"]
        assert profile["userId"] == self.user_id
        assert int(profile["eventCount"]) == times * len(SHOPPING)

        color = features["color"]["categorical"]
        by_value = {entry["value"]: entry for entry in color["values"]}
        assert color["weight"] == near(13 * decay)
        assert color["confidence"] == near(13 * decay / (13 * decay + 5))
        assert by_value["red"]["weight"] == near(9 * decay)
        assert by_value["blue"]["weight"] == near(4 * decay)
        assert by_value["green"]["weight"] == 0
        assert color["values"][0]["value"] == "red"
        assert sum(entry["likelihood"] for entry in color["values"]) == near(1)

        price = features["price"]["distribution"]
        mean = (1 * 12_900 + 8 * 15_500 + 4 * 9_900) / 13
        variance = (1 * (12_900 - mean) ** 2 + 8 * (15_500 - mean) ** 2 + 4 * (9_900 - mean) ** 2) / 13
        assert price["weight"] == near(13 * decay)
        assert (price["min"], price["max"]) == (9_900, 15_500)
        assert price["mean"] == near(mean)
        assert price["stddev"] == near(variance**0.5)
        assert sum(price["histogram"]["weights"]) == near(13 * decay)
        assert [quantile["probability"] for quantile in price["quantiles"]] == [0.05, 0.25, 0.5, 0.75, 0.95]

        make = features["make"]["topK"]
        assert [entry["value"] for entry in make["entries"]] == ["audi", "skoda"]
        assert make["entries"][0]["weight"] == near(9 * decay)
        assert make["entries"][0]["share"] == near(9 / 13)
        assert features["contacts"]["counter"]["value"] == times
        assert int(features["views_24h"]["windowCount"]["value"]) == times
        assert features["last_search"]["latest"]["value"] == "blue skoda"
        assert [e["value"] for e in features["recent_items"]["recent"]["entries"]] == ["car-3", "car-2", "car-1"]
        assert features["distinct_items"]["distinct"]["estimate"] == pytest.approx(3, abs=0.1)


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)


def tool(name: str) -> str:
    """A tool of the environment that the tests run in, or else of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.fail(
            f"{name} is needed: `make setup` brings buf and grpcurl; curl is the system's (apt-get install curl)"
        )
    return found


def output_of(*arguments: str, stdin: str = "", directory: Path = ROOT) -> str:
    done = subprocess.run(
        arguments, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=directory
    )
    assert done.returncode == 0, f"{arguments[0]} ended with {done.returncode}:\n{done.stderr}{done.stdout}"
    return done.stdout


def test_buf_curl_by_reflection(service: ServeProcess, tmp_path: Path) -> None:
    buf, shopper = tool("buf"), Shopper("buf")

    def call(method: str, message: dict[str, Any]) -> dict[str, Any]:
        url = f"http://{service.grpc_address}/userprofile.v1.{method}"
        # Away from the project, buf has the service's reflection alone to go by.
        flags = ("--http2-prior-knowledge", "--protocol", "grpc", "--emit-defaults", "-d", json.dumps(message), url)
        answer: dict[str, Any] = json.loads(output_of(buf, "curl", *flags, directory=tmp_path))
        return answer

    ingested = call("EventService/IngestEvents", {"events": shopper.events()})
    assert ingested == {"acceptedCount": len(SHOPPING), "rejected": []}
    shopper.check(call("ProfileService/GetProfile", {"userId": shopper.user_id}))


def test_grpcurl_by_reflection(service: ServeProcess, tmp_path: Path) -> None:
    grpcurl, shopper = tool("grpcurl"), Shopper("grpcurl")

    def call(*arguments: str, **message: Any) -> str:
        data = ("-emit-defaults", "-d", json.dumps(message)) if message else ()
        return output_of(grpcurl, "-plaintext", *data, service.grpc_address, *arguments, directory=tmp_path)

    listed = call("list").split()
    assert {"userprofile.v1.EventService", "userprofile.v1.ProfileService", "grpc.health.v1.Health"} <= set(listed)
    health = json.loads(call("grpc.health.v1.Health/Check", service="userprofile.v1.EventService"))
    assert health["status"] == "SERVING"
    # It prints fields by their names in the .proto files, which is as good JSON for a message as the other spelling.
    ingested = call("userprofile.v1.EventService/IngestEvents", events=shopper.events())
    assert json_format.Parse(ingested, IngestEventsResponse()) == IngestEventsResponse(accepted_count=len(SHOPPING))
    profile = json_format.Parse(call("userprofile.v1.ProfileService/GetProfile", userId=shopper.user_id), Profile())
    shopper.check(json_format.MessageToDict(profile, always_print_fields_with_no_presence=True))


def test_curl_over_rest(service: ServeProcess) -> None:
    curl, shopper = tool("curl"), Shopper("curl")
    # As people type it: curl calls the body a form then.
    json_body = ("-d", json.dumps({"events": shopper.events()}))
    base = f"http://{service.http_address}/v1"
    ingested = json.loads(output_of(curl, "-sS", "--fail-with-body", *json_body, f"{base}/events:ingest"))
    assert ingested == {"acceptedCount": len(SHOPPING), "rejected": []}
    url = f"{base}/profiles/{shopper.user_id}"
    shopper.check(json.loads(output_of(curl, "-sS", "--fail-with-body", url)))
    some = json.loads(output_of(curl, "-sS", "--fail-with-body", f"{url}?features=color&features=price"))
    assert sorted(some["features"]) == ["color", "price"]


@pytest.fixture(scope="session")
def node() -> str:
    """Node.js, with the client's packages installed as its lock file says."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.fail(f"node and npm are needed to test a client in another language: {INSTALL_NODE}")
    if not (NODE_CLIENT / "node_modules" / ".package-lock.json").exists():
        flags = ("--ignore-scripts", "--no-audit", "--no-fund")
        done = subprocess.run([npm, "ci", *flags], cwd=NODE_CLIENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"npm ci failed in {NODE_CLIENT}:\n{done.stderr}"
    return found


def test_grpc_js_from_the_proto_files(service: ServeProcess, node: str) -> None:
    ingester, producer = Shopper("node"), Shopper("node-stream")
    task = {
        "address": service.grpc_address,
        "includes": [str(ROOT / "protos"), str(ROOT / "third_party" / "googleapis")],
        "ingest": [as_js(event, ingester.seconds) for event in ingester.events()],
        "producer_id": new_user("node-producer"),
        # The second batch says the same again, under a number of its own.
        "batches": [[as_js(event, producer.seconds) for event in producer.events()]] * 2,
        "read": [ingester.user_id, producer.user_id],
    }
    answer = json.loads(output_of(node, "client.js", stdin=json.dumps(task), directory=NODE_CLIENT))
    assert answer["ingested"] == {"acceptedCount": len(SHOPPING), "rejected": []}
    assert answer["held"] == 0
    assert [ack["rejected"] for ack in answer["acks"]] == [[]] * len(answer["acks"])
    sequences = [ack["sequence"] for ack in answer["acks"]]
    assert sequences == sorted(sequences)
    assert sequences[-1] == 2
    by_ingest, by_stream = answer["profiles"]
    ingester.check(by_ingest)
    producer.check(by_stream, times=2)


def as_js(event: dict[str, Any], seconds: int) -> dict[str, Any]:
    """An event as proto-loader wants it: without the JSON forms of Timestamp and Struct."""
    fields = {
        name: {"stringValue": value} if isinstance(value, str) else {"numberValue": value}
        for name, value in event["attributes"].items()
    }
    return {**event, "time": {"seconds": seconds}, "attributes": {"fields": fields}}
