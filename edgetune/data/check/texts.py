"""What can be said of one text: is it trivial, how much of it repeats, in which language is it; and labels of many."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgetune.backends import require
from edgetune.data.check.duplicates import normal

PLACEHOLDERS = frozenset(
    (
        "n/a",
        "na",
        "none",
        "null",
        "nil",
        "todo",
        "tbd",
        "...",
        "?",
        "unknown",
        "i don't know",
        "idk",
        "undefined",
        "nan",
    )
)
MIN_LANGUAGE = 20  # characters; shorter texts are counted as "short"
MIN_CONFIDENCE = 0.8
UNTOLD = ("short", "unsure")
MAX_LABELS, ROWS_PER_LABEL = 500, 5  # more labels, or fewer rows of each, and it is no label


def is_trivial(question: str, answer: str) -> bool:
    """Tell an answer that says nothing: no letter or digit, a placeholder, or the question again."""
    plain = normal(answer)
    return plain in PLACEHOLDERS or not any(c.isalnum() for c in plain) or plain == normal(question)


def repetition(text: str) -> float:
    """Share of the word trigrams of a text that stood in it before; 0 for texts of fewer than ten words."""
    words = text.casefold().split()
    if len(words) < 10:
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams)


class Languages:
    """Tells languages with py3langid, whose model lies in the package."""

    def __init__(self) -> None:
        module = require("py3langid").langid
        self._identifier = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)

    def tell(self, text: str) -> str:
        """ISO 639 code; "short" where a text is too short to tell, "unsure" below a confidence of 0.8."""
        if len(text.strip()) < MIN_LANGUAGE:
            return "short"
        language, confidence = self._identifier.classify(text)
        return str(language) if confidence >= MIN_CONFIDENCE else "unsure"


def find_labels(answers: Sequence[str]) -> dict[str, Counter[str]]:
    """Find what is a label among the answers: the whole answer, or a key of answers that are JSON objects."""
    found = {}
    parsed = [json_object(answer) for answer in answers]
    if all(one is not None for one in parsed):
        for key in parsed[0] or ():
            values = [one.get(key) for one in parsed if one is not None]
            if all(isinstance(value, (str, bool)) for value in values):
                found[key] = Counter(map(str, values))
    else:
        found["answer"] = Counter(answers)
    return {key: counts for key, counts in found.items() if _is_label(counts, len(answers))}


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def evenness(counts: Counter[str]) -> float:
    """Entropy of the shares over the entropy of equal shares; 1 for a single label."""
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return entropy / math.log(len(counts)) if len(counts) > 1 else 1.0


def _is_label(counts: Counter[str], n_rows: int) -> bool:
    return 1 < len(counts) <= min(MAX_LABELS, n_rows // ROWS_PER_LABEL)
