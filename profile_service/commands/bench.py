"""`bench`: the benchmarks of the package `benchmarks`, beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from profile_service.commands.options import Json, flag
from profile_service.config import Capacity, SyncMode

if TYPE_CHECKING:
    from types import ModuleType

CAPACITY = Capacity()

DataDir = Annotated[
    Path | None,
    flag("--data-dir", "Directory on the disk to measure; what is made in it is removed. Default: the current one."),
]
Seed = Annotated[int | None, flag("--seed", "Seed of the load; the same one gives the same events.")]
Plot = Annotated[Path | None, flag("--plot", "Also draws the figures into this SVG file.", metavar="FILE")]
Rounds = Annotated[int, flag("--rounds", "How often everything is measured, in turns.", min=1)]


SCHEMAS = ("preferences", "marketplace")
Shards = Annotated[int | None, flag("--shards", "Shards, as for serve.", min=1, max=256)]
Share = Annotated[
    float, flag("--share", "The fixed rate, as a share of the highest that was measured before.", min=0.01, max=1.0)
]


def schema_name(text: str) -> str:
    """The name of a load and of the schema that counts it."""
    if text not in SCHEMAS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(SCHEMAS)}")
    return text


BenchSchema = Annotated[
    str, flag("--schema", "What is counted, and the load of it.", parser=schema_name, metavar="|".join(SCHEMAS))
]


def sync_mode(text: str) -> str:
    """The name of a sync mode, if it is one."""
    if text not in get_args(SyncMode):
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(get_args(SyncMode))}")
    return text


STORES = ("local-always", "local-never", "redis-everysec", "redis-always", "redis-none")


def store_name(text: str) -> str:
    """The name of a place where state lives."""
    if text not in STORES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(STORES)}")
    return text


def ingest(
    schema: BenchSchema = "preferences",
    events: Annotated[int, flag("--events", "Events a round.", min=1)] = 1_000_000,
    users: Annotated[int, flag("--users", "Users whom they are by.", min=1)] = 100_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1)] = 4_000,
    producers: Annotated[int, flag("--producers", "Streams at once.", min=1)] = 2,
    window: Annotated[int, flag("--window", "Unacknowledged batches a stream.", min=1)] = 8,
    rounds: Rounds = 5,
    sync: Annotated[
        list[str],
        flag(
            "--sync",
            "Sync mode of the service; several are compared, round by round.",
            parser=sync_mode,
            metavar="|".join(get_args(SyncMode)),
        ),
    ] = ["always", "never"],  # noqa: B006  typer copies it
    share: Share = 0.7,
    steady_s: Annotated[float, flag("--steady-s", "Seconds at that rate.", min=0.1)] = 10.0,
    peers: Annotated[
        bool, flag("--peers", "Measures Redis with a Python consumer, and Python dicts, beside it on the same work.")
    ] = False,
    shards: Shards = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how many events a second go in durably, what each costs, and how soon they are acknowledged.

    Example:  profile-service bench ingest --sync always --sync never --json
    """
    from benchmarks import ingest as benchmark

    options = benchmark.Options(
        schema=schema,
        events=events,
        users=users,
        batch=batch,
        producers=producers,
        window=window,
        rounds=rounds,
        sync=tuple(dict.fromkeys(sync)),
        share=share,
        steady_s=steady_s,
        peers=peers,
        shards=shards,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def read(
    schema: BenchSchema = "marketplace",
    users: Annotated[int, flag("--users", "Users who have a profile.", min=1)] = 100_000,
    history: Annotated[int, flag("--history", "Events of each of them.", min=1)] = 10,
    at_once: Annotated[int, flag("--at-once", "Reads under way at any time.", min=1)] = 64,
    turn_s: Annotated[float, flag("--turn-s", "Seconds of each turn.", min=0.1)] = 3.0,
    rounds: Rounds = 5,
    rate: Annotated[float, flag("--rate", "Profiles a second while the quantiles are taken.", min=1)] = 500.0,
    steady_s: Annotated[float, flag("--steady-s", "Seconds at that rate.", min=0.1)] = 10.0,
    peer: Annotated[
        bool, flag("--peer/--no-peer", "Measures FastAPI over Redis beside it, with the same JSON.")
    ] = True,
    shards: Shards = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how soon a profile is read, how many a second, and what one costs, beside a bare echo of its size.

    Example:  profile-service bench read --schema marketplace --json
    """
    from benchmarks import read as benchmark

    options = benchmark.Options(
        schema=schema,
        users=users,
        history=history,
        at_once=at_once,
        turn_s=turn_s,
        rounds=rounds,
        rate=rate,
        steady_s=steady_s,
        peer=peer,
        shards=shards,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def mixed(
    schema: BenchSchema = "preferences",
    users: Annotated[int, flag("--users", "Users whom the events are by.", min=1)] = 100_000,
    share: Annotated[
        float, flag("--share", "Events at a fixed rate, as a share of the highest.", min=0.01, max=1.0)
    ] = 0.5,
    reads: Annotated[float, flag("--reads", "Reads a second.", min=0.1)] = 500.0,
    probes: Annotated[float, flag("--probes", "Events a second that are read until they show.", min=0.1)] = 50.0,
    at_once: Annotated[int, flag("--at-once", "Reads under way where they go as fast as they can.", min=1)] = 64,
    steady_s: Annotated[float, flag("--steady-s", "Seconds of each stretch.", min=0.1)] = 10.0,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 1_000,
    producers: Annotated[int, flag("--producers", "Streams at once.", min=1)] = 2,
    shards: Shards = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how soon an event is readable beside other work, and whether events and reads starve each other.

    Example:  profile-service bench mixed --share 0.5 --reads 500 --json
    """
    from benchmarks import mixed as benchmark

    options = benchmark.Options(
        schema=schema,
        users=users,
        share=share,
        reads=reads,
        probes=probes,
        at_once=at_once,
        steady_s=steady_s,
        batch=batch,
        producers=producers,
        shards=shards,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def recovery(
    users: Annotated[int, flag("--users", "Users in the snapshot.", min=1)] = 1_000_000,
    history: Annotated[int, flag("--history", "Events of each of them in the snapshot.", min=1)] = 3,
    events: Annotated[int, flag("--events", "Events logged after the snapshot.", min=1)] = 1_000_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1)] = 4_000,
    rounds: Rounds = 5,
    cold: Annotated[bool, flag("--cold", "Drop the page cache before each kill (all of it as root).")] = False,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how long a shard is away when its process is killed, phase by phase.

    Example:  profile-service bench recovery --users 1000000 --events 1000000 --json
    """
    from benchmarks import recovery as benchmark

    options = benchmark.Options(
        users=users,
        history=history,
        events=events,
        batch=batch,
        rounds=rounds,
        cold=cold,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def snapshot(
    users: Annotated[int, flag("--users", "Users in the snapshot.", min=1)] = 1_000_000,
    history: Annotated[int, flag("--history", "Events of each of them beforehand.", min=1)] = 3,
    rate: Annotated[int, flag("--rate", "Events a second.", min=1)] = 50_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1)] = 200,
    quiet_s: Annotated[float, flag("--quiet-s", "Seconds without a snapshot, before each one.", min=0.1)] = 10.0,
    rounds: Rounds = 5,
    sync: Annotated[SyncMode, flag("--sync", "Sync mode of the service.")] = "always",
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how much later acknowledgements come while a snapshot is written.

    Example:  profile-service bench snapshot --rate 50000 --json
    """
    from benchmarks import snapshot as benchmark

    options = benchmark.Options(
        users=users,
        history=history,
        rate=rate,
        batch=batch,
        quiet_s=quiet_s,
        rounds=rounds,
        sync=sync,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def soak(
    schema: BenchSchema = "preferences",
    minutes: Annotated[float, flag("--minutes", "How long.", min=0.01)] = 30.0,
    users: Annotated[int, flag("--users", "Users whom the events are by.", min=1)] = 100_000,
    share: Share = 0.7,
    reads: Annotated[float, flag("--reads", "Reads a second.", min=0.1)] = 500.0,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 4_000,
    producers: Annotated[int, flag("--producers", "Streams at once.", min=1)] = 2,
    snapshot_interval_s: Annotated[float, flag("--snapshot-interval-s", "As for serve.", min=0.1)] = 60.0,
    shards: Shards = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures whether memory grows or latency drifts in a long time of work, with snapshots and reads.

    Example:  profile-service bench soak --minutes 30 --plot soak.svg
    """
    from benchmarks import soak as benchmark

    options = benchmark.Options(
        schema=schema,
        minutes=minutes,
        users=users,
        share=share,
        reads=reads,
        batch=batch,
        producers=producers,
        snapshot_interval_s=snapshot_interval_s,
        shards=shards,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def flood(
    seconds: Annotated[float, flag("--seconds", "How long the producers send.", min=0.1)] = 10.0,
    producers: Annotated[int, flag("--producers", "Producers, each in a process of its own.", min=1)] = 4,
    users: Annotated[int, flag("--users", "Users whom the events are by.", min=1)] = 100_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 4_000,
    stream_window_bytes: Annotated[
        int, flag("--stream-window-bytes", "As for serve.", min=1024)
    ] = CAPACITY.stream_window_bytes,
    owner_window_bytes: Annotated[
        int, flag("--owner-window-bytes", "As for serve.", min=1024)
    ] = CAPACITY.owner_window_bytes,
    shard_queue_bytes: Annotated[
        int, flag("--shard-queue-bytes", "As for serve.", min=1024)
    ] = CAPACITY.shard_queue_bytes,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how much memory producers can make the service take that send faster than it counts.

    Example:  profile-service bench flood --producers 4 --seconds 10
    """
    from benchmarks import flood as benchmark

    options = benchmark.Options(
        seconds=seconds,
        producers=producers,
        users=users,
        batch=batch,
        stream_window_bytes=stream_window_bytes,
        owner_window_bytes=owner_window_bytes,
        shard_queue_bytes=shard_queue_bytes,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def startup(
    shards: Annotated[int, flag("--shards", "Shards of the service.", min=1, max=256)] = 1,
    rounds: Rounds = 5,
    data_dir: DataDir = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how long `serve` takes until it is ready, beside what `ray.init` alone takes.

    Example:  profile-service bench startup --rounds 5 --json
    """
    from benchmarks import startup as benchmark

    _run(benchmark, benchmark.Options(shards=shards, rounds=rounds, data_dir=data_dir), plot, as_json)


def memory(
    users: Annotated[list[int], flag("--users", "Users of marketplace; repeatable.", min=1000)] = [  # noqa: B006
        1_000_000,
        10_000_000,
    ],
    service_users: Annotated[
        int, flag("--service-users", "Users of marketplace in a running service; 0 leaves it out.", min=0)
    ] = 1_000_000,
    peer_users: Annotated[
        list[int], flag("--peer-users", "Users of preferences, as the peers have them; repeatable.", min=1000)
    ] = [100_000, 1_000_000],  # noqa: B006
    history: Annotated[int, flag("--history", "Events of each of these.", min=1)] = 3,
    peers: Annotated[bool, flag("--peers/--no-peers", "Measures Redis and Python dicts beside it.")] = True,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 4_000,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how many bytes a user takes, as the growth of resident memory.

    Example:  profile-service bench memory --users 1000000 --no-peers
    """
    from benchmarks import memory as benchmark

    options = benchmark.Options(
        users=tuple(dict.fromkeys(users)),
        service_users=service_users,
        peer_users=tuple(dict.fromkeys(peer_users)),
        history=history,
        peers=peers,
        batch=batch,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def growth(
    schema: BenchSchema = "preferences",
    users: Annotated[list[int], flag("--users", "The sizes; repeatable.", min=100)] = [  # noqa: B006
        1_000,
        100_000,
        1_000_000,
        10_000_000,
    ],
    events: Annotated[int, flag("--events", "Events a round.", min=1)] = 1_000_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 4_000,
    rounds: Rounds = 3,
    turn_s: Annotated[float, flag("--turn-s", "Seconds of each turn of reads.", min=0.1)] = 2.0,
    shards: Shards = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures whether an event, a read or a user costs more when there are more users.

    Example:  profile-service bench growth --users 1000 --users 1000000
    """
    from benchmarks import growth as benchmark

    options = benchmark.Options(
        schema=schema,
        users=tuple(users),
        events=events,
        batch=batch,
        rounds=rounds,
        turn_s=turn_s,
        shards=shards,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def stores(
    events: Annotated[int, flag("--events", "Events a round.", min=1)] = 400_000,
    users: Annotated[int, flag("--users", "Users whom they are by.", min=10)] = 100_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 4_000,
    rounds: Rounds = 3,
    rate: Annotated[float, flag("--rate", "Events a second while waiting times are taken.", min=1)] = 20_000.0,
    reads: Annotated[float, flag("--reads", "Profiles read a second meanwhile.", min=1)] = 200.0,
    steady_s: Annotated[float, flag("--steady-s", "Seconds at that rate.", min=0.1)] = 8.0,
    shards: Annotated[int, flag("--shards", "Shards.", min=1, max=256)] = 2,
    scaled_shards: Annotated[int, flag("--scaled-shards", "Shards that each is then scaled to.", min=1, max=256)] = 4,
    store: Annotated[
        list[str],
        flag("--store", "What is measured; repeatable.", parser=store_name, metavar="|".join(STORES)),
    ] = list(STORES),  # noqa: B006  typer copies it
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures local and external state on the same work: rate, CPU, waiting times, memory, recovery, scaling.

    Example:  profile-service bench stores --store local-always --store redis-everysec
    """
    from benchmarks import stores as benchmark

    options = benchmark.Options(
        events=events,
        users=users,
        batch=batch,
        rounds=rounds,
        rate=rate,
        reads=reads,
        steady_s=steady_s,
        shards=shards,
        scaled_shards=scaled_shards,
        stores=tuple(dict.fromkeys(store)),
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def scale(
    schema: BenchSchema = "preferences",
    users: Annotated[int, flag("--users", "Users in the service.", min=100)] = 1_000_000,
    rate: Annotated[int, flag("--rate", "Events a second.", min=1)] = 20_000,
    batch: Annotated[int, flag("--batch", "Events a batch.", min=1, max=10_000)] = 200,
    producers: Annotated[int, flag("--producers", "Streams at once.", min=1)] = 2,
    reads: Annotated[float, flag("--reads", "Profiles read a second.", min=1)] = 200.0,
    shards: Annotated[
        list[int], flag("--shards", "How many shards there are at first, and then; repeatable.", min=1, max=256)
    ] = [2, 4, 3],  # noqa: B006  typer copies it
    quiet_s: Annotated[float, flag("--quiet-s", "Seconds before the first change.", min=0.1)] = 10.0,
    data_dir: DataDir = None,
    seed: Seed = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measures how long events and reads wait while users move to more shards, and to fewer.

    Example:  profile-service bench scale --users 100000 --shards 2 --shards 4 --shards 3
    """
    from benchmarks import scale as benchmark

    options = benchmark.Options(
        schema=schema,
        users=users,
        rate=rate,
        batch=batch,
        producers=producers,
        reads=reads,
        shards=tuple(shards),
        quiet_s=quiet_s,
        data_dir=data_dir,
        seed=seed,
    )
    _run(benchmark, options, plot, as_json)


def _run(benchmark: ModuleType, options: Any, plot: Path | None, as_json: bool) -> None:
    """Measures, draws where told, and prints the figures."""
    from profile_service.commands.terminal import stderr, stdout

    result = benchmark.run(options, stderr())
    if plot is not None:
        plot.write_text(benchmark.draw(result), encoding="utf-8")
    if as_json:
        import json

        print(json.dumps(result))
        return
    out = stdout()
    for name, value in result["machine"].items():
        out.print(f"{name}: {value}")
    out.print(f"disk: {result['disk']}")
    benchmark.show(result, out)
    if "costs" in result:
        from benchmarks.report import markdown

        out.print("\nFor docs/performance.md:\n")
        print(markdown(result["costs"]))
