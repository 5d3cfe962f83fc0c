"""The one error tree. `rpc.status` maps each class to a gRPC status and an HTTP code; nothing else does.

ProfileServiceError
├── InvalidArgument        the caller's request is wrong: names the field and what would be right
├── NotFound               what was asked for does not exist
├── ResourceExhausted      a bounded queue is full: try again after `retry_after_s`
│   └── StorageFull        the disk has no room for what is to be made durable
├── Unavailable            an owner moves, recovers or shuts down: try again after `retry_after_s`
│   └── NotMine            routed by a stale topology: refresh it, then try again
├── Superseded             a newer stream of the same producer has taken over from this one
├── Replaced               another process of the same shard has taken the place of the one that asks
├── PermissionDenied       the caller may not do this, whoever it is for
├── DeadlineExceeded       the caller's deadline passed before the answer was ready
├── Unimplemented          named in the contract, not served by this version
├── DataLoss               stored bytes are not what was written
├── SchemaError            faults of a schema file, all of them, with line numbers
└── StartupError           the service cannot start here: says what to do
    └── SchemaChangeRefused  stored profiles cannot follow a change of the schema
"""

from __future__ import annotations

from dataclasses import dataclass


class ProfileServiceError(Exception):
    """Base of every error that the service raises on purpose; `message` is meant for people."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        """So that it travels between processes, though a subclass takes other arguments than the message."""
        return _without_init, (type(self), self.args), vars(self)


def _without_init(kind: type[ProfileServiceError], args: tuple[object, ...]) -> ProfileServiceError:
    return kind.__new__(kind, *args)


@dataclass(frozen=True)
class FieldViolation:
    """A field of a request that is wrong: its path (`events[3].user_id`) and what is wrong with it."""

    field: str
    description: str


class InvalidArgument(ProfileServiceError):
    """The caller's request is wrong."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}" if field else description)
        self.violations: tuple[FieldViolation, ...] = (FieldViolation(field, description),)


class NotFound(ProfileServiceError):
    """What was asked for does not exist."""


class _Retryable(ProfileServiceError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ResourceExhausted(_Retryable):
    """A bounded queue is full; nothing of the request was kept."""


class StorageFull(ResourceExhausted):
    """The disk has no room for what is to be made durable; nothing of the request was kept."""


class Unavailable(_Retryable):
    """The owner cannot answer just now; clients try again."""


class NotMine(Unavailable):
    """The request was routed by another topology than the owner's."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message, retry_after_s=0.05)
        self.epoch = epoch


class Superseded(ProfileServiceError):
    """A newer stream of the same producer has taken over."""


class Replaced(ProfileServiceError):
    """Another process of the same shard has taken the place of the one that asks, which is to end."""


class PermissionDenied(ProfileServiceError):
    """The caller may not do this."""


class DeadlineExceeded(ProfileServiceError):
    """The caller's deadline passed."""


class Unimplemented(ProfileServiceError):
    """The contract names it, this version does not serve it."""


class DataLoss(ProfileServiceError):
    """Stored bytes are not what was written."""


@dataclass(frozen=True)
class SchemaFault:
    """One fault of a schema file: 1-based line, dotted path (`features.color.values`), what is wrong."""

    line: int
    path: str
    description: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.path}: {self.description}"


class SchemaError(ProfileServiceError):
    """A schema file that cannot be used; `faults` holds every fault, by line."""

    def __init__(self, source: str, faults: tuple[SchemaFault, ...]) -> None:
        super().__init__("\n".join(f"{source}: {fault}" for fault in faults))
        self.source = source
        self.faults = faults


class StartupError(ProfileServiceError):
    """The service cannot start here."""


class SchemaChangeRefused(StartupError):
    """Stored profiles cannot follow a change of the schema; `faults` holds every reason."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        super().__init__(f"the stored profiles cannot follow the changed schema: {'; '.join(faults)}")
        self.faults = faults
