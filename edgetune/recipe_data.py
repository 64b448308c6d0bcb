"""The data section of a recipe: where rows come from, how they are mixed, and what a check of them allows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from edgetune.closed import Closed, Count, Positive, Seed, Share
from edgetune.data.formats import Format
from edgetune.data.general import PROBE

Language = Annotated[str, Field(pattern="^[a-z]{2}$")]


class TrainSource(Closed):
    """One of several sources of training rows."""

    path: str = Field(description="file, `datasets` folder or org/name[:split]")
    weight: Positive | None = Field(None, description="share of the mixture against the other sources' weights")
    cap: Count | None = Field(None, description="use at most N of its rows, drawn by the seed")
    replay: bool = Field(False, description="general or earlier data, which together fill mix.replay_share")
    format: Format = Field("auto", description="format of this source; data.format where auto")


class Decay(Closed):
    """Older rows are drawn less often."""

    field: str = Field(description="key of a row's date: ISO 8601, or seconds since 1970")
    half_life_days: Positive = Field(description="age, from the newest row, at which a row counts half")


class Balance(Closed):
    """Rows of rare labels are drawn more often, within each source."""

    label: str = Field(description="key of the label in the row or in its JSON answer; `answer` for the whole answer")
    strength: Share = Field(
        1.0, description="0 leaves rows alone; 1 gives each label as many rows as the most frequent"
    )
    max_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        20.0, description="a rare label's row counts at most as much as so many of the most frequent label's"
    )


class Mix(Closed):
    """How the sources become one set of training rows."""

    rows: Count | None = Field(None, description="rows of the mixture; what the sources' rows weigh together if absent")
    temperature: Positive | None = Field(None, description="a source's share goes with its rows ** (1 / temperature)")
    replay_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the mixture that replay sources fill, usually 0.2"
    )
    decay: Decay | None = Field(None, description="weights by date")
    balance: Balance | None = Field(None, description="weights by label")
    seed: Seed = Field(0, description="seed of caps and draws")


class Split(Closed):
    """Held-out rows that are taken out of the training rows, whole groups at a time."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the rows that is held out, about")
    group: str | None = Field(None, description="key whose rows stay together; rows with one prompt do if absent")
    seed: Seed = Field(0, description="seed of the choice of groups")


class DataCheck(Closed):
    """What `edgetune data check` allows, mostly as shares of the rows. What is null is counted and not judged."""

    refused: Share | None = Field(0.0, description="rows that training could not read")
    without_loss: Share | None = Field(0.0, description="rows whose mask leaves nothing to learn")
    overlap: Share | None = Field(0.0, description="held-out rows whose prompt is in train")
    near_overlap: Share | None = Field(None, description="held-out rows whose prompt is almost one of train")
    duplicates: Share | None = Field(None, description="rows that stood there before, answer included")
    near_duplicates: Share | None = Field(None, description="rows whose prompt almost stood there before")
    conflicts: Share | None = Field(None, description="rows whose prompt stood there with another answer")
    too_long: Share | None = Field(None, description="rows longer than max_length")
    trivial: Share | None = Field(None, description="answers without a word, placeholders, echoes of the question")
    personal: Share | None = Field(None, description="rows with what looks like an e-mail, phone, card or key")
    languages: Annotated[list[Language], Field(min_length=1)] | None = Field(
        None, description="languages that training rows may ask in, by ISO 639-1 code, such as en"
    )
    other_languages: Share = Field(
        0.0, description="training rows that ask in another language; what is too short or unsure to tell is in none"
    )
    min_evenness: Share | None = Field(
        None,
        description="of each label: entropy of its values' shares over that of equal shares; 1 where all are equal",
    )
    similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Jaccard similarity of five-character shingles from which prompts are near"
    )


def _branch(value: Any) -> str:
    return "list of sources" if isinstance(value, (list, tuple)) else "one source"


Train = Annotated[
    Annotated[str, Tag("one source")] | Annotated[list[TrainSource], Field(min_length=1), Tag("list of sources")],
    Discriminator(_branch),
]


class Data(Closed):
    """Rows to train on, and rows to judge by that training never sees."""

    train: Train = Field(description="training rows: a file, a `datasets` folder, org/name[:split], or several sources")
    heldout: str | None = Field(None, description="held-out rows; a row that is also in train is refused")
    split: Split | None = Field(None, description="takes the held-out rows out of train, where heldout is absent")
    mix: Mix | None = Field(None, description="how sources become one set of rows; each row once if absent")
    general: str | None = Field(None, description="general text; the prose of Python's own manual if absent")
    calibration: str | None = Field(
        None, exclude_if=lambda value: value is None,
        description="rows or texts that calibrate in the place of general text, such as `data write` makes; none of "
        "them may be held out",
    )  # fmt: skip
    general_probe: str | None = Field(
        PROBE, exclude_if=lambda value: value == PROBE,
        description="multiple-choice rows that the base and the trained model are asked, for what was forgotten; "
        "null asks nothing",
    )  # fmt: skip
    format: Format = Field("auto", description="format of train and heldout; auto looks at the keys of each row")
    max_length: Count = Field(512, description="tokens; longer training rows are left out and counted")
    train_rows: Count | None = Field(None, description="use the first N training rows of a single source")
    heldout_rows: Count | None = Field(None, description="use the first N held-out rows")
    generated_rows: int | None = Field(
        None, ge=0, description="of the first N held-out rows, generate the wrong answers, for slot F1; all if absent"
    )
    check: DataCheck = Field(DataCheck(), description="what `edgetune data check` allows")
    score_timeout_s: Positive | None = Field(
        None, exclude_if=lambda value: value is None,
        description="seconds without a word that end a scoring, of these rows or of tasks; 600 if absent",
    )  # fmt: skip

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Data:
        if (self.heldout is None) == (self.split is None):
            raise ValueError("give heldout (a file) or split (rows taken out of train), one of the two")
        sources, mix = self.sources, self.mix or Mix()
        for part in (False, True):
            given = [source.weight is not None for source in sources if source.replay is part]
            if any(given) and not all(given):
                raise ValueError(f"train: give every {'replay ' if part else ''}source a weight, or none")
            if any(given) and mix.temperature is not None:
                raise ValueError("mix.temperature and weights of sources exclude each other; leave one out")
        replayed = [source.replay for source in sources]
        if any(replayed) != (mix.replay_share is not None):
            raise ValueError("mix.replay_share and a source with replay: true need each other")
        if all(replayed):
            raise ValueError("train: every source is replay; one at least must be what is learned")
        if self.train_rows is not None and not isinstance(self.train, str):
            raise ValueError("train_rows is for a single source; use cap, or mix.rows")
        return self

    @property
    def sources(self) -> list[TrainSource]:
        """The training sources, one or several."""
        return [TrainSource(path=self.train)] if isinstance(self.train, str) else self.train

    @property
    def places(self) -> str:
        """Where the training rows lie, for messages."""
        return ", ".join(source.path for source in self.sources)
