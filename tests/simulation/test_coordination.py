"""A coordinator and its shards, whatever gets lost, late, stopped, killed, replaced or burnt: one process at a time
acknowledges for a partition, and what was acknowledged is counted once, wherever its partition is by then.

pytest tests/simulation/test_coordination.py                                    some runs, other ones each time
pytest tests/simulation/test_coordination.py --runs 5000 [--first-seed N]       so many, over all processors
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from unittest import mock

import pytest

from profile_service.cluster.mover import Mover
from profile_service.cluster.replicas import Replicas
from profile_service.shard.dedupe import ProducerSequences
from profile_service.shard.lease import Lease
from profile_service.shard.moves import Moves
from profile_service.shard.replication import _Replication
from profile_service.shard.reports import IN_SYNC
from profile_service.shard.transfer import Departure, Transfer
from tests.simulation.campaign import explain, run_many, run_some
from tests.simulation.coordination import run

RUNS = 20
SHOWN = 2

MOST_RUNS = 150
"""A bug that so many runs do not find is one that the simulation does not find."""

RARE_RUNS = 1_000
"""For one that shows in one run of a hundred: only where an owner is lost just after it has restarted."""

REACHED = (
    "batches of several owners",
    "batches sent again",
    "changes done",
    "coordinators killed",
    "memory failed",
    "messages late",
    "messages lost",
    "owners burnt",
    "owners released",
    "owners replaced by their standbys",
    "reads",
    "recoveries",
    "shards added",
    "shards killed twice",
    "shards retired",
    "shards replaced",
    "shards stopped",
    "shards: crash",
    "shards: kill",
    "snapshots",
    "standbys promoted",
)


@pytest.mark.timeout(4 * 3600)
def test_one_owner_at_a_time_acknowledges_and_nothing_is_lost_or_counted_twice(
    request: pytest.FixtureRequest, seed: int, tell: Callable[[str], None]
) -> None:
    asked = request.config.option.runs
    first = request.config.option.first_seed
    first = seed * RUNS if first is None else first
    runs = RUNS if asked is None else asked
    processes = 1 if asked is None else os.cpu_count() or 1
    progress = (lambda _: None) if asked is None else tell
    summary = run_many(first, runs, processes=processes, progress=progress, run=run)
    text = f"{summary.runs:,} runs from seed {first} on in {summary.seconds:.0f} s:\n{summary.table()}"
    if asked is not None:
        tell(text)
    explained = [explain(failed, fault, run) for failed, fault in sorted(summary.faults.items())[:SHOWN]]
    assert not summary.faults, f"runs failed, of seeds {sorted(summary.faults)[:50]}\n" + "\n".join(explained)
    never = [what for what in REACHED if not summary.seen[what]]
    assert runs < RUNS or not never, f"never reached: {never}\n{text}"


def test_a_seed_is_the_same_run_every_time(seed: int) -> None:
    once, again = run(seed, traced=True), run(seed, traced=True)
    assert once.trace == again.trace
    assert once.seen == again.seen


Plant = Callable[[], Sequence[AbstractContextManager[object]]]


def take_writes_while_the_rest_is_copied() -> Sequence[AbstractContextManager[object]]:
    """The source goes on with writes to what it is about to give away."""
    finish = Moves.finish

    async def unfrozen(moves: Moves, move_id: str) -> object:
        departed = await finish(moves, move_id)
        moves.is_freezing = False
        return departed

    return [mock.patch.object(Moves, "finish", unfrozen)]


def leave_the_sequences_behind() -> Sequence[AbstractContextManager[object]]:
    """Rows go, what makes batches count once stays."""
    return [mock.patch.object(ProducerSequences, "receive"), mock.patch.object(ProducerSequences, "receive_request")]


def leave_the_event_ids_behind() -> Sequence[AbstractContextManager[object]]:
    """Rows go, event ids stay."""
    take = Departure._take_event_ids

    def take_and_drop(departure: Departure, piece: Transfer) -> None:
        take(departure, piece)
        piece.event_id_keys = piece.event_id_times = piece.event_id_partitions = b""

    return [mock.patch.object(Departure, "_take_event_ids", take_and_drop)]


def follow_no_changes() -> Sequence[AbstractContextManager[object]]:
    """Each row is copied once, as it was then."""
    return [mock.patch.object(Departure, "applied")]


def acknowledge_without_a_lease() -> Sequence[AbstractContextManager[object]]:
    """A process that wakes goes on where it was."""
    return [mock.patch.object(Lease, "is_held", True)]


def clean_nothing_away() -> Sequence[AbstractContextManager[object]]:
    """What was copied for a move that came to nothing stays, and the next one begins on top of it."""

    async def nothing(*_: object) -> None:
        pass

    return [mock.patch.object(Moves, "clean", nothing)]


def decide_before_everything_is_there() -> Sequence[AbstractContextManager[object]]:
    """The owners change although the source has not sent the rest."""
    attempt = Mover._attempt

    async def hasty(mover: Mover, move: object) -> None:
        with mock.patch.object(Departure, "is_caught_up", True):
            await attempt(mover, move)  # type: ignore[arg-type]

    return [mock.patch.object(Mover, "_attempt", hasty)]


def acknowledge_without_telling_that_the_standby_is_lost() -> Sequence[AbstractContextManager[object]]:
    """An owner whose standby does not answer goes on at once; the coordinator still counts on the standby."""

    def go_on(replication: _Replication, reason: str) -> None:
        replication.release(reason)

    return [mock.patch.object(_Replication, "fail", go_on)]


def acknowledge_before_the_standby_has_it() -> Sequence[AbstractContextManager[object]]:
    """What is shipped is not waited for."""
    flush = _Replication.flush

    async def hasty(replication: _Replication) -> None:
        if replication.state == IN_SYNC:
            replication._wanted.set()
        else:
            await flush(replication)

    return [mock.patch.object(_Replication, "flush", hasty)]


def count_on_the_standby_of_an_owner_before() -> Sequence[AbstractContextManager[object]]:
    """An owner's new process ships to nobody, and the coordinator does not take note of that."""

    async def nothing(*_: object) -> None:
        pass

    return [mock.patch.object(Replicas, "new_owner", nothing)]


WITHOUT_STANDBYS: Sequence[Plant] = (
    take_writes_while_the_rest_is_copied,
    leave_the_sequences_behind,
    leave_the_event_ids_behind,
    follow_no_changes,
    acknowledge_without_a_lease,
    clean_nothing_away,
    decide_before_everything_is_there,
)
WITH_STANDBYS: Sequence[Plant] = (
    acknowledge_without_telling_that_the_standby_is_lost,
    acknowledge_before_the_standby_has_it,
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("plant", [*WITHOUT_STANDBYS, *WITH_STANDBYS], ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, seed: int) -> None:
    find(plant, seed, MOST_RUNS)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_rare_planted_bug_is_found(seed: int) -> None:
    find(count_on_the_standby_of_an_owner_before, seed, RARE_RUNS)


def find(plant: Plant, seed: int, runs: int) -> None:
    """Runs with the bug until one fails."""
    with ExitStack() as stack:
        for patch in plant():
            stack.enter_context(patch)
        planted = functools.partial(run, standbys=plant not in WITHOUT_STANDBYS)
        summary = run_some(seed * runs, runs, until_fault=True, run=planted)
    assert summary.faults, f"{summary.runs} runs from seed {seed * runs} on have not found it"
