"""How a shard does, as its coordinator and its callers hear it, from the first moment of its process on."""

from __future__ import annotations

from dataclasses import dataclass

RECOVERING = "recovering"
SERVING = "serving"
FULL = "full"
"""The disk has no room: it reads and does not write."""
STALLED = "stalled"
"""The store does not answer: it reads what is near and does not write, until it does."""
FAILED = "failed"
"""What is stored cannot be used; somebody has to look."""


@dataclass
class Health:
    """What a shard says of itself."""

    state: str = RECOVERING
    progress: float = 0.0
    """How much of the recovery is done, 0 to 1."""
    message: str = ""
    """What the state is about, for people; empty where there is nothing to say."""

    def recovering(self, progress: float, message: str) -> None:
        """So much of the recovery is done."""
        self.progress, self.message = progress, message

    def serving(self, message: str = "") -> None:
        """It reads and writes."""
        self.state, self.progress, self.message = SERVING, 1.0, message

    def full(self, message: str) -> None:
        """It reads and does not write."""
        self.state, self.message = FULL, message

    def stalled(self, message: str) -> None:
        """It waits for its store."""
        self.state, self.message = STALLED, message

    def failed(self, message: str) -> None:
        """It does nothing."""
        self.state, self.message = FAILED, message
