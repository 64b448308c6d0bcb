"""A key/value cache that grows by copying: a step reads the past from one buffer and writes past and new to another.

Three buffers do: the past, what is written next, and a prefix that is kept while rows are read over it.
"""

from __future__ import annotations


class Slots:
    """Which of three buffers holds the past, and which is written next."""

    def __init__(self) -> None:
        self.past: int | None = None  # None where there is none yet
        self._kept: int | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.past = self._kept = None

    def keep(self) -> None:
        """Keep the past of now, so that `rewind` comes back to it."""
        self._kept = self.past

    def rewind(self) -> None:
        """Go back to what was kept."""
        self.past = self._kept

    @property
    def next(self) -> int:
        """The buffer that is neither the past nor kept."""
        return next(slot for slot in range(3) if slot not in (self.past, self._kept))

    def advance(self) -> None:
        """What was written is the past now."""
        self.past = self.next
