"""llama.cpp's own converter as an oracle: every tensor, and every key but those named, is the same as ours.

Needs the source distribution of the llama-cpp-python that is installed, where `python benchmarks/peers.py` puts it. It
runs in a process of its own with its own gguf package; torch, transformers and numpy are those of this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.export import gguf
from tests.export.test_gguf_families import MODELS, export, make

reader = pytest.importorskip("gguf").GGUFReader
ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune" / "peers"
SOURCE = CACHE / f"llama_cpp_python-{metadata.version('llama-cpp-python')}" / "vendor" / "llama.cpp"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "conversion").is_dir(), reason="needs `python benchmarks/peers.py` first"),
]

# It knows a pre-tokenizer by a digest of real tokenizers' output, and some families by SentencePiece's file; a random
# model has neither, and its tokenizer is byte-level in all of them.
CONVERT = """
import importlib.util, json, runpy, sys
from importlib.machinery import ModuleSpec
nothing = importlib.util.module_from_spec(ModuleSpec("sentencepiece", None))
nothing.SentencePieceProcessor = None
import transformers  # looks for sentencepiece, and shall not find this one
sys.modules["sentencepiece"] = nothing
import conversion
from conversion import gemma, phi
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
if sys.argv.pop() == "raw":
    ModelBase.load_hparams = staticmethod(lambda folder, *_: json.loads((folder / "config.json").read_bytes()))
for one in (gemma.Gemma2Model, phi.Phi3MiniModel):
    one.set_vocab = lambda self: self._set_vocab_gpt2()
sys.argv[0] = "convert"
runpy.run_path(sys.argv.pop(), run_name="__main__")
"""
OLDER_KEYS = {  # which it reads, and Transformers 5 no longer writes
    "gpt2": {"n_ctx": 512},
    "gptneox": {"rotary_pct": 0.25},
    "gptneox one after the other": {"rotary_pct": 0.25},
}
OTHERWISE = {  # what ours says otherwise, and why
    "general.",  # names, sizes and dates that no runtime reads
    "GGUF.",  # counts of keys and tensors
    "tokenizer.ggml.pre",  # which it tells by a digest of real tokenizers' output
    "tokenizer.ggml.add_bos_token",  # a rendered conversation is whole, no runtime may add to it
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.token_type",  # ids that the vocabulary does not reach: UNUSED in both, added ones by their flag
    "quantize.",
}


def upstream(model: Path, out: Path, more: dict[str, Any]) -> Any:
    copy = shutil.copytree(model, out / "theirs")
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | more))
    arguments = [copy, "--outtype", "f32", "--outfile", out / "theirs.gguf", SOURCE / "convert_hf_to_gguf.py"]
    arguments.append("raw" if more else "read")  # by Transformers, which leaves older keys out
    run_theirs([sys.executable, "-c", CONVERT, *map(str, arguments)])
    return reader(out / "theirs.gguf")


def run_theirs(command: list[str]) -> None:
    paths = {"PYTHONPATH": f"{SOURCE}:{SOURCE / 'gguf-py'}"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | paths
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_keys_are_upstreams(tmp_path: Path, name: str) -> None:
    source = make(tmp_path / "model", name, **({"vocab_size": 327} if name == "gemma3" else {}))  # it cuts what is left
    ours = reader(export(source, tmp_path / "out").path / gguf.FILE)
    hold(ours, upstream(source.path, tmp_path, OLDER_KEYS.get(name, {})), OTHERWISE)


def hold(ours: Any, theirs: Any, otherwise: Collection[str]) -> None:
    """Compare all tensors, and all of their keys but those that begin as named."""
    mine, other = ({tensor.name: tensor for tensor in file.tensors} for file in (ours, theirs))
    assert mine.keys() == other.keys()
    for tensor in other:
        assert mine[tensor].tensor_type == other[tensor].tensor_type, tensor
        np.testing.assert_array_equal(mine[tensor].data, other[tensor].data, err_msg=tensor)
    for key, field in theirs.fields.items():
        if not key.startswith(tuple(otherwise)):
            assert key in ours.fields, key
            assert ours.fields[key].contents() == field.contents(), key
