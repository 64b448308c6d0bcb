"""The contract and parity, on runtimes that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgetune.data.golden import Conversation, Golden, PlainText
from edgetune.errors import ContractError
from edgetune.export.contract import RuntimeFacts, check_contract
from edgetune.export.parity import ParityResult, Tolerance, hold, parity

# One id a character; 1 begins a turn, 2 ends it.
GOLDEN = Golden(
    conversations=[
        Conversation(
            messages=[], text="\x01ask\x02\x01answer\x02\n", ids=[1, *b"ask", 2, 1, *b"answer", 2, 10], prompt_length=6
        )
    ],
    texts=[PlainText(text="plain", ids=list(b"plain"))],
    stop_ids=[2],
    bos_id=1,
    n_bos=1,
    chat_template="{{ messages }}",
)
FACTS = RuntimeFacts(stop_ids=frozenset({2}), bos_id=1, adds_bos=False, chat_template="{{ messages }}")


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_an_equal_runtime_passes_and_says_what_was_compared() -> None:
    assert check_contract(GOLDEN, FACTS, tokenize) == {
        "conversations": 1, "texts": 1, "tokens": 19, "n_bos": 1, "stop_ids": [2], "extra_stop_ids": [],
    }  # fmt: skip


def test_a_stop_token_that_only_the_runtime_knows_is_listed() -> None:
    found = check_contract(GOLDEN, replace(FACTS, stop_ids=frozenset({0, 2})), tokenize)
    assert found["extra_stop_ids"] == [0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chat_template": "{{ message }}"}, r"chat template differs at character 10: .*'s }}'.*' }}'"),
        ({"chat_template": ""}, "chat template differs at character 0"),
        ({"adds_bos": True}, "BOS count differs: training saw 1 .* adds one more"),
        ({"bos_id": 7}, "BOS differs: .* id 1, the runtime knows 7"),
        ({"stop_ids": frozenset({0})}, r"it would run past \[2\]"),
        ({"stop_ids": frozenset({2, ord("w")})}, r"also stops at \[119\], which stands inside the answer"),
    ],
)
def test_a_fact_that_differs_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ContractError, match=named):
        check_contract(GOLDEN, replace(FACTS, **change), tokenize)


def test_a_stop_token_in_the_prompt_or_after_the_answer_is_no_breach() -> None:
    check_contract(GOLDEN, replace(FACTS, stop_ids=frozenset({2, 10, ord("k")})), tokenize)


def test_other_ids_are_refused_with_the_text_and_the_first_index() -> None:
    with pytest.raises(ContractError, match=r"golden text 0 \('plain'\) differ at index 2: training \[97, .*\[65, "):
        check_contract(GOLDEN, FACTS, lambda text: tokenize(text.replace("plain", "plAin")))
    with pytest.raises(ContractError, match=r"conversation 0 .* differ at index 14: .*\(14, 15 ids\)"):
        check_contract(GOLDEN, FACTS, lambda text: [*tokenize(text), 9])


def test_parity_measures_what_it_says() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 7)).astype(np.float32)
    b = a.copy()
    b[2] += 1.0  # a shift of all logits moves no probability
    b[4, :] = a[4, ::-1]
    found = parity([a[:3], a[3:]], [b[:3], b[3:]])
    p, q = (np.exp(x[4].astype(np.float64)) / np.exp(x[4].astype(np.float64)).sum() for x in (a, b))
    assert found.mean_kl == pytest.approx((p * np.log(p / q)).sum() / 5)
    assert found.max_abs == pytest.approx(max(1.0, float(np.abs(a - b).max())), rel=1e-6)
    assert found.top1_agreement == pytest.approx(0.8 if a[4].argmax() != 3 else 1.0)
    assert found.n_positions == 5


@pytest.mark.parametrize("broken", [np.full((1, 3), np.nan), np.zeros((1, 4)), np.zeros((2, 3))])
def test_logits_that_cannot_be_compared_are_refused(broken: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ContractError):
        parity([np.zeros((1, 3), np.float32)], [broken.astype(np.float32)])


def test_every_bound_of_a_tolerance_is_held() -> None:
    result = ParityResult(max_abs=0.5, mean_kl=0.1, top1_agreement=0.9, n_positions=10)
    hold(result, Tolerance(max_abs=0.5, mean_kl=0.1, top1_agreement=0.9))
    for bound in (Tolerance(max_abs=0.4), Tolerance(mean_kl=0.09), Tolerance(top1_agreement=0.95)):
        with pytest.raises(ContractError, match="on 10 golden positions"):
            hold(result, bound, "a file")
    nan = replace(result, mean_kl=float("nan"))
    with pytest.raises(ContractError):
        hold(nan, Tolerance(mean_kl=1.0))
    assert result.note(Tolerance(mean_kl=0.2))["tolerance"] == {"mean_kl": 0.2}
