"""The bare servers that others are measured beside answer alike, however they serve."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from benchmarks import echo, producing
from benchmarks.load import Load
from benchmarks.processes import Child
from benchmarks.reading import Question, as_fast_as_answered, over_grpc


@pytest.mark.parametrize("flags", [(), ("--loop", "asyncio"), ("--threads", "4")], ids=" ".join)
def test_each_way_of_serving_answers_calls_and_streams(flags: tuple[str, ...]) -> None:
    child = Child([sys.executable, str(Path(echo.__file__)), *flags])
    try:
        question = Question(child.address, echo.unary_request(500, 20))

        async def ask() -> int:
            async with over_grpc(echo.UNARY, [question]) as one:
                return (await as_fast_as_answered(one, 8, 0.1))[0]

        assert asyncio.run(ask()) > 0
        load = Load("", [b"message"] * 20, 20, 1)
        assert asyncio.run(producing.send(child.address, echo.METHOD, load, 2, 4)) > 0
        child.stop()
    finally:
        child.kill()
