"""Our engines as a model of lm-eval, so that its tasks judge the file that ships, in its own runtime.

    model = LmEvalModel("runs/NAME/candidates/q4-gguf")
    lm_eval.simple_evaluate(model=model, tasks=[...])

lm-eval ships no data; docs/accuracy.md shows a task over a local file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edgetune.artifact import Artifact
from edgetune.backends import require
from edgetune.data.golden import Golden
from edgetune.data.prompt import render_chat
from edgetune.errors import UsageError
from edgetune.runtime.accuracy import score_row
from edgetune.runtime.engine import ENGINE_OF_KIND, TokenRow, load_engine

require("lm_eval")
from lm_eval.api.model import TemplateLM  # noqa: E402 - after the door
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

MAX_NEW_TOKENS = 256  # where a task does not say


class LmEvalModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An artifact in the engine that ships its kind. Greedy: a task that samples is refused."""

    def __init__(self, path: str | Path, *, n_ctx: int = 2048, n_threads: int = 2, **settings: object) -> None:
        """Load an artifact's folder. `settings` go to the engine. Raises UsageError, ArtifactError and EngineError."""
        super().__init__()
        artifact = Artifact.open(Path(path))
        kind = artifact.manifest.kind
        if kind not in ENGINE_OF_KIND:
            raise UsageError(f"{path} is of kind {kind!r}, which no engine runs; known: {list(ENGINE_OF_KIND)}")
        self._digest, self._n_ctx = artifact.digest, n_ctx
        self._golden = Golden.read(artifact.path)
        self.engine = load_engine(ENGINE_OF_KIND[kind], artifact.path, n_ctx=n_ctx, n_threads=n_threads, **settings)

    @property
    def eot_token_id(self) -> int:
        return self._golden.stop_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return self._digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self.engine.tokenize(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._golden.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(self._golden, chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Score continuations; neighbours with one context share it. A context that is too long is cut at its start."""
        rows = []
        for _pair, given, wanted in requests:
            if len(wanted) >= self._n_ctx:
                raise UsageError(f"a continuation of {len(wanted)} tokens does not fit n_ctx={self._n_ctx}; raise it")
            given = given[-(self._n_ctx - len(wanted)) :]
            rows.append(TokenRow((*given, *wanted), len(given)))
        answers: list[tuple[float, bool]] = []
        for _, group in groupby(rows, key=lambda row: row.ids[: row.start]):
            part = list(group)
            for row, logits in zip(part, self.engine.score_rows(part), strict=True):
                found = score_row(row, logits, f"{self.engine.name}, request {len(answers)}")
                answers.append((-found["nll"], found["exact"]))
        for (pair, *_ids), answer in zip(requests, answers, strict=True):
            if pair is not None:  # not the window of a text
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of n_ctx tokens, each token once, after the stop token."""
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._n_ctx - 1, 1)
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(log for log, _ in self._loglikelihood_tokens(rows)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to a stop token, a stop text or the task's limit."""
        outputs = []
        for request in requests:
            context, settings = request.args
            if settings.get("do_sample"):
                raise UsageError("the task asks for do_sample, and our engines are greedy; set do_sample: false")
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            limit = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
            outputs.append(self._continued(context, stops, limit))
            self.cache_hook.add_partial("generate_until", request.args, outputs[-1])
        return outputs

    def _continued(self, context: str, stops: Sequence[str], limit: int) -> str:
        ids = self.tok_encode(context)[-(self._n_ctx - limit) :]
        logits = self.engine.prefill(ids)
        new: list[int] = []
        text = ""
        while len(new) < limit:
            token = int(logits.argmax())
            if token in self._golden.stop_ids:
                break
            new.append(token)
            text = self.engine.detokenize(new)
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
            if len(new) < limit:
                logits = self.engine.decode(token)
        return text
