"""Reads of profiles at a rate that nothing slows down."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks import echo
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import profile_service_pb2

GET = "/userprofile.v1.ProfileService/GetProfile"
_TIMEOUT_S = 60.0


async def read_steadily(
    address: str, users: int, requests_per_second: float, seconds: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reads the profiles of users drawn from all; one that waits holds up none that is due after it.

    Returns when each was due (`time.monotonic`) and how long after that it was answered, in seconds.
    """
    rng = np.random.default_rng(seed)
    due: NDArray[np.float64] = np.arange(int(requests_per_second * seconds)) / requests_per_second
    answered: NDArray[np.float64] = np.full(len(due), np.nan)
    async with grpc.aio.insecure_channel(address, options=echo.OPTIONS) as channel:
        await channel.channel_ready()
        get: Any = channel.unary_unary(GET)

        async def read(number: int, user: int) -> None:
            request = profile_service_pb2.GetProfileRequest(user_id=shopper_id(user)).SerializeToString()
            await get(request, timeout=_TIMEOUT_S)
            answered[number] = time.monotonic()

        due += time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number, user in enumerate(rng.integers(0, users, len(due)).tolist()):
                delay = float(due[number]) - time.monotonic()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(read(number, user))
    return due, answered - due
