"""Patterns of layer names as files bring them. One that would backtrack for hours is refused instead."""

from __future__ import annotations

import regex

from edgetune.errors import UnsupportedError

MATCH_S = 1.0  # a plain pattern takes some microseconds


def is_pattern(text: str) -> bool:
    """Tell whether a text is a regular expression."""
    try:
        regex.compile(text)
    except regex.error:
        return False
    return True


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches at the start of a layer's name. Raises UnsupportedError where it takes long."""
    try:
        return regex.match(pattern, name, timeout=MATCH_S) is not None
    except TimeoutError as error:
        raise UnsupportedError(f"the pattern {pattern[:80]!r} is not matched with {name} within {MATCH_S:g} s; make "
                               "the checkpoint's configuration anew") from error  # fmt: skip
