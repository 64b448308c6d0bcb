"""Decoders that are not of the Llama kind: trained module by module, with the logits that they have."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from edgetune.adapt.fused_decoder import FusedDecoder
from edgetune.adapt.merge_choice import labelled_logits
from edgetune.data.render import Rendered

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
    ],
    ids=["gemma3", "gpt2"],
)
def test_a_decoder_without_silu_is_not_fused(model: PreTrainedModel) -> None:
    assert FusedDecoder.of(model) is None


def test_a_merge_is_judged_by_the_models_own_logits() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)).eval()
    row = Rendered((1, 5, 7, 9, 2), (False, False, False, True, True), 3, "", 1)
    with torch.no_grad():
        expected = model(torch.tensor([row.ids])).logits[0, 2:4]
    torch.testing.assert_close(next(labelled_logits(model, [row])), expected)
