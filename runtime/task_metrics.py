"""Metrics of a recipe's tasks. The libraries that compute them are imported when they are asked for.

A metric gives its figure and a share of it for each row: the row's own score where the figure is a mean, else a
jackknife pseudo-value (n F - (n - 1) F without the row), all shifted alike so that their mean is F too. So a paired
difference of any two figures is a mean of row differences, and one kind of interval serves them all.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.runtime.metrics import micro_f1, slot_counts

Floats = NDArray[np.float64]


class Answer(NamedTuple):
    """What a subject made of one row."""

    output: str  # generated text, or the likeliest label or choice
    gold: tuple[str, ...]  # accepted answers; of a label or choice the one that is right
    likelihoods: tuple[float, ...] = ()  # log, nats, of each label or choice; of perplexity the text's
    n_tokens: int = 0  # of perplexity


class Measured(NamedTuple):
    figure: float
    rows: Floats  # [n], each row's share; of all but perplexity, whose are logarithms, the figure is their mean


@dataclass(frozen=True)
class Metric:
    """How a metric is written and computed. `relative`: lower is better, and a loss is its relative rise."""

    title: str
    measure: Callable[[Sequence[Answer], Sequence[str]], Measured]  # answers, and the labels of a classification
    relative: bool = False


def exact_match(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Share of outputs that are one of the accepted answers, outer whitespace aside."""
    return _mean([float(a.output.strip() in [gold.strip() for gold in a.gold]) for a in answers])


