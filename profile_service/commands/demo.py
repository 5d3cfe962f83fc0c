"""`demo`: the service with the bundled sample in it, and one shopper's profile next to what the shopper likes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from profile_service.commands.options import flag

if TYPE_CHECKING:
    from rich.console import RenderableType

    from profile_service.sample import Sample
    from userprofile.v1 import admin_service_pb2, profile_pb2

DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT = 50051, 8080
SHOWN_SHOPPER = 22


def demo(
    exit_after_replay: Annotated[bool, flag("--exit-after-replay", "Stop once the profile is shown.")] = False,
    shards: Annotated[int | None, flag("--shards", "Shards, as for serve.", min=1, max=256)] = None,
    grpc_port: Annotated[
        int | None, flag("--grpc-port", "Port of gRPC; by default 50051, or a free one.", min=0, max=65535)
    ] = None,
    http_port: Annotated[
        int | None, flag("--http-port", "Port of REST; by default 8080, or a free one.", min=0, max=65535)
    ] = None,
) -> None:
    """Starts the service in a temporary directory, replays the bundled sample, shows a profile and keeps serving.

    The cars of the sample are real listings. The shoppers, their tastes and all that they do are made up: nobody
    publishes which cars people look at.

    Example:  profile-service demo --exit-after-replay
    """
    from profile_service.commands.get import read_profile
    from profile_service.commands.send import replay
    from profile_service.commands.service import StopSignal, free_port, running
    from profile_service.commands.terminal import stderr, stdout
    from profile_service.config import Settings
    from profile_service.sample import load_sample
    from profile_service.sample.shoppers import shopper_id

    out, remarks = stdout(), stderr()
    host = "127.0.0.1"
    # Without a data directory the service makes one that goes when it does.
    settings = Settings(
        shards=shards,
        host=host,
        grpc_port=free_port(host, DEFAULT_GRPC_PORT, remarks.print) if grpc_port is None else grpc_port,
        http_port=free_port(host, DEFAULT_HTTP_PORT, remarks.print) if http_port is None else http_port,
    )
    stop = StopSignal()
    with running(settings, stop) as service:
        if stop.asked:
            return
        print(f"ready: gRPC {service.grpc_address}, REST http://{service.http_address}", flush=True)
        sample = load_sample()
        replay(sample.serialized(time.time_ns()), len(sample.events), service.grpc_address, remarks, stop)
        if stop.asked:
            return
        user_id = shopper_id(SHOWN_SHOPPER)
        profile, schema = read_profile(service.grpc_address, user_id)
        out.print(render_shopper(sample, profile, schema, SHOWN_SHOPPER))
        out.print(ways_to_ask(user_id, service.grpc_address, service.http_address), markup=False, soft_wrap=True)
        if not exit_after_replay:
            print("serving until Ctrl-C", flush=True)
            stop.wait()


def render_shopper(
    sample: Sample, profile: profile_pb2.Profile, schema: admin_service_pb2.GetSchemaResponse, shopper: int
) -> RenderableType:
    """A shopper's profile, and above it what the shopper was made to like."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    from profile_service.commands.render import number, render_profile
    from profile_service.sample.listings import COLORS

    tastes = sample.tastes
    (low_price, high_price), (low_mileage, high_mileage) = tastes.price_eur[shopper], tastes.mileage_km[shopper]
    liked = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    liked.add_column(style="bold cyan")
    liked.add_row("color", ", ".join(COLORS[color] for color in tastes.colors[shopper]))
    liked.add_row("make", ", ".join(tastes.makes[shopper]))
    liked.add_row("price", f"{number(low_price)} – {number(high_price)} EUR")
    liked.add_row("mileage", f"{number(low_mileage)} – {number(high_mileage)} km")
    units = {feature.name: feature.unit for feature in schema.features}
    return Group(
        Panel(liked, title="hidden tastes of this made-up shopper", title_align="left", expand=False),
        Panel(
            render_profile(profile, list(units), units),
            title="profile that the service found",
            title_align="left",
            expand=False,
        ),
    )


def ways_to_ask(user_id: str, grpc_address: str, http_address: str) -> str:
    """Commands that read the profile again."""
    body = f'{{"user_id":"{user_id}"}}'
    return "\n".join(
        (
            "ask again:",
            f"  profile-service get {user_id} --address {grpc_address}",
            f"  curl 'http://{http_address}/v1/profiles/{user_id}?features=color&features=price'",
            f"  grpcurl -plaintext -d '{body}' {grpc_address} userprofile.v1.ProfileService/GetProfile",
            f"REST documentation: http://{http_address}/docs",
        )
    )
