"""Three buffers of a growing cache: nothing that is read is written, and a kept prefix outlives the rows over it."""

from __future__ import annotations

from edgetune.runtime.engines.growing_cache import Slots


class Tape:
    """Buffers that hold tokens, written as a graph writes them: past and new to another buffer."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.buffers: list[list[int]] = [[], [], []]

    def step(self, *tokens: int) -> list[int]:
        past, written = self.slots.past, self.slots.next
        assert written != past
        self.buffers[written] = [*(self.buffers[past] if past is not None else []), *tokens]
        self.slots.advance()
        return self.buffers[written]


def test_steps_append() -> None:
    tape = Tape()
    assert [tape.step(token)[-1] for token in range(7)] == list(range(7))
    assert tape.step(7) == list(range(8))
    tape.slots.clear()
    assert tape.step(9) == [9]


def test_a_kept_prefix_is_never_written() -> None:
    tape = Tape()
    tape.step(1)
    tape.step(2)
    tape.slots.keep()
    for row in range(4):
        tape.slots.rewind()
        for token in range(row + 1):
            found = tape.step(10 * row + token)
        assert found == [1, 2, *(10 * row + token for token in range(row + 1))]


def test_an_empty_prefix_can_be_kept() -> None:
    tape = Tape()
    tape.slots.keep()
    tape.step(1)
    tape.slots.rewind()
    assert tape.step(2) == [2]
