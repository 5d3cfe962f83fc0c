"""Client of the user-profile service: send events, read profiles.

Example::

    from profile_client import ProfileClient, Event
    with ProfileClient("localhost:50051") as client:
        with client.producer() as producer:
            producer.send(Event("u1", "view", attributes={"color": "red", "price": 12900}))
        client.get_profile("u1")["color"].likelihood("red")
"""

from __future__ import annotations

from profile_client.aio_client import AsyncProfileClient
from profile_client.aio_producer import AsyncProducer
from profile_client.client import ProfileClient
from profile_client.errors import (
    AbortedError,
    BufferFullError,
    DataLossError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ProducerClosedError,
    ProfileClientError,
    Rejected,
    RejectedEventsError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from profile_client.events import Event
from profile_client.options import ProducerOptions
from profile_client.producer import Producer
from profile_client.profiles import (
    BatchProfiles,
    CategoricalFeature,
    CounterFeature,
    DistinctFeature,
    DistributionFeature,
    Feature,
    LatestFeature,
    Profile,
    RankedItem,
    Ranking,
    RecentFeature,
    TopKFeature,
    WindowCountFeature,
)

__all__ = [
    "AbortedError",
    "AsyncProducer",
    "AsyncProfileClient",
    "BatchProfiles",
    "BufferFullError",
    "CategoricalFeature",
    "CounterFeature",
    "DataLossError",
    "DeadlineExceededError",
    "DistinctFeature",
    "DistributionFeature",
    "Event",
    "Feature",
    "InvalidArgumentError",
    "LatestFeature",
    "NotFoundError",
    "PermissionDeniedError",
    "Producer",
    "ProducerClosedError",
    "ProducerOptions",
    "Profile",
    "ProfileClient",
    "ProfileClientError",
    "RankedItem",
    "Ranking",
    "RecentFeature",
    "Rejected",
    "RejectedEventsError",
    "ResourceExhaustedError",
    "ServiceError",
    "TopKFeature",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "WindowCountFeature",
]
