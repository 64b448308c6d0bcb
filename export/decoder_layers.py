"""How the linear layers, the embedding and the head of a decoder are written into an ONNX graph.

`FloatLayers` as they are, `AdaptedLayers` with room for a LoRA adapter; `NBitsLayers` as integers that ONNX Runtime
multiplies (MatMulNBits); `BlockLayers` as int4 that a DequantizeLinear reads in blocks, which is what TensorRT takes.
None rounds a layer that the checkpoint has in integers. Shapes: R out-features, C in-features, G groups of n columns,
V vocabulary.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import StageError, UnsupportedError
from edgetune.export.decoder_source import Source
from edgetune.export.onnx_file import OnnxFile

Dtype = Literal["FLOAT", "FLOAT16"]
EMBEDDING, POSITIONS, HEAD = "model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"
HEAD_BITS, HEAD_BLOCK = 8, 32  # of embedding and head beside integers; columns that share a scale


class FloatLayers:
    """Every matrix in the graph's own dtype. A tied head is the embedding, transposed by the product."""

    def __init__(self, file: OnnxFile, source: Source, dtype: Dtype) -> None:
        self.file, self.source, self.dtype = file, source, dtype

    def array(self, name: str, offset: float = 0.0) -> NDArray[Any]:
        """Read a weight, plus `offset`, in the graph's dtype. Raises StageError where it does not fit."""
        found = self.source.get(name).float().numpy() + np.float32(offset)
        with np.errstate(over="ignore"):
            array: NDArray[Any] = found.astype(numpy_dtype(self.dtype))
        if not np.isfinite(array).all():
            raise StageError(f"{name} holds values beyond float16; use precision fp32")
        return array

    def weight(self, name: str, offset: float = 0.0) -> str:
        """Give the name of a stored weight, plus `offset`, written when it is first asked for."""
        return name if self.file.stored(name) else self.file.weight(name, self.array(name, offset))

    def linear(self, x: str, module: str) -> str:
        """Multiply, and add the bias where the layer has one."""
        made = self.product(x, module, node_name(module))
        if f"{module}.bias" in self.source.names:
            made = self.file.node("Add", f"{node_name(module)}/Add", [made, self.weight(f"{module}.bias")])
        return made

    def product(self, x: str, module: str, name: str) -> str:
        stored = self.file.weight(f"{module}.weight", self.array(f"{module}.weight").T)
        return self.file.node("MatMul", f"{name}/MatMul", [x, stored])

    def embed(self, ids: str) -> str:
        return self.file.node("Gather", "/model/embed_tokens/Gather", [self.weight(EMBEDDING), ids])

    def head(self, x: str, out: str) -> str:
        """Give float32 logits [B, T, V], called `out`."""
        file, hidden = self.file, self.source.sizes.hidden
        rows = file.node("Reshape", "/lm_head/rows", [x, file.constant("rows", np.array([-1, hidden]))])
        stored = self.weight(EMBEDDING if self.source.tied else HEAD)  # [V, C]
        logits = file.node("Gemm", "/lm_head/Gemm", [rows, stored], transB=1)
        shape = file.node("Shape", "/lm_head/lengths", [x], end=2)
        vocabulary = file.constant("vocabulary", np.array([self.source.sizes.n_vocab]))
        shape = file.node("Concat", "/lm_head/shape", [shape, vocabulary], axis=0)
        logits = file.node("Cast", "/lm_head/Cast", [logits], to=file.type("FLOAT"))
        return file.node("Reshape", "/lm_head/Reshape", [logits, shape], [out])


class AdaptedLayers(FloatLayers):
    """Each linear layer of a block also adds (x A) B, factors [C, r] and [r, R] that a run may give; none is r = 0."""

    def product(self, x: str, module: str, name: str) -> str:
        file, weight = self.file, self.array(f"{module}.weight")
        made = file.node("MatMul", f"{name}/MatMul", [x, file.weight(f"{module}.weight", weight.T)])
        (R, C), rank = weight.shape, f"{module}.rank"  # of each layer: an adapter need not have all
        empty = np.empty((0, 0), weight.dtype)
        A = file.optional(lora_input(module, "A"), self.dtype, [C, rank], empty.reshape(C, 0))
        B = file.optional(lora_input(module, "B"), self.dtype, [rank, R], empty.reshape(0, R))
        low = file.node("MatMul", f"{name}/lora_A/MatMul", [x, A])
        added = file.node("MatMul", f"{name}/lora_B/MatMul", [low, B])
        return file.node("Add", f"{name}/lora/Add", [made, added])


