"""Errors travel between processes whole."""

from __future__ import annotations

import pickle

import pytest

from profile_service.errors import (
    InvalidArgument,
    NotMine,
    ProfileServiceError,
    SchemaChangeRefused,
    SchemaError,
    SchemaFault,
    StorageFull,
    Unavailable,
)
from profile_service.shard.keeping import Interrupted


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("events[3].user_id", "must not be empty"),
        StorageFull("no room", retry_after_s=2.0),
        Unavailable("it moves", 0.5),
        NotMine("shard 1 is at epoch 7", 7),
        SchemaError("shop.yaml", (SchemaFault(3, "features.color", "unknown kind"),)),
        SchemaChangeRefused(("price: other bins",)),
        Interrupted("the store does not answer", full=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_in_another_process(error: ProfileServiceError) -> None:
    found = pickle.loads(pickle.dumps(error))  # noqa: S301  as Ray does
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
