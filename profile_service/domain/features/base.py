"""What every feature kind offers. A kind is one file of this package and one line of its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict


class KindOptions(BaseModel):
    """A feature's own keys in the schema file, beside `kind`, `events` and `half_life`; each kind derives its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FeatureKind(ABC):
    """One kind of feature."""

    name: ClassVar[str]
    """As written in the schema file after `kind:`."""
    Options: ClassVar[type[KindOptions]]
    reads: ClassVar[Literal["text", "number"] | None]
    """What the attribute of the feature must be; None for kinds that read no attribute."""
    decays: ClassVar[bool]
    """Whether `half_life` means something for it."""
