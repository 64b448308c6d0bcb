"""What is compared inside of a student and its teacher: which blocks, relations against float64, and end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgetune.adapt.trainer import Rows, pack, pad
from edgetune.artifact import Artifact
from edgetune.compress import distill, pairing, teacher
from edgetune.compress.coach import Taps
from edgetune.compress.distill import Insides
from edgetune.compress.relations import relation_loss, rows_of
from edgetune.data.render import Rendered
from edgetune.errors import UnsupportedError
from edgetune.packed import Layout, packed_attention
from edgetune.recipe_distill import Distill
from tests.compress.conftest import kill_distilling, make_trainer
from tests.oracles import students_float64 as oracle

CONFIG = Distill(batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=5e-3, top_k=16, report_to=[])
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def shaped(layers: int, heads: int = 4, groups: int = 2, head: int = 16) -> dict[str, Any]:
    more = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head}
    return LLAMA | more


@pytest.mark.parametrize(
    ("named", "ours", "theirs", "pairs"),
    [
        ("last", 5, 30, [(4, 29)]),
        ("all", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("all", 3, 4, [(0, 0), (1, 2), (2, 3)]),
        ("all", 3, 1, [(0, 0), (1, 0), (2, 0)]),
        ([3, 1], 4, 4, [(1, 1), (3, 3)]),
    ],
)
def test_blocks_meet_at_the_same_share_of_the_depth(
    named: Any, ours: int, theirs: int, pairs: list[tuple[int, int]]
) -> None:
    config = Distill(hidden_weight=1, hidden_layers=named)
    assert pairing.paired_blocks(config, shaped(ours), shaped(theirs)) == pairs


def test_relation_heads_fit_both_models() -> None:
    config = Distill(relation_weight=1)
    # Queries, keys and values of 64 and 32 there, of 96 and 48 here.
    assert pairing.relation_heads(config, shaped(2, 6, 3), shaped(2, 4, 2)) == 4
    assert pairing.relation_heads(config, shaped(2, 1, 1, 3), shaped(2)) == 1
    named = Distill(relation_weight=1, relation_heads=16)
    assert pairing.relation_heads(named, shaped(2, 6, 3), shaped(2, 4, 2)) == 16
    with pytest.raises(UnsupportedError, match=r"relation_heads=16 does not divide .* of 24, 32, 64; choose .* of 8$"):
        pairing.check(named, shaped(2, 1, 1, 24), shaped(2))
    with pytest.raises(UnsupportedError, match=r"hidden_layers names block 2, the student's are 0 to 1$"):
        pairing.check(Distill(hidden_weight=1, hidden_layers=[0, 2]), shaped(2), shaped(4))


def test_relations_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = [torch.randn(9, width, dtype=torch.float64) * 2 for width in (16, 4, 4)]
    rows = [(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 3])), (torch.tensor([0, 4, 5, 6, 7]), torch.tensor([2, 4]))]
    found = relation_loss(ours, theirs, rows, 2)
    wanted = [
        np.mean([
            oracle.relation_kl(x.detach()[tokens].numpy(), y[tokens].numpy(), 2, int(token))
            for x, y in zip(ours, theirs, strict=True)
        ])
        for tokens, at in rows for token in at
    ]  # fmt: skip
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-12)
    assert float(relation_loss(theirs, theirs, rows, 2).abs().max()) == 0
    assert torch.autograd.gradcheck(lambda *x: relation_loss(x, theirs, rows, 2), tuple(ours))


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_batch_gives_the_insides_of_its_rows(collate: Any, tiny_model: Artifact, rows: list[Rendered]) -> None:
    """States and relations of a batch, packed or padded, are those of each row alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float64)
    taps = Taps(model, [0, 1], relations=True)
    chosen = [7, 3, 12]
    batch = collate([Rows(rows)[place] for place in chosen])
    keep = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        if "lengths" in batch:
            n_prefix, *lengths = batch["lengths"].tolist()
            layout = Layout.of(n_prefix, lengths, n_tokens=batch["input_ids"].shape[1])
            with packed_attention(model):
                model(input_ids=batch["input_ids"], position_ids=layout.positions(), packed=layout, use_cache=False)
        else:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        states, projections = taps.states(keep), taps.projections()
        other = [x.flip(1) for x in projections]
        found = relation_loss(projections, other, rows_of(batch, keep), 2)
        wanted_states: list[list[torch.Tensor]] = [[], []]
        wanted = []
        for place in chosen:
            row = rows[place]
            at = torch.tensor([t - 1 for t, label in enumerate(row.labels) if label])
            hidden = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            for block in (0, 1):
                wanted_states[block].append(hidden[block + 1][0, at])
            own = taps.projections()
            wanted.append(relation_loss(own, [x.flip(1) for x in own], [(torch.arange(len(row.ids)), at)], 2))
    for block in (0, 1):
        torch.testing.assert_close(states[block].double(), torch.cat(wanted_states[block]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert float(found.min()) > 0
    taps.forget()
    with pytest.raises(KeyError):
        taps.projections()


@pytest.mark.parametrize(
    "keys",
    [
        {"relation_weight": 1.0},
        {"hidden_weight": 0.5, "hidden_layers": "all", "relation_weight": 0.5, "gradient_checkpointing": True},
    ],
    ids=["relations", "all blocks and relations, computed once more on the way back"],
)
def test_a_student_learns_insides_and_goes_on_after_a_kill_to_the_same_bytes(
    keys: dict[str, Any], tiny_model: Artifact, student: Artifact, rows: list[Rendered], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = Distill.model_validate(CONFIG.model_dump() | keys)
    said = teacher.run(config, tiny_model, tmp_path / "said", rows=rows)

    def run(out: str) -> Artifact:
        return distill.run(config, student, tiny_model, said, tmp_path / out, rows=rows)

    whole = run("whole")
    losses = [loss for _, loss in whole.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        kill_distilling(patch, step=5)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert run("cut").manifest.files == whole.manifest.files
    _, info = AutoModelForCausalLM.from_pretrained(whole.path, output_loading_info=True)
    assert not info["unexpected_keys"]


def test_the_loss_between_insides_is_that_of_both_models(
    tiny_model: Artifact, student: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    """What the trainer adds to the loss without it is what rows give one by one in float64."""
    config = CONFIG.model_copy(update={"hidden_weight": 0.7, "hidden_layers": "all", "relation_weight": 0.3})
    said = teacher.run(config, tiny_model, tmp_path / "said", rows=rows)
    insides = Insides.of(config, student, tiny_model)
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    trainer = make_trainer(config, model, rows, said, insides, insides.coach(tiny_model, "cpu"))
    batch = pad([Rows(rows)[place] for place in (7, 3)])
    assert insides == Insides([(0, 1)], 4)
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model.eval(), batch, num_items_in_batch=1))
        trainer._config = CONFIG
        plain = float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=1))
        models = [AutoModelForCausalLM.from_pretrained(one.path, dtype=torch.float64) for one in (student, tiny_model)]
        taps = [Taps(one, [], relations=True) for one in models]
        (projection,) = [one.weight.double() for one in getattr(trainer.model, distill.PROJECTION)]
        states: list[list[torch.Tensor]] = [[], []]
        related = 0.0
        for place in (7, 3):
            row = rows[place]
            at = torch.tensor([t - 1 for t, label in enumerate(row.labels) if label])
            for index, one in enumerate(models):
                states[index].append(one(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[-1][0, at])
            whole = [(torch.arange(len(row.ids)), at)]
            related += float(relation_loss(taps[0].projections(), taps[1].projections(), whole, insides.n_heads).sum())
        x, y = torch.cat(states[0]) @ projection.T, torch.cat(states[1])
        hidden = float((((x - y) ** 2).mean(1) / (y**2).mean(1)).sum())
    assert found - plain == pytest.approx(0.7 * hidden + 0.3 * related, rel=0.02)  # the teacher may be in bfloat16
