"""A row as the answer to a read: an encoded userprofile.v1.Profile."""

from __future__ import annotations

from collections.abc import Sequence

from profile_service.domain.features.base import ReadContext, RowViews
from profile_service.domain.layout import EVENT_COUNT, FIRST_SEEN, LAST_SEEN, Layout
from userprofile.v1 import profile_pb2


def encode_profile(
    user_id: str, layout: Layout, views: RowViews, row: int, context: ReadContext, names: Sequence[str]
) -> bytes:
    """The row's values as of `context.read_ns`, of the features named, or of all where none is."""
    count, first, last = views.i8[row, EVENT_COUNT], views.i8[row, FIRST_SEEN], views.i8[row, LAST_SEEN]
    profile = profile_pb2.Profile(user_id=user_id, event_count=int(count))
    if count:
        profile.first_seen_time.FromNanoseconds(int(first))
        profile.last_seen_time.FromNanoseconds(int(last))
    profile.read_time.FromNanoseconds(context.read_ns)
    wanted = set(names)
    for feature in layout.features:
        if not wanted or feature.name in wanted:
            feature.finalize(views, row, context, profile.features[feature.name])
    return profile.SerializeToString()
