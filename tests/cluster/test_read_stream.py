"""What goes into one message to an owner. The stream itself is in test_router.py."""

from __future__ import annotations

import asyncio

from profile_service.cluster.read_stream import GATHERED_USERS, USERS_PER_MESSAGE, ReadStream
from userprofile.internal.v1 import shard_pb2


async def nothing() -> None:
    pass


def not_opened(method: str) -> None:
    raise AssertionError("nothing is opened here")


def make_stream() -> ReadStream:
    return ReadStream(0, not_opened, nothing, lambda: 1)  # type: ignore[arg-type]


async def ask(stream: ReadStream, *users: str) -> asyncio.Task[list[bytes]]:
    """A question that waits."""
    task = asyncio.create_task(stream.ask(users, ()))
    await asyncio.sleep(0)
    return task


def sent(stream: ReadStream) -> shard_pb2.ReadRequest | None:
    message = stream._next_message()
    return None if message is None else shard_pb2.ReadRequest.FromString(b"".join(message))


def users_of(request: shard_pb2.ReadRequest | None) -> list[list[str]]:
    assert request is not None
    return [list(query.user_ids) for query in request.queries]


def answer(stream: ReadStream, request: shard_pb2.ReadRequest | None) -> None:
    assert request is not None
    response = shard_pb2.ReadResponse(request_id=request.request_id, epoch=1)
    for query in request.queries:
        profiles = [user.encode() for user in query.user_ids]
        response.answers.add(status=shard_pb2.ReadResponse.STATUS_READ, profiles=profiles)
    assert stream._take_answer(response.SerializeToString())


async def test_questions_gather_while_one_is_unanswered() -> None:
    stream = make_stream()
    first = await ask(stream, "a")
    request = sent(stream)
    assert users_of(request) == [["a"]]
    others = [await ask(stream, user) for user in "bcd"]
    assert sent(stream) is None
    answer(stream, request)
    assert await first == [b"a"]
    request = sent(stream)
    assert users_of(request) == [["b"], ["c"], ["d"]]
    answer(stream, request)
    assert [await other for other in others] == [[b"b"], [b"c"], [b"d"]]
    assert sent(stream) is None


async def test_a_large_question_goes_alone_and_waits_for_no_answer() -> None:
    stream = make_stream()
    many = [f"u{number}" for number in range(GATHERED_USERS + 1)]
    small = await ask(stream, "a")
    first = sent(stream)
    large, behind = await ask(stream, *many), await ask(stream, "b")
    second = sent(stream)
    assert users_of(second) == [many]
    assert sent(stream) is None
    answer(stream, second)
    assert await large == [user.encode() for user in many]
    assert sent(stream) is None, "the first is not answered yet"
    answer(stream, first)
    last = sent(stream)
    assert users_of(last) == [["b"]]
    answer(stream, last)
    assert (await small, await behind) == ([b"a"], [b"b"])


async def test_a_message_holds_so_many_users_and_none_that_nobody_waits_for() -> None:
    stream = make_stream()
    runs = [[f"{run}-{number}" for number in range(GATHERED_USERS)] for run in range(12)]
    tasks = [await ask(stream, *run) for run in runs]
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    found: list[list[str]] = []
    while (request := sent(stream)) is not None:
        assert sum(map(len, users_of(request))) <= USERS_PER_MESSAGE
        found += users_of(request)
        answer(stream, request)
    assert found == [run for run in runs if run is not runs[1]]
    for run, task in zip(runs, tasks, strict=True):
        if run is not runs[1]:
            assert await task == [user.encode() for user in run]


async def test_what_is_lost_with_a_call_keeps_nobody_waiting_behind_it() -> None:
    stream = make_stream()
    lost = await ask(stream, "a")
    assert sent(stream) is not None
    stream.connected = True
    stream._settle("cut")
    assert lost.done() or await asyncio.wait([lost])
    assert lost.exception() is not None
    behind = await ask(stream, "b")
    assert users_of(sent(stream)) == [["b"]]
    behind.cancel()
