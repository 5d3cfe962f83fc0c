"""`get`: one user's profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json, flag

if TYPE_CHECKING:
    from userprofile.v1 import admin_service_pb2, profile_pb2


def get(
    user_id: Annotated[str, typer.Argument(help="The user.", metavar="USER_ID")],
    features: Annotated[
        list[str] | None, flag("--features", "Only this feature; may be given again, or several with commas.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Shows a user's profile.

    Example:  profile-service get shopper-00022 --features color,price
    """
    from profile_service.commands.terminal import stdout

    names = [name.strip() for given in features or () for name in given.split(",") if name.strip()]
    profile, schema = read_profile(address, user_id, names)
    if as_json:
        from google.protobuf.json_format import MessageToJson

        print(MessageToJson(profile, always_print_fields_with_no_presence=True, ensure_ascii=False))
        return
    from profile_service.commands.render import render_profile

    units = {feature.name: feature.unit for feature in schema.features}
    stdout().print(render_profile(profile, list(units), units))


def read_profile(
    address: str, user_id: str, features: Sequence[str] = ()
) -> tuple[profile_pb2.Profile, admin_service_pb2.GetSchemaResponse]:
    """The profile, and the schema by which to show it."""
    from profile_service.commands.connection import CALL_TIMEOUT_S, connect
    from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc, profile_service_pb2, profile_service_pb2_grpc

    with connect(address) as channel:
        profile = profile_service_pb2_grpc.ProfileServiceStub(channel).GetProfile(
            profile_service_pb2.GetProfileRequest(user_id=user_id, features=features), timeout=CALL_TIMEOUT_S
        )
        schema = admin_service_pb2_grpc.AdminServiceStub(channel).GetSchema(
            admin_service_pb2.GetSchemaRequest(), timeout=CALL_TIMEOUT_S
        )
    return profile, schema
