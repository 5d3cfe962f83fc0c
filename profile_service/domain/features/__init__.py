"""The feature kinds: one file a kind, one line here."""

from __future__ import annotations

from profile_service.domain.features.base import FeatureKind
from profile_service.domain.features.categorical import Categorical
from profile_service.domain.features.counter import Counter
from profile_service.domain.features.distinct import Distinct
from profile_service.domain.features.distribution import Distribution
from profile_service.domain.features.latest import Latest
from profile_service.domain.features.recent import Recent
from profile_service.domain.features.top_k import TopK
from profile_service.domain.features.window_count import WindowCount

KINDS: dict[str, FeatureKind] = {
    kind.name: kind
    for kind in (Counter(), Categorical(), Distribution(), TopK(), WindowCount(), Latest(), Recent(), Distinct())
}
"""Every kind by the name that a schema file gives it."""
