"""A small service in this process: keeps events in memory, and breaks as a test tells it to."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from userprofile.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

PATIENCE_S = 30.0
"""How long the fake waits for a test before it takes the test for broken."""


class FakeService(
    event_service_pb2_grpc.EventServiceServicer,
    profile_service_pb2_grpc.ProfileServiceServicer,
    admin_service_pb2_grpc.AdminServiceServicer,
):
    """Counts events by user; a batch counts once by (producer, sequence). It refuses events of the type "bad"."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.applied: dict[str, int] = {}
        self.sizes: list[int] = []
        self.received = 0
        """Batches that have come in, whether looked at or not."""
        self.hellos = 0
        self.break_streams_after: Iterator[int] = iter(())
        """For each stream to come: after how many batches it breaks, the last of them applied but not acknowledged."""
        self.lag: Iterator[int] = iter(())
        """For each stream to come: by how much its first answer is behind the truth."""
        self.break_on: dict[str, grpc.StatusCode] = {}
        """Event type -> the status with which a batch that holds one ends its stream, unapplied."""
        self.stream_failures: list[status_pb2.Status] = []
        """What the next streams end with when a batch has come, unapplied."""
        self.refuse_stream: grpc.StatusCode | None = None
        self.may_answer = threading.Event()
        """Cleared, acknowledgements and GetPopulation wait for it."""
        self.may_answer.set()
        self.failures: list[status_pb2.Status] = []
        """What the next unary calls answer with."""
        self.failures_after: list[status_pb2.Status] = []
        """What the next batches answer with after they were counted."""
        self.topology = admin_service_pb2.GetTopologyResponse(epoch=3)
        """What GetTopology answers."""
        self.request_ids: set[str] = set()
        self.calls = 0
        self._changed = threading.Condition()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that batches bring about."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S)

    def StreamEvents(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        producer = next(request_iterator).producer_id
        self.hellos += 1
        if self.refuse_stream is not None:
            context.abort(self.refuse_stream, "refused by the test")
        held = self.applied.get(producer, 0)
        yield event_service_pb2.StreamEventsResponse(sequence=max(0, held - next(self.lag, 0)))
        left = next(self.break_streams_after, None)
        # Read ahead, as a service does: what is on its way shows in `received` while acknowledgements are held back.
        incoming: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, args=(request_iterator, incoming), daemon=True).start()
        for request in iter(incoming.get, None):
            for type_, code in self.break_on.items():
                if any(event.type == type_ for event in request.events):
                    context.abort(code, f"broken by an event of type {type_}")
            if self.stream_failures:
                context.abort_with_status(rpc_status.to_status(self.stream_failures.pop(0)))
            self._apply(producer, request, context)
            if left is not None and (left := left - 1) <= 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            assert self.may_answer.wait(PATIENCE_S)
            answer = event_service_pb2.StreamEventsResponse(sequence=request.sequence)
            for index, event in enumerate(request.events):
                if event.type == "bad":
                    answer.rejected.add(sequence=request.sequence, index=index, field="type", reason="not declared")
            yield answer

    def _read(self, requests: Iterator[Any], incoming: queue.Queue[Any]) -> None:
        try:
            for request in requests:
                with self._changed:
                    self.received += 1
                    self._changed.notify_all()
                incoming.put(request)
        except grpc.RpcError:
            # The stream is gone: so is the one who reads the queue, or it will find the end.
            pass
        incoming.put(None)

    def _apply(self, producer: str, request: Any, context: Any) -> None:
        held = self.applied.get(producer, 0)
        if request.sequence > held + 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"sequence {request.sequence} leaves a gap after {held}")
        if request.sequence == held + 1:
            with self._changed:
                self.applied[producer] = request.sequence
                self.sizes.append(len(request.events))
                self.counts.update(event.user_id for event in request.events if event.type != "bad")
                self._changed.notify_all()

    def _maybe_fail(self, context: Any) -> None:
        self.calls += 1
        if self.failures:
            context.abort_with_status(rpc_status.to_status(self.failures.pop(0)))

    def IngestEvents(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._maybe_fail(context)
        answer = event_service_pb2.IngestEventsResponse()
        with self._changed:
            is_new = not request.request_id or request.request_id not in self.request_ids
            self.request_ids.add(request.request_id)
            for index, event in enumerate(request.events):
                if event.type == "bad":
                    answer.rejected.add(index=index, field="type", reason="not declared")
                else:
                    self.counts[event.user_id] += is_new
                    answer.accepted_count += 1
            self._changed.notify_all()
        self.may_answer.wait(PATIENCE_S)
        if self.failures_after:
            context.abort_with_status(rpc_status.to_status(self.failures_after.pop(0)))
        return answer

    def CreateSnapshot(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._maybe_fail(context)
        return admin_service_pb2.CreateSnapshotResponse()

    def GetProfile(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._maybe_fail(context)
        if request.user_id not in self.counts:
            context.abort(grpc.StatusCode.NOT_FOUND, f"user {request.user_id!r} was never seen")
        return profile_pb2.Profile(user_id=request.user_id, event_count=self.counts[request.user_id])

    def BatchGetProfiles(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._maybe_fail(context)
        answer = profile_service_pb2.BatchGetProfilesResponse()
        for user_id in request.user_ids:
            if user_id in self.counts:
                answer.profiles.add(user_id=user_id, event_count=self.counts[user_id])
            else:
                answer.missing_user_ids.append(user_id)
        return answer

    def GetPopulation(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.may_answer.wait(PATIENCE_S)
        return profile_pb2.Profile(event_count=sum(self.counts.values()))

    def WatchProfile(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        if request.user_id == "unserved":
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "WatchProfile is not served")
        for count in itertools.count(1):
            yield profile_pb2.Profile(user_id=request.user_id, event_count=count)

    def GetSchema(self, request: Any, context: Any) -> Any:  # noqa: N802
        return admin_service_pb2.GetSchemaResponse()

    def GetTopology(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self.topology

    def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        return admin_service_pb2.GetStatusResponse(state="serving")


def failure(
    code: int, message: str, *, retry_after_ms: int = 0, field: str = "", reason: str = ""
) -> status_pb2.Status:
    """A status with details."""
    status = status_pb2.Status(code=code, message=message)
    if retry_after_ms:
        delay = duration_pb2.Duration(nanos=retry_after_ms * 1_000_000)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="profile-service"))
    return status


UNAVAILABLE = failure(code_pb2.UNAVAILABLE, "the owner moves", retry_after_ms=5)
CANCELLED = failure(code_pb2.CANCELLED, "the server stops")
STORAGE_FULL = failure(code_pb2.RESOURCE_EXHAUSTED, "the disk is full", retry_after_ms=50, reason="STORAGE_FULL")
FULL = failure(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", retry_after_ms=40, reason="QUEUE_FULL")


class Serving:
    """A fake on a port of its own, free if none is given; it can be stopped and started again at the same place."""

    def __init__(self, fake: FakeService, port: int = 0) -> None:
        self._fake = fake
        self._port = port
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        """Where it is."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Begins to serve."""
        self._server = server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
        event_service_pb2_grpc.add_EventServiceServicer_to_server(self._fake, server)
        profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(self._fake, server)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(self._fake, server)
        self._port = server.add_insecure_port(self.address)
        server.start()

    def stop(self, grace_s: float | None = None) -> None:
        """Ends every call, at once or after a time in which connections are asked to go (GOAWAY); what was applied
        stays."""
        if self._server is not None:
            self._server.stop(grace_s).wait()
            self._server = None

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._fake.may_answer.set()
        self.stop()


@contextmanager
def serving(fake: FakeService, port: int = 0) -> Iterator[str]:
    """Serves the fake, on a free port if none is given, and yields its address."""
    with Serving(fake, port) as served:
        yield served.address
