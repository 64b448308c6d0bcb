"""Near-duplicates by MinHash ("On the resemblance and containment of documents", Broder 1997).

The index only proposes, from a lower similarity on; what counts is the Jaccard similarity of the shingles themselves.
So there is no false hit, and of pairs at a threshold of 0.8 about one in 20,000 is missed.
"""

from __future__ import annotations

from typing import Any

from edgetune.backends import require

N_PERMUTATIONS = 128
SHINGLE = 5  # characters: rows may be a handful of words
SLACK = 0.3  # how far below the wanted similarity the index begins to propose
SEED = 1


class NearIndex:
    """Texts that were seen, numbered from 0."""

    def __init__(self, similarity: float) -> None:
        self._datasketch = require("datasketch")
        proposes = max(0.1, similarity - SLACK)
        self._lsh = self._datasketch.MinHashLSH(threshold=proposes, num_perm=N_PERMUTATIONS)
        self._seen: list[frozenset[str]] = []
        self._similarity = similarity

    def near(self, text: str) -> int | None:
        """The number of the first text that was seen and is at least as similar, or None."""
        found = shingles(text)
        return self._first(found, self._hash(found))

    def see(self, text: str) -> int | None:
        """As `near`; then the text itself is seen."""
        found = shingles(text)
        signature = self._hash(found)
        before = self._first(found, signature)
        self._lsh.insert(len(self._seen), signature)
        self._seen.append(found)
        return before

    def _first(self, found: frozenset[str], signature: Any) -> int | None:
        numbers = sorted(self._lsh.query(signature))
        return next((n for n in numbers if jaccard(found, self._seen[n]) >= self._similarity), None)

    def _hash(self, found: frozenset[str]) -> Any:
        made = self._datasketch.MinHash(num_perm=N_PERMUTATIONS, seed=SEED)
        made.update_batch([shingle.encode() for shingle in found])
        return made


def shingles(text: str) -> frozenset[str]:
    """Every run of five characters, case and whitespace aside; a shorter text is one shingle."""
    plain = normal(text)
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


def normal(text: str) -> str:
    """A text without what does not tell texts apart: case and whitespace."""
    return " ".join(text.casefold().split())


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared shingles over all shingles."""
    return len(a & b) / len(a | b)
