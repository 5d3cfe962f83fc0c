"""Questions on their way to one owner; many callers' questions travel in one message. A lost stream loses its
questions: the callers ask again, for reading changes nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from profile_service.cluster.owner_stream import Connect, OwnerStream
from profile_service.errors import InvalidArgument, NotMine, ResourceExhausted, Unavailable
from profile_service.rpc.frames import Message
from userprofile.internal.v1 import shard_pb2

METHOD = "Read"
USERS_PER_MESSAGE = 256
"""Questions are put together up to this many users."""

GATHERED_USERS = 32
"""A question about more users than these is worth a message of its own, and does not wait for the answer to another.
The others gather while a message of theirs is on its way: the more are asked, the more travel together."""

MOST_WAITING = 10_000
"""Questions that may wait for one shard."""

RETRY_S = 0.1

Status = shard_pb2.ReadResponse.Status


@dataclass(eq=False)
class _Question:
    query: shard_pb2.ReadRequest.Query
    users: int
    answer: asyncio.Future[list[bytes]]


class ReadStream(OwnerStream):
    """The questions of one owner and the stream that carries them.

    Args:
        epoch: gives the epoch of the current topology.
    """

    def __init__(
        self,
        shard_id: int,
        connect: Connect,
        lost: Callable[[], Awaitable[bool]],
        epoch: Callable[[], int],
    ) -> None:
        super().__init__(shard_id, METHOD, connect, lost)
        self._epoch = epoch
        self._queue: deque[_Question] = deque()
        self._sent: dict[int, list[_Question]] = {}
        self._gathered_id = 0
        """Of the message of gathered questions that is on its way; 0 for none."""
        self._last_request_id = 0

    async def ask(self, user_ids: Sequence[str], features: Sequence[str], *, population: bool = False) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen; one profile for the population.

        Raises:
            NotMine, Unavailable: ask again, by a fresh topology.
            InvalidArgument: the question has a fault.
            ResourceExhausted: too many questions wait for this shard.
        """
        if len(self._queue) >= MOST_WAITING:
            raise ResourceExhausted(f"{len(self._queue)} reads wait for shard {self._shard_id}", RETRY_S)
        query = shard_pb2.ReadRequest.Query(user_ids=user_ids, features=features, population=population)
        question = _Question(query, len(user_ids), asyncio.get_running_loop().create_future())
        self._queue.append(question)
        self._wake.set()
        return await question.answer

    def _next_message(self) -> list[Message] | None:
        questions: list[_Question] = []
        users = 0
        while self._queue:
            question = self._queue[0]
            if question.answer.done():
                self._queue.popleft()
                continue
            alone = question.users > GATHERED_USERS
            if questions and (alone or users + question.users > USERS_PER_MESSAGE):
                break
            if not alone and self._gathered_id:
                return None
            questions.append(self._queue.popleft())
            users += question.users
            if alone:
                break
        if not questions:
            return None
        self._last_request_id += 1
        self._sent[self._last_request_id] = questions
        if users <= GATHERED_USERS or len(questions) > 1:
            self._gathered_id = self._last_request_id
        request = shard_pb2.ReadRequest(
            request_id=self._last_request_id,
            epoch=self._epoch(),
            queries=[question.query for question in questions],
        )
        return [request.SerializeToString()]

    def _take_answer(self, message: Message) -> bool:
        read = False
        response = shard_pb2.ReadResponse.FromString(bytes(message))
        questions = self._sent.pop(response.request_id, [])
        if response.request_id == self._gathered_id:
            self._gathered_id = 0
            self._wake.set()
        for question, answer in zip(questions, response.answers, strict=True):
            if question.answer.done():
                continue
            match answer.status:
                case Status.STATUS_READ:
                    read = True
                    question.answer.set_result(list(answer.profiles))
                case Status.STATUS_NOT_MINE:
                    question.answer.set_exception(NotMine(answer.message, response.epoch))
                case Status.STATUS_INVALID:
                    question.answer.set_exception(InvalidArgument("", answer.message))
                case _:
                    question.answer.set_exception(Unavailable(answer.message, RETRY_S))
        return read

    async def close(self) -> None:
        await super().close()
        self._fail(self._queue, "the stream was closed")
        self._queue.clear()

    def _settle(self, reason: str) -> None:
        for questions in self._sent.values():
            self._fail(questions, reason)
        self._sent.clear()
        self._gathered_id = 0
        if not self.connected:
            # The shard cannot be reached: those who wait shall hear of it now, and may find another owner.
            self._fail(self._queue, reason)
            self._queue.clear()

    def _fail(self, questions: Iterable[_Question], reason: str) -> None:
        for question in questions:
            if not question.answer.done():
                question.answer.set_exception(
                    Unavailable(f"shard {self._shard_id} cannot be reached ({reason})", RETRY_S)
                )
