"""Our engines as a model of lm-eval, so that its tasks judge the file that ships, in its own runtime.

    model = LmEvalModel("runs/NAME/candidates/q4-gguf")  # or any .gguf file, ONNX, GPTQ or Hugging Face folder
    lm_eval.simple_evaluate(model=model, tasks=[...])

lm-eval ships no data; docs/accuracy.md shows a task over a local file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edgetune.backends import require
from edgetune.data.contract import declared_stop_ids
from edgetune.data.golden import FILE, Golden
from edgetune.data.prompt import render_chat
from edgetune.errors import UsageError
from edgetune.found import find
from edgetune.runtime.accuracy import score_row
from edgetune.runtime.engine import TokenRow, first_line, load_engine

require("lm_eval")
from lm_eval.api.model import TemplateLM  # noqa: E402 - after the door
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

MAX_NEW_TOKENS = 256  # where a task does not say


class LmEvalModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Any file or folder that an engine runs. Greedy: a task that samples is refused."""

    def __init__(
        self, path: str | Path, *, engine: str | None = None, n_ctx: int = 2048, n_threads: int = 2, **settings: object
    ) -> None:
        """Load it in `engine`, else in the one that ships its kind. `settings` go to the engine.

        Raises UsageError where that engine does not run it, ArtifactError and EngineError.
        """
        super().__init__()
        found = find(Path(path))
        if engine is not None and engine not in found.engines:
            raise UsageError(f"{path} is of kind {found.kind!r}, which runs in {' and '.join(found.engines)}")
        job = found.job(Path(path).name, engine or found.engines[0], n_threads=n_threads, **settings)
        self._digest, self._n_ctx = found.digest, n_ctx
        self.engine = load_engine(job.engine, job.path, n_ctx=n_ctx, n_threads=n_threads, **job.settings)
        self._golden = _golden(Path(path), found.kind, self.engine)

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
        if limit >= self._n_ctx:
            raise UsageError(
                f"max_gen_toks={limit} leaves no room for a prompt in n_ctx={self._n_ctx}; raise n_ctx or lower it"
            )
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


def _golden(path: Path, kind: str, engine: Any) -> Golden:
    """Give stop tokens and chat template of an artifact, or what the files of something else say of them."""
    if path.is_dir() and (path / FILE).is_file():
        return Golden.read(path)
    if kind == "gguf":
        eos, ends, template, special = engine.eos_id, engine.stop_ids, engine.chat_template, engine.special_tokens
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} holds no tokenizer that Transformers reads: {first_line(error)}") from error
        ends = engine.stop_ids if kind == "onnx" else declared_stop_ids(path)
        eos = tokenizer.eos_token_id
        template = str(tokenizer.chat_template or "")
        special = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    stop = [token for token in dict.fromkeys([eos, *sorted(ends)]) if token is not None]  # the first begins texts too
    if not stop:
        raise UsageError(f"{path} names no token that ends an answer; give one as eos_token")
    return Golden(
        conversations=[], texts=[], stop_ids=stop, bos_id=None, n_bos=0, chat_template=template,
        special_tokens=special,
    )  # fmt: skip
