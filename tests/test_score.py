"""The verb score: any file against a reference pack, in its own runtime, where the reference itself is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgetune import measure
from edgetune.artifact import Artifact
from edgetune.errors import ArtifactError
from edgetune.export import gguf
from edgetune.runtime.accuracy import ScoredRow, write_rows
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.evidence import Timings
from edgetune.runtime.reference import ReferencePack
from edgetune.runtime.reference_rows import ReferenceRows
from edgetune.runtime.worker import Job
from tests.conftest import Call
from tests.export.test_onnx import exported
from tests.test_found import bare

ROWS = [ScoredRow((1, n, n + 1, n + 2, n, 2), 2, f"row {n}") for n in range(5, 17)]
TEXTS = [TokenRow(tuple(range(3, 40)), 1)]


@pytest.fixture(scope="module")
def pack(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evidence folder of a reference, copied as to another box."""
    folder = tmp_path_factory.mktemp("reference")
    made = measure.accuracy(
        Job.of("reference", tiny_model, n_threads=1), [tiny_model], folder / "made", rows=ROWS, text_rows=TEXTS,
        tokenizer=tiny_model.path, stop_ids=[2], max_new_tokens=4, generate_rows=0, reference=None,
    )  # fmt: skip
    copy = folder / "copy"
    shutil.copytree(made.path, copy)
    return copy


def test_rows_of_a_pack_are_written_and_read(tmp_path: Path) -> None:
    for most in (500, 70_000):
        rows = [ScoredRow((1, 2, most), 2, "text"), ScoredRow((4, most, 6, 7), 1, "")]
        made = ReferenceRows.of(rows, TEXTS, [2, 7])
        made.save(tmp_path / "rows.npz")
        assert ReferenceRows.read(tmp_path / "rows.npz") == made
        assert [(row.ids, row.start) for row in made.rows] == [(row.ids, row.start) for row in rows]


@pytest.mark.parametrize(("kind", "name"), [(ReferencePack, "reference.npz"), (ReferenceRows, "rows.npz")])
def test_a_file_with_a_changed_byte_or_of_another_form_is_refused(
    kind: type[ReferencePack] | type[ReferenceRows], name: str, pack: Path, tmp_path: Path
) -> None:
    whole, file, said = (pack / name).read_bytes(), tmp_path / name, []
    places = range(0, len(whole), 3)
    for at in places:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            kind.read(file)
        except ArtifactError as error:
            said.append(str(error))
    assert len(said) > len(places) / 3  # the others are dates and the like
    assert not any("\n" in line for line in said)
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ArtifactError, match=re.escape(str(file))):
        kind.read(file)


def test_a_packs_rows_take_a_third_of_their_json(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 49152, (500, 100)).tolist()
    rows = [ScoredRow(tuple(row), 76, "") for row in ids]
    ReferenceRows.of(rows, [], [2]).save(tmp_path / "rows.npz")
    write_rows(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.npz").stat().st_size < (tmp_path / "rows.jsonl").stat().st_size / 3


@pytest.mark.parametrize("kind", ["model", "gptq", "fp32", "gguf"])
def test_each_kind_is_scored_without_the_reference(
    kind: str, pack: Path, call: Call, tiny_model: Artifact, tiny_gguf: Artifact, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    engine = {"gguf": "llama.cpp", "fp32": "onnxruntime"}.get(kind, "torch")
    if kind == "gguf":
        file = Path(shutil.copy(tiny_gguf.path / gguf.FILE, tmp_path / "gguf"))
    else:
        artifact = tiny_model if kind == "model" else exported(kind, tiny_model, tmp_path_factory)
        file = bare(artifact, tmp_path / kind)
    raw = tmp_path / "raw.json"
    code, out_text, err = call("score", str(file), "--reference", str(pack), "--threads", "1", "--json", str(raw))
    assert (code, err) == (0, "")
    (found,) = Timings.model_validate_json(raw.read_bytes()).scored
    assert found.subject.engine == engine
    assert f"{kind} in {engine}" in out_text
    kl = sum(row.kl or 0.0 for row in found.rows) / sum(row.n_tokens for row in found.rows)
    words = " ".join(out_text.split())
    shown = re.search(
        r"rows 12, with 48 answer tokens KL mean (\S+) \(.* KL max .* perplexity .* of general text", words
    )
    assert shown is not None
    assert float(shown[1]) == pytest.approx(kl, rel=0.01)
    parted = sum(row.first_divergence is not None for row in found.rows)
    assert f"{parted} of 12 rows part from the reference" in out_text
    assert kl < 1e-3 if kind != "gptq" else kl > 1e-3
    assert (parted == 0) == (kind != "gptq")


def test_rows_that_lie_elsewhere_are_given(pack: Path, call: Call, tiny_gguf: Artifact, tmp_path: Path) -> None:
    alone = shutil.copy(pack / "reference.npz", tmp_path / "pack.npz")
    code, _, err = call("score", str(tiny_gguf.path), "--reference", str(alone))
    assert code != 0
    assert "rows.npz is not there; copy it from where the pack was made, or give --rows" in err
    write_rows(tmp_path / "rows.jsonl", ROWS)
    given = ["--reference", str(alone), "--rows", str(tmp_path / "rows.jsonl"), "--threads", "1"]
    code, said, _ = call("score", str(tiny_gguf.path), *given)
    assert code == 0
    assert "100.00% of the answer tokens" in said
    assert "of general text" not in said


Spoil = Callable[[Path], list[str]]


def other_rows(folder: Path) -> list[str]:
    write_rows(folder / "rows.jsonl", ROWS[:3])
    return ["--rows", str(folder / "rows.jsonl")]


def other_vocabulary(folder: Path) -> list[str]:
    with np.load(folder / "reference.npz") as data:
        np.savez(folder / "reference.npz", **{**data, "n_vocab": np.int64(511)})
    return []


def no_pack(folder: Path) -> list[str]:
    (folder / "reference.npz").write_bytes(b"cut")
    return []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_rows, "was made of other rows than"),
        (other_vocabulary, "is of a vocabulary of 511 tokens, model has 512; compare models of one vocabulary"),
        (no_pack, "is not a reference pack"),
        (lambda _: ["--engine", "onnxruntime"], "engine 'onnxruntime' runs none of"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    spoil: Spoil, said: str, pack: Path, call: Call, tiny_gguf: Artifact, tmp_path: Path
) -> None:
    shutil.copytree(pack, tmp_path / "pack")
    code, out, err = call(
        "score", str(tiny_gguf.path), "--reference", str(tmp_path / "pack"), *spoil(tmp_path / "pack")
    )
    assert code != 0
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert json.loads((pack / "accuracy.json").read_text())["subject"]["name"] == "reference"
