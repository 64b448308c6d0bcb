"""The one schema of a data check, as the JSON holds it and the page shows it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class Shown(BaseModel):
    """A model of the report: closed, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class File(Shown):
    """One source that was read. `formats` counts rows by the format that was found."""

    path: str
    heldout: bool
    rows: int
    formats: dict[str, int]
    digest: str  # sha256 of all rows, as they were parsed


class Place(Shown):
    """Where a row stands, and for a pair of rows where the other one does."""

    row: str  # "FILE:LINE"
    other: str | None = None
    says: str = ""  # an excerpt, with what looks like personal data masked, or what was wrong


class Finding(Shown):
    """How many rows something is true of. `limit` is the recipe's, as a share; without one nothing is judged."""

    key: str
    title: str
    rows: int
    of: int
    limit: float | None
    over: bool
    places: list[Place]  # the first of them

    @property
    def share(self) -> float:
        return self.rows / self.of if self.of else 0.0


class Lengths(Shown):
    """Distribution of one length over all rows."""

    what: str
    unit: Literal["tokens", "characters"]
    minimum: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: int
    edges: list[float]  # of the histogram, one more than its counts
    counts: list[int]


class Labels(Shown):
    """Rows by label. `evenness` is the entropy of the shares over that of equal shares: 1 where all are equal."""

    label: str  # what was taken for one: a key of the row or of its JSON answer, or "answer"
    counts: dict[str, int]  # most frequent first
    evenness: float
    limit: float | None = None  # the recipe's min_evenness

    @property
    def uneven(self) -> bool:
        """Whether the labels are less even than the recipe allows."""
        return self.limit is not None and self.evenness < self.limit

    @property
    def ratio(self) -> float:
        """The most frequent label's rows over those of the rarest."""
        return max(self.counts.values()) / min(self.counts.values())


class Extremes(Shown):
    """Ten rows at one end of a scale."""

    title: str
    rows: list[Place]
    values: list[float]


class DataReport(Shown):
    """Everything that a data check found."""

    schema_version: Literal[1] = 1
    edgetune: str
    base: str | None  # the model under whose template lengths were measured
    max_length: int
    similarity: float
    files: list[File]
    lengths: list[Lengths]
    findings: list[Finding]
    labels: list[Labels]
    languages: dict[str, int]  # of what the user says, by ISO 639 code; "short" and "unsure" where it cannot be told
    personal: dict[str, int]  # rows by kind
    extremes: list[Extremes]

    @property
    def over(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.over]

    @property
    def uneven(self) -> list[Labels]:
        return [labels for labels in self.labels if labels.uneven]
