"""The torch engine: a Hugging Face checkpoint, a dequantized GPTQ checkpoint, or a base with a peft adapter.

Shapes: B rows, T tokens, P shared tokens, S packed tokens, N target positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from edgetune.artifact import MANIFEST
from edgetune.errors import EngineError, UsageError
from edgetune.nf4 import keep_layout, nf4_config
from edgetune.packed import TOKENS, Layout, can_pack, multiple, packed_attention, shared_start
from edgetune.quant_config import is_quantized
from edgetune.runtime.engine import Logits, TokenRow, check_tokens, first_line, greedy

BATCH_TOKENS = 2048  # padded tokens of one forward pass
HEAD_POSITIONS = 256  # positions of one pass through the output head, to bound the float32 logits
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """A causal language model in torch, run greedily with a key/value cache."""

    name = "torch"

    def __init__(
        self, model: Any, path: Path, *, n_ctx: int, device: str, n_threads_before: int, compiled: bool = False
    ) -> None:
        self._causal = (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )  # peft's layers stay inside
        self._prefix = _prefix_of(model)
        self._decoder = self._causal.get_decoder()
        self._step = torch.compile(self._decoder, dynamic=True) if compiled else self._decoder  # prefill and decode
        self._head = self._causal.get_output_embeddings()
        self._config = self._causal.config.get_text_config(decoder=True)
        self._path = path
        self._n_ctx = n_ctx
        self._device = torch.device(device)
        self._n_threads_before = n_threads_before
        self._tokenizer: Any = None
        self._cache: Any = None

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_ctx: int,
        n_threads: int,
        dtype: str = "float32",
        device: str = "cpu",
        adapter: str | None = None,
        quantize_base: bool = False,
        compiled: bool = False,
    ) -> TorchEngine:
        """Load a `model` or `gptq` artifact, or a base folder with a peft adapter folder on it.

        `quantize_base` puts the base in NF4 with double quantization (arXiv:2305.14314) and computes in `dtype`.
        `compiled` runs prefill and decode through torch.compile, which takes its time at the first generation.
        Raises UsageError for an unknown dtype or device and EngineError where the folder cannot be loaded.
        """
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r} for the torch engine; known: {', '.join(DTYPES)}")
        if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {device!r} was asked for and torch sees no CUDA device; use cpu")
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            model = _load_base(path, DTYPES[dtype], device, quantize_base)
            model.generation_config = transformers.GenerationConfig()  # a folder's penalties would not be greedy
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            torch.set_num_threads(before)
            raise EngineError(f"torch cannot load {path}: {first_line(error)}") from error
        model.eval()
        return cls(model, path, n_ctx=n_ctx, device=device, n_threads_before=before, compiled=compiled)

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    @property
    def n_vocab(self) -> int:
        return int(self._config.vocab_size)

    @property
    def weight_bytes(self) -> int:
        tensors = {id(p): p for p in (*self._causal.parameters(), *self._causal.buffers())}
        table = self._causal.get_input_embeddings().weight
        if table is not self._head.weight:
            del tensors[id(table)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def kv_bytes_per_token(self) -> float:
        config = self._config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return float(2 * config.num_hidden_layers * heads * head * self._head.weight.element_size())

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Forget all context, read `ids`, and give the logits of the last position, [V]."""
        logits: Logits = self.prefill_rows([ids])[0]
        return logits

    def decode(self, token: int) -> Logits:
        """Append one token to the context and give its logits, [V]."""
        logits: Logits = self.decode_rows([token])[0]
        return logits

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Forget all rows, read new ones of one length, and give the logits of each one's last position, [B, V]."""
        self._cache = self._fresh_cache(len(rows))
        return self._append([list(ids) for ids in rows])

    def decode_rows(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row and give its logits, [B, V]."""
        assert self._cache is not None, "decode needs a prefill before it"
        return self._append([[token] for token in tokens])

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> Logits:
        """Give the logits of every position of one row, [T, V]."""
        self._check(len(ids), ids)
        hidden = self._states([list(ids)])[0]  # [T, C]
        return np.concatenate([self._logits(part) for part in torch.split(hidden, HEAD_POSITIONS)])

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        """Give, row by row in order, the logits that predict row.target, [N, V].

        Rows run packed, what all of a pass begin with once. Only the hidden states of the target positions are kept;
        the head runs when a row is asked for.
        """
        hidden: dict[int, Tensor] = {}
        self._check(max(len(row.ids) - 1 for row in rows), *(row.ids for row in rows))
        run = self._packed if can_pack(self._causal) and self._prefix is None else self._padded
        for batch in _batches(rows):
            hidden |= zip(batch, run([rows[i] for i in batch]), strict=True)
        for i in range(len(rows)):
            yield np.concatenate([self._logits(part) for part in torch.split(hidden.pop(i), HEAD_POSITIONS)])

    def _packed(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Hidden states [N, C] at the target positions of each row."""
        n_prefix = shared_start([row.ids for row in rows], min(row.start for row in rows) - 1)
        lengths = [len(row.ids) - 1 - n_prefix for row in rows]  # the last id is only a target
        ids = [*rows[0].ids[:n_prefix], *(token for row in rows for token in row.ids[n_prefix:-1])]
        ids += [0] * (multiple(len(ids), TOKENS) - len(ids))
        layout = Layout.of(n_prefix, lengths, self._device, n_tokens=len(ids))
        with packed_attention(self._causal):
            states = self._decoder(
                input_ids=self._tensor([ids]), position_ids=layout.positions(), packed=layout, use_cache=False
            ).last_hidden_state[0, n_prefix:]  # [S - P, C]
        own = torch.split(states[: sum(lengths)], lengths)
        return [part[row.start - 1 - n_prefix :].clone() for part, row in zip(own, rows, strict=True)]

    def _padded(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """The same for a model that cannot be packed: padded on the right, where causal attention never looks."""
        width = max(len(row.ids) for row in rows)
        padded = [[*row.ids[:-1], *[0] * (width - len(row.ids))] for row in rows]
        states = self._states(padded)  # [B, T, C]
        return [part[row.start - 1 : len(row.ids) - 1].clone() for part, row in zip(states, rows, strict=True)]

    @torch.inference_mode()
    def continue_rows(
        self, prompts: Sequence[Sequence[int]], stop: frozenset[int], max_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continue all prompts at once, padded on the left: a token of one row costs as much as one of many."""
        if not prompts:
            return []
        if self._prefix is not None:
            return [greedy(self, prompt, stop, n) for prompt, n in zip(prompts, max_new_tokens, strict=True)]
        pad, longest = min(stop), max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad)
        seen = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, longest - len(prompt) :] = torch.tensor(prompt)
            seen[place, longest - len(prompt) :] = 1
        made = self._causal.generate(
            ids.to(self._device), attention_mask=seen.to(self._device), max_new_tokens=max(max_new_tokens),
            do_sample=False, eos_token_id=sorted(stop), pad_token_id=pad,
        )  # fmt: skip
        rows = []
        for new, limit in zip(made[:, longest:].tolist(), max_new_tokens, strict=True):
            end = next((at + 1 for at, token in enumerate(new) if token in stop), len(new))
            rows.append(new[: min(end, limit)])
        return rows

    def tokenize(self, text: str) -> list[int]:
        """Turn rendered text into ids: special tokens parsed, no BOS added."""
        ids: list[int] = self._own_tokenizer()(text, add_special_tokens=False)["input_ids"]
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._own_tokenizer().decode(list(ids), skip_special_tokens=True))

    def _own_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        return self._tokenizer

    def close(self) -> None:
        self._cache = self._causal = self._decoder = self._step = self._head = None
        torch.set_num_threads(self._n_threads_before)

    def _states(self, ids: list[list[int]]) -> Tensor:
        """Hidden states [B, T, C] of rows of one length, behind the adapter's prefix where it is one."""
        cache = self._fresh_cache(len(ids)) if self._prefix is not None else None
        states: Tensor = self._decoder(
            input_ids=self._tensor(ids), past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        return states

    def _fresh_cache(self, n_rows: int) -> Any:
        """An empty cache, or one that holds the adapter's prefix."""
        if self._prefix is None:
            return transformers.DynamicCache(config=self._config)
        return self._prefix.get_prompt(batch_size=n_rows)

    @torch.inference_mode()
    def _append(self, rows: list[list[int]]) -> Logits:
        n_prefix = self._prefix.active_peft_config.num_virtual_tokens if self._prefix is not None else 0
        self._check(self._cache.get_seq_length() - n_prefix + len(rows[0]), *rows)
        out = self._step(input_ids=self._tensor(rows), past_key_values=self._cache, use_cache=True)
        return self._logits(out.last_hidden_state[:, -1])

    def _logits(self, hidden: Tensor) -> NDArray[np.float32]:
        """Run the output head and what a few architectures put behind it, [.., C] -> [.., V]."""
        logits = self._head(hidden).float()
        if (scale := getattr(self._config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(self._config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(self._config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        array: NDArray[np.float32] = logits.cpu().numpy()
        return array

    def _check(self, n_tokens: int, *rows: Sequence[int]) -> None:
        if not all(rows):
            raise EngineError("torch was asked to read an empty row; give at least one token")
        ids = [token for row in rows for token in row]
        check_tokens(self.name, ids, n_tokens, self._n_ctx, self.n_vocab, self._path)

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


def _prefix_of(model: Any) -> Any:
    """Give the peft model where its adapter is a prefix of keys and values; other adapters live in the layers."""
    return model if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False) else None


def _load_base(path: Path, dtype: torch.dtype, device: str, quantize_base: bool) -> Any:
    """Load the checkpoint of a folder; its manifest, or else its configuration, says whether it is a GPTQ one."""
    manifest = path / MANIFEST
    if manifest.is_file():
        kind = json.loads(manifest.read_text(encoding="utf-8"))["kind"]
    else:
        kind = "gptq" if (path / "config.json").is_file() and is_quantized(path) else "model"
    if kind == "adapter":
        raise UsageError(f"{path} is an adapter; give the base folder as path and this folder as `adapter`")
    if kind == "gptq":
        from edgetune.compress.checkpoint import load_dequantized

        if quantize_base:
            raise UsageError(f"{path} is already a GPTQ checkpoint; quantize_base is for 16-bit bases")
        return load_dequantized(path, dtype).to(device)
    settings: dict[str, Any] = {}
    if quantize_base:
        settings["device_map"] = {"": device}
        settings["quantization_config"] = nf4_config(dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **settings)
    if not quantize_base:
        return model.to(device)
    keep_layout(model)
    return model


def _batches(rows: Sequence[TokenRow]) -> Iterator[list[int]]:
    """Group row numbers, longest first, so that a padded batch stays within BATCH_TOKENS."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    while order:
        n = max(1, BATCH_TOKENS // len(rows[order[0]].ids))
        yield order[:n]
        order = order[n:]