def slot_f1(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Micro F1 over the fields of JSON objects."""
    counts = np.array([slot_counts(a.output, a.gold[0]) for a in answers], dtype=np.float64)  # [n, 3]
    return _jackknife_of_sums(counts, lambda sums: micro_f1([(int(sums[0]), int(sums[1]), int(sums[2]))]))


def json_valid(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Share of outputs that are JSON."""
    return _mean([float(_is_json(a.output)) for a in answers])


def bleu(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Corpus BLEU of sacrebleu with its own defaults, over 100."""
    scorer = require("sacrebleu").BLEU()
    found = [scorer.sentence_score(a.output, list(a.gold)) for a in answers]
    order = len(found[0].counts)
    table = np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in found], dtype=np.float64)

    def corpus(sums: Floats) -> float:
        counts = [int(x) for x in sums]
        correct, total = counts[:order], counts[order : 2 * order]
        made = scorer.compute_bleu(correct, total, counts[-2], counts[-1], smooth_method=scorer.smooth_method)
        return float(made.score) / 100

    return _jackknife_of_sums(table, corpus)


def rouge_l(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Mean ROUGE-L F-measure of rouge-score without stemming, best of the accepted answers."""
    require("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return _mean([scorer.score_multi(list(a.gold), a.output)["rougeL"].fmeasure for a in answers])


def accuracy(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Share of rows whose likeliest label or choice is the right one."""
    return _mean([float(a.output == a.gold[0]) for a in answers])


def macro_f1(answers: Sequence[Answer], labels: Sequence[str]) -> Measured:
    """Mean F1 of the labels, by scikit-learn; a label that is neither given nor chosen counts zero."""
    require("sklearn")
    from sklearn.metrics import f1_score

    pairs = [(a.gold[0], a.output) for a in answers]

    def of(some: Sequence[tuple[str, str]]) -> float:
        gold, chosen = zip(*some, strict=True)
        return float(f1_score(gold, chosen, labels=list(labels), average="macro", zero_division=0))

    whole = of(pairs)
    if len(pairs) == 1:
        return Measured(whole, np.array([whole]))
    without = {pair: of(_drop(pairs, pair)) for pair in set(pairs)}  # equal rows are worth the same
    return _jackknife(whole, np.array([without[pair] for pair in pairs]))


def auc(answers: Sequence[Answer], labels: Sequence[str]) -> Measured:
    """Area under the ROC curve of the labels' likelihoods, by scikit-learn; of more than two labels the mean of each
    against the others. A row's share comes from its placements (DeLong, Biometrics 44:837, 1988)."""
    require("sklearn")
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    logs = np.array([a.likelihoods for a in answers])  # [n, labels]
    p = np.exp(logs - logs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gold = np.array([list(labels).index(a.gold[0]) for a in answers])
    figures, rows = [], []
    for label in range(1, 2) if len(labels) == 2 else range(len(labels)):
        positive, score, n = gold == label, p[:, label], len(gold)
        m, k = int(positive.sum()), int((~positive).sum())
        if not m or not k:
            continue  # nothing to tell apart
        area = float(roc_auc_score(positive, score))
        placed = np.empty(n)
        ranks = rankdata(score)
        placed[positive] = (ranks[positive] - rankdata(score[positive])) / k
        placed[~positive] = 1 - (ranks[~positive] - rankdata(score[~positive])) / m
        figures.append(area)
        rows.append(area + np.where(positive, n / m, n / k) * (placed - area))
    if not figures:
        return Measured(math.nan, np.full(len(answers), math.nan))
    return Measured(float(np.mean(figures)), np.mean(rows, axis=0))


def squad_exact_match(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """SQuAD's exact match: case, punctuation, articles and whitespace aside, best of the accepted answers."""
    return _mean([max(float(normal(a.output) == normal(gold)) for gold in a.gold) for a in answers])


def squad_f1(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """SQuAD's F1 over the words of an answer, best of the accepted answers."""
    return _mean([max(_word_f1(normal(a.output).split(), normal(gold).split()) for gold in a.gold) for a in answers])


def perplexity(answers: Sequence[Answer], _: Sequence[str]) -> Measured:
    """Perplexity of all texts together. A row's share is in nats a token: the figure is exp of their mean."""
    n_tokens = np.array([a.n_tokens for a in answers], dtype=np.float64)
    nll = -np.array([a.likelihoods[0] for a in answers])
    rows = nll / n_tokens.mean()
    return Measured(math.exp(min(700.0, float(rows.mean()))), rows)


# kind of task -> its metrics by name, the first its default
METRICS: dict[str, dict[str, Metric]] = {
    "generation": {
        "exact_match": Metric("Exact match", exact_match),
        "slot_f1": Metric("Slot F1", slot_f1),
        "bleu": Metric("BLEU", bleu),
        "rouge_l": Metric("ROUGE-L", rouge_l),
        "json_valid": Metric("Valid JSON", json_valid),
    },
    "classification": {
        "accuracy": Metric("Accuracy", accuracy),
        "macro_f1": Metric("Macro F1", macro_f1),
        "auc": Metric("AUC", auc),
    },
    "multiple_choice": {"accuracy": Metric("Accuracy", accuracy)},
    "question_answering": {
        "exact_match": Metric("Exact match", squad_exact_match),
        "f1": Metric("F1", squad_f1),
    },
    "perplexity": {"perplexity": Metric("Perplexity", perplexity, relative=True)},
}


# metric -> the package that computes it; the others need none
PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score", "macro_f1": "sklearn", "auc": "sklearn"}


def check_metrics(names: Sequence[str]) -> None:
    """Raise MissingBackendError where a metric's package is not installed."""
    for name in names:
        if name in PACKAGES:
            require(PACKAGES[name])


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what SQuAD compares."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _word_f1(found: Sequence[str], gold: Sequence[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    same = (Counter(found) & Counter(gold)).total()
    return 2 * same / (len(found) + len(gold))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _drop(pairs: Sequence[tuple[str, str]], pair: tuple[str, str]) -> list[tuple[str, str]]:
    rest = list(pairs)
    rest.remove(pair)
    return rest


def _mean(scores: Sequence[float]) -> Measured:
    return Measured(float(np.mean(scores)), np.array(scores, dtype=np.float64))


def _jackknife_of_sums(table: Floats, figure: Callable[[Any], float]) -> Measured:
    """Measure a figure of column sums, [n, K], and give each row's share."""
    sums = table.sum(0)
    whole = figure(sums)
    if len(table) == 1:
        return Measured(whole, np.array([whole]))
    return _jackknife(whole, np.array([figure(sums - row) for row in table]))


def _jackknife(whole: float, without: Floats) -> Measured:
    """Give a figure's pseudo-values, shifted to have it as their mean, from what it is without each row, [n]."""
    return Measured(whole, whole + (len(without) - 1) * (without.mean() - without))
