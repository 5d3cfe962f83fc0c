"""A small service in this process: keeps events in memory, and breaks as a test tells it to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from userprofile.v1 import (
    event_service_pb2,
    event_service_pb2_grpc,
    profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
)


class FakeService(event_service_pb2_grpc.EventServiceServicer, profile_service_pb2_grpc.ProfileServiceServicer):
    """Counts events by user; a batch counts once by (producer, sequence)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.applied: dict[str, int] = {}
        self.sizes: list[int] = []
        self.hellos = 0
        self.break_streams_after: Iterator[int] = iter(())
        """For each stream to come: after how many batches it breaks, the last of them applied but not acknowledged."""
        self.refuse_stream: grpc.StatusCode | None = None
        self.hold: Any = None
        """An event that acknowledgements wait for."""
        self.failures: list[status_pb2.Status] = []
        """What the next unary calls answer with."""
        self.calls = 0

    def StreamEvents(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        producer = next(request_iterator).producer_id
        self.hellos += 1
        if self.refuse_stream is not None:
            context.abort(self.refuse_stream, "sequence: must rise by one")
        yield event_service_pb2.StreamEventsResponse(sequence=self.applied.get(producer, 0))
        left = next(self.break_streams_after, None)
        for request in request_iterator:
            if request.sequence == self.applied.get(producer, 0) + 1:
                self.applied[producer] = request.sequence
                self.sizes.append(len(request.events))
                self.counts.update(event.user_id for event in request.events if event.type != "bad")
            elif request.sequence > self.applied.get(producer, 0):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"sequence {request.sequence} leaves a gap")
            if left is not None:
                left -= 1
                if left <= 0:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            if self.hold is not None:
                self.hold.wait(10)
            answer = event_service_pb2.StreamEventsResponse(sequence=request.sequence)
            for index, event in enumerate(request.events):
                if event.type == "bad":
                    answer.rejected.add(sequence=request.sequence, index=index, field="type", reason="not declared")
            yield answer

    def _maybe_fail(self, context: Any) -> None:
        self.calls += 1
        if self.failures:
            context.abort_with_status(rpc_status.to_status(self.failures.pop(0)))

    def IngestEvents(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._maybe_fail(context)
        answer = event_service_pb2.IngestEventsResponse()
        for index, event in enumerate(request.events):
            if event.type == "bad":
                answer.rejected.add(index=index, field="type", reason="not declared")
            else:
                self.counts[event.user_id] += 1
                answer.accepted_count += 1
        return answer

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

    def WatchProfile(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for count in itertools.count(1):
            yield profile_pb2.Profile(user_id=request.user_id, event_count=count)


def failure(code: int, message: str, *, retry_after_ms: int = 0, field: str = "") -> status_pb2.Status:
    """A status with details."""
    status = status_pb2.Status(code=code, message=message)
    if retry_after_ms:
        delay = duration_pb2.Duration(nanos=retry_after_ms * 1_000_000)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


UNAVAILABLE = failure(code_pb2.UNAVAILABLE, "the owner moves", retry_after_ms=5)


@contextmanager
def serving(fake: FakeService) -> Iterator[str]:
    """Serves the fake on a free port and yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    event_service_pb2_grpc.add_EventServiceServicer_to_server(fake, server)
    profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
