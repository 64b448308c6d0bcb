"""What a runtime must agree on with training before an export may ship: ids, BOS, stop set, chat template.

A runtime that tokenizes one golden text otherwise, adds a BOS of its own, or does not know where an answer ends
answers worse than it was measured to, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data.golden import Conversation, Golden
from edgetune.errors import ContractError

_SHOWN = 8  # ids on each side of a message


@dataclass(frozen=True)
class RuntimeFacts:
    """What a runtime says about the tokenizer it loaded from the exported files."""

    stop_ids: frozenset[int]  # every token that ends an answer there
    bos_id: int | None
    adds_bos: bool  # puts a BOS before text that is tokenized with its defaults
    chat_template: str  # "" where it has none


def check_contract(golden: Golden, facts: RuntimeFacts, tokenize: Callable[[str], Sequence[int]]) -> dict[str, Any]:
    """Hold a runtime to the golden conversations and give what was compared, for the manifest.

    `tokenize` is the runtime's own: special tokens parsed, no BOS added. A runtime may know more stop tokens than
    training named (llama.cpp takes any token spelled `<|endoftext|>` for one): they are listed as
    `extra_stop_ids`, and refused where one of them stands inside a golden answer, which it would cut short.

    Raises ContractError naming what differed, where, and both values.
    """
    n_tokens = 0
    for check in checks(golden, facts, tokenize).values():
        n_tokens += check()
    return {
        "conversations": len(golden.conversations),
        "texts": len(golden.texts),
        "tokens": n_tokens,
        "n_bos": golden.n_bos,
        "stop_ids": sorted(golden.stop_ids),
        "extra_stop_ids": sorted(facts.stop_ids - set(golden.stop_ids)),
    }


def checks(
    golden: Golden, facts: RuntimeFacts, tokenize: Callable[[str], Sequence[int]]
) -> dict[str, Callable[[], int]]:
    """Give what `check_contract` does one by one, by name; each raises ContractError, or gives the tokens compared."""
    return {
        "chat template": lambda: _same_template(golden.chat_template, facts.chat_template),
        "BOS": lambda: _same_bos(golden, facts),
        "stop set": lambda: _same_stops(golden, facts),
        "token ids": lambda: (
            sum(_same_ids(f"conversation {i}", c.text, c.ids, tokenize) for i, c in enumerate(golden.conversations))
            + sum(_same_ids(f"text {i}", t.text, t.ids, tokenize) for i, t in enumerate(golden.texts))
        ),
    }


def _same_stops(golden: Golden, facts: RuntimeFacts) -> int:
    missing = sorted(set(golden.stop_ids) - facts.stop_ids)
    if missing:
        raise ContractError(
            f"stop set differs: training ends answers at {golden.stop_ids}, the runtime at {sorted(facts.stop_ids)}; "
            f"it would run past {missing}"
        )
    extra = facts.stop_ids - set(golden.stop_ids)
    for index, conversation in enumerate(golden.conversations):
        cut = sorted(extra & set(_answer(conversation, golden.stop_ids)))
        if cut:
            raise ContractError(
                f"stop set differs: the runtime also stops at {cut}, which stands inside the answer of "
                f"conversation {index}; training ends answers at {golden.stop_ids} only"
            )
    return 0


def _same_template(trained: str, found: str) -> int:
    if trained == found:
        return 0
    at = next(
        (i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b), min(len(trained), len(found))
    )
    raise ContractError(
        f"chat template differs at character {at}: training used {trained[at : at + 40]!r}, "
        f"the runtime has {found[at : at + 40]!r} ({len(trained)} and {len(found)} characters)"
    )


def _same_bos(golden: Golden, facts: RuntimeFacts) -> int:
    if facts.adds_bos:
        raise ContractError(
            f"BOS count differs: training saw {golden.n_bos} at the start of a conversation, the runtime adds one "
            f"more (id {facts.bos_id}); export with add_bos_token false"
        )
    if golden.n_bos and facts.bos_id != golden.bos_id:
        raise ContractError(
            f"BOS differs: training starts a conversation with id {golden.bos_id}, the runtime knows {facts.bos_id}"
        )
    return 0


def _same_ids(name: str, text: str, trained: Sequence[int], tokenize: Callable[[str], Sequence[int]]) -> int:
    found = list(tokenize(text))
    if found == list(trained):
        return len(found)
    both = zip(trained, found, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(trained), len(found)))
    raise ContractError(
        f"token ids of golden {name} ({text[:40]!r}) differ at index {at}: training "
        f"{list(trained[at : at + _SHOWN])}, the runtime {found[at : at + _SHOWN]} ({len(trained)}, {len(found)} ids)"
    )


def _answer(conversation: Conversation, stop_ids: Sequence[int]) -> list[int]:
    """The ids of the last answer, without its end token and what the template writes after it."""
    answer = conversation.ids[conversation.prompt_length :]
    end = next((i for i, token in enumerate(answer) if token in stop_ids), len(answer))
    return answer[:end]