class NBitsLayers(FloatLayers):
    """The checkpoint's integers as MatMulNBits; embedding and head rounded to 8 bits in blocks, one table if tied."""

    def __init__(self, file: OnnxFile, source: Source, dtype: Dtype, accuracy_level: int) -> None:
        super().__init__(file, source, dtype)
        self.accuracy_level = accuracy_level

    def product(self, x: str, module: str, name: str) -> str:
        layer = self.source.quantized[module]
        (R, C), bits = layer.q.shape, self.source.bits[module]
        n = C // layer.scales.shape[1]
        q = layer.q.numpy()
        packed = q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4  # low bits first
        inputs = [x, self.file.weight(f"{module}.qweight", packed.reshape(R, C // n, n * bits // 8)),
                  self._scales(f"{module}.scales", layer.scales.float().numpy())]  # fmt: skip
        zero = layer.zero_point.numpy().astype(np.uint8)  # [R, G]
        if (zero != 2 ** (bits - 1)).any():
            inputs.append(self.file.weight(f"{module}.qzeros", zero if bits == 8 else _pack_rows(zero)))
        made = self._multiply(f"{name}/MatMulNBits", inputs, C, R, bits, n)
        return self._corrected(made, x, module, name) if module in self.source.corrections else made

    def _corrected(self, made: str, x: str, module: str, name: str) -> str:
        """Add B (A x), what the checkpoint has beside its integers."""
        for part, factor in zip("AB", self.source.corrections[module], strict=True):
            array = factor.float().numpy().T.astype(numpy_dtype(self.dtype))
            stored = self.file.weight(f"{module}.correction_{part}", array)
            x = self.file.node("MatMul", f"{name}/correction_{part}/MatMul", [x, stored])
        return self.file.node("Add", f"{name}/correction/Add", [made, x])

    def embed(self, ids: str) -> str:
        """Look up codes and scales of each token and multiply them: float [B, T, C]."""
        file, name, hidden = self.file, "/model/embed_tokens", self.source.sizes.hidden
        codes, scales = self._table(EMBEDDING)
        found = file.node("Gather", f"{name}/codes", [codes, ids])  # [B, T, G, n]
        found = file.node("Cast", f"{name}/Cast", [found], to=file.type(self.dtype))
        middle = file.constant("middle", np.array(2 ** (HEAD_BITS - 1), numpy_dtype(self.dtype)))
        found = file.node("Sub", f"{name}/Sub", [found, middle])
        grid = file.node("Gather", f"{name}/scales", [scales, ids])  # [B, T, G]
        grid = file.node("Unsqueeze", f"{name}/Unsqueeze", [grid, file.constant("last", np.array([-1]))])
        found = file.node("Mul", f"{name}/Mul", [found, grid])
        return file.node("Reshape", f"{name}/Reshape", [found, file.constant("embedded", np.array([0, 0, hidden]))])

    def head(self, x: str, out: str) -> str:
        codes, scales = self._table(EMBEDDING if self.source.tied else HEAD)
        sizes = self.source.sizes
        last = self.dtype == "FLOAT"
        made = self._multiply("/lm_head/MatMulNBits", [x, codes, scales], sizes.hidden, sizes.n_vocab, HEAD_BITS,
                              HEAD_BLOCK, [out] if last else None)  # fmt: skip
        return made if last else self.file.node("Cast", "/lm_head/Cast", [made], [out], to=self.file.type("FLOAT"))

    def _table(self, name: str) -> tuple[str, str]:
        """Round a table of the vocabulary to 8 bits; give the names of codes [V, G, n] and scales [V, G]."""
        from edgetune.compress.rtn import rtn_quantize
        from edgetune.compress.scheme import Scheme

        codes, scales = f"{name}.codes", f"{name}.scales"
        if not self.file.stored(codes):
            rounded = rtn_quantize(self.source.get(name).float(), Scheme(HEAD_BITS, HEAD_BLOCK, sym=True))
            V, C = rounded.q.shape
            self.file.weight(codes, rounded.q.numpy().reshape(V, C // HEAD_BLOCK, HEAD_BLOCK))
            self._scales(scales, rounded.scales.float().numpy())
        return codes, scales

    def _scales(self, name: str, scales: NDArray[np.float32]) -> str:
        return self.file.weight(name, scales.astype(numpy_dtype(self.dtype)))

    def _multiply(self, name: str, inputs: list[str], C: int, R: int, bits: int, n: int,
                  out: list[str] | None = None) -> str:  # fmt: skip
        return self.file.node(
            "MatMulNBits", name, inputs, out, domain="com.microsoft", K=C, N=R, bits=bits, block_size=n,
            accuracy_level=self.accuracy_level,
        )  # fmt: skip


class BlockLayers(FloatLayers):
    """The checkpoint's integers as int4 [C, R] and a DequantizeLinear with a scale for each n rows of a column."""

    def product(self, x: str, module: str, name: str) -> str:
        layer = self.source.quantized[module]
        (R, C), G = layer.q.shape, layer.scales.shape[1]
        if bool((layer.zero_point != 8).any()) or self.source.bits[module] != 4:
            raise UnsupportedError(f"{module} is not symmetric int4, as TensorRT's blocks are; use bits: 4, sym: true")
        codes = layer.q.numpy().T ^ 8  # [C, R]: the low four bits of q - 8
        flat = np.ascontiguousarray(codes).reshape(-1)
        stored = self.file.weight(f"{module}.int4", flat[0::2] | flat[1::2] << 4, "INT4", [C, R])
        scales = self.file.weight(f"{module}.scales", layer.scales.numpy().T.astype(numpy_dtype(self.dtype)))
        weight = self.file.node("DequantizeLinear", f"{name}/DequantizeLinear", [stored, scales], axis=0,
                                block_size=C // G)  # fmt: skip
        return self.file.node("MatMul", f"{name}/MatMul", [x, weight])


def lora_input(module: str, factor: Literal["A", "B"]) -> str:
    """Name the input that takes a factor of a LoRA adapter."""
    return f"{module}.lora_{factor}.weight"


def node_name(module: str) -> str:
    """Name a node after its layer, as the genai builder does: /model/layers.0/attn/q_proj."""
    return "/" + re.sub(r"^model\.(layers\.\d+)\.(?:self_)?(\w+)\.", r"model/\1/\2/", module)


def _pack_rows(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack 4-bit values [R, G] two to a byte, each row padded to a whole one."""
    padded = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    packed: NDArray[np.uint8] = padded[:, 0::2] | padded[:, 1::2] << np.uint8(4)
    return packed


def numpy_dtype(dtype: Dtype) -> Any:
    """Give numpy's name of a dtype."""
    return np.float32 if dtype == "FLOAT" else np.float16
