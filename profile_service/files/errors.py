"""What can be wrong with a file as a whole. What is wrong with one of its rows refuses that row and is no error."""

from __future__ import annotations

from profile_service.errors import ProfileServiceError


class FileError(ProfileServiceError):
    """A file that cannot be read, or whose columns cannot be made events: names the file, the place and what to do."""


class CellError(ValueError):
    """A value that cannot be what its column should hold; the text says why. It refuses its row."""
