"""A decoder of the Llama kind as an ONNX graph, its key/value cache as inputs and outputs.

Inputs: `input_ids` and `position_ids` int64 [B, T], `attention_mask` int64 [B, S] (0 where a row is padded),
`past_key_values.N.key` and `.value` [B, K, P, D]. Outputs: `logits` float32 [B, T, V], `present.N.key` and `.value`
[B, K, S, D]. B, T and P are free, P may be 0. It is written in one of two dialects, with the same inputs and outputs:

- fused, opset 23: Attention, RMSNormalization and RotaryEmbedding, for ONNX Runtime;
- plain, opset 21: MatMul, Softmax and their like, for TensorRT's parser.

Shapes: B rows, T new tokens, P past tokens, S = P + T, H query heads, K key/value heads, D head size, C hidden,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from edgetune.export.decoder_layers import FloatLayers, numpy_dtype
from edgetune.export.onnx_file import OnnxFile

MASKED = -3e4  # added to a score: its exponential is 0, float16 holds the sum, and a row of nothing else is finite


class DecoderGraph(ABC):
    """What both dialects share: the way from token ids to logits."""

    opset: int

    def __init__(self, file: OnnxFile, layers: FloatLayers) -> None:
        self.file, self.layers, self.source, self.sizes = file, layers, layers.source, layers.source.sizes
        self.dtype = layers.dtype
        self._masks: dict[int | None, str] = {}

    def write(self) -> None:
        """Append the whole graph and save it. Raises StageError where a weight does not fit into the dtype."""
        file, sizes = self.file, self.sizes
        ids = file.input("input_ids", "INT64", ["batch", "sequence"])
        file.input("attention_mask", "INT64", ["batch", "total"])
        file.input("position_ids", "INT64", ["batch", "sequence"])
        file.output("logits", "FLOAT", ["batch", "sequence", sizes.n_vocab])
        for i in range(sizes.n_layers):
            for part in ("key", "value"):
                shape: list[str | int] = ["batch", sizes.n_kv_heads, "past", sizes.head_size]
                file.input(f"past_key_values.{i}.{part}", self.dtype, shape)
                file.output(f"present.{i}.{part}", self.dtype, [*shape[:2], "total", sizes.head_size])
        self.angles()
        x = self.layers.embed(ids)
        for i in range(sizes.n_layers):
            x = self.block(x, i)
        self.layers.head(self.norm(x, "model.norm", "/model/norm"))
        file.save(self.opset)

    def block(self, x: str, i: int) -> str:
        """One block: attention and a gated multilayer perceptron, each added to what it read."""
        file, layers, module, name = self.file, self.layers, f"model.layers.{i}", f"/model/layers.{i}"
        h = self.norm(x, f"{module}.input_layernorm", f"{name}/input_layernorm")
        q, k, v = (layers.linear(h, f"{module}.self_attn.{part}_proj") for part in "qkv")
        y = self.attention(q, k, v, i)
        x = file.node("Add", f"{name}/attn/Add", [x, layers.linear(y, f"{module}.self_attn.o_proj")])
        h = self.norm(x, f"{module}.post_attention_layernorm", f"{name}/post_attention_layernorm")
        gate, up = (layers.linear(h, f"{module}.mlp.{part}_proj") for part in ("gate", "up"))
        sigmoid = file.node("Sigmoid", f"{name}/mlp/Sigmoid", [gate])
        gate = file.node("Mul", f"{name}/mlp/silu", [gate, sigmoid])
        h = file.node("Mul", f"{name}/mlp/Mul", [gate, up])
        return file.node("Add", f"{name}/mlp/Add", [x, layers.linear(h, f"{module}.mlp.down_proj")])

    def angles(self) -> None:
        """Compute cosine and sine [B, T, D / 2] of each position, in float32, once for all layers."""
        file = self.file
        positions = file.node("Cast", "/rotary/positions", ["position_ids"], to=file.type("FLOAT"))
        positions = file.node("Unsqueeze", "/rotary/Unsqueeze", [positions, self.ints("last", -1)])
        turned = file.node("Mul", "/rotary/Mul", [positions, file.constant("inv_freq", self.source.inv_freq)])
        self.cos, self.sin = (self._angle(op, turned) for op in ("Cos", "Sin"))

    def _angle(self, op: str, turned: str) -> str:
        file, made = self.file, self.file.node(op, f"/rotary/{op}", [turned])
        if self.source.rope_scale != 1.0:
            scale = file.constant("rope_scale", np.array(self.source.rope_scale, np.float32))
            made = file.node("Mul", f"/rotary/{op}/Mul", [made, scale])
        return file.node("Cast", f"/rotary/{op}/Cast", [made], to=file.type(self.dtype))

    def mask(self, window: int | None) -> str:
        """Give what is added to the scores [B, 1, T, S]: a query sees itself and `window` - 1 unpadded keys before."""
        if window in self._masks:
            return self._masks[window]
        file, name = self.file, f"/mask{'' if window is None else f'/window{window}'}"
        total = file.node("Shape", f"{name}/total", ["attention_mask"], start=1, end=2)
        new = file.node("Shape", f"{name}/new", ["input_ids"], start=1, end=2)
        past = file.node("Sub", f"{name}/past", [total, new])
        scalar, one = self.ints("first", 0), file.constant("one", np.array(1, np.int64))
        zero = file.constant("zero", np.array(0, np.int64))
        stop = file.node("Squeeze", f"{name}/stop", [total, scalar])
        start = file.node("Squeeze", f"{name}/start", [past, scalar])
        keys = file.node("Range", f"{name}/keys", [zero, stop, one])  # [S]
        queries = file.node("Range", f"{name}/queries", [start, stop, one])
        queries = file.node("Unsqueeze", f"{name}/column", [queries, self.ints("last", -1)])  # [T, 1]
        seen = file.node("LessOrEqual", f"{name}/causal", [keys, queries])  # [T, S]
        if window is not None:
            distance = file.node("Sub", f"{name}/distance", [queries, keys])
            near = file.node("Less", f"{name}/near", [distance, file.constant(f"window{window}", np.array(window))])
            seen = file.node("And", f"{name}/windowed", [seen, near])
        real = file.node("Cast", f"{name}/real", ["attention_mask"], to=file.type("BOOL"))
        real = file.node("Unsqueeze", f"{name}/rows", [real, self.ints("inner", 1, 2)])  # [B, 1, 1, S]
        seen = file.node("And", f"{name}/And", [seen, real])
        dtype = numpy_dtype(self.dtype)
        added = [file.constant("seen", np.array(0, dtype)), file.constant("masked", np.array(MASKED, dtype))]
        self._masks[window] = file.node("Where", f"{name}/Where", [seen, *added])
        return self._masks[window]

    def ints(self, name: str, *values: int) -> str:
        return self.file.constant(name, np.array(values, np.int64))

    @abstractmethod
    def norm(self, x: str, module: str, name: str) -> str:
        """Divide by the root mean square of the last axis and multiply by the weight of `module`."""

    @abstractmethod
    def attention(self, q: str, k: str, v: str, i: int) -> str:
        """Rotate [B, T, heads * D], append keys and values to the cache of layer `i`, attend; gives [B, T, H * D]."""

    def head_norm(self, x: str, i: int, part: str) -> str:
        """Normalize each head of [B, T, heads, D], in the families that do."""
        module = f"model.layers.{i}.self_attn.{part}_norm"
        return self.norm(x, module, f"/model/layers.{i}/attn/{part}_norm") if self.has_head_norm(i, part) else x

    def has_head_norm(self, i: int, part: str) -> bool:
        return f"model.layers.{i}.self_attn.{part}_norm.weight" in self.source.names


class FusedGraph(DecoderGraph):
    """One operator for each of norm, rotation and attention."""

    opset = 23

    def norm(self, x: str, module: str, name: str) -> str:
        weight = self.layers.weight(f"{module}.weight")
        return self.file.node("RMSNormalization", name, [x, weight], axis=-1, epsilon=self.sizes.eps)

    def attention(self, q: str, k: str, v: str, i: int) -> str:
        sizes, name = self.sizes, f"/model/layers.{i}/attn"
        q = self._rotate(q, i, "q", sizes.n_heads)
        k = self._rotate(k, i, "k", sizes.n_kv_heads)
        cache = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        made = [f"{name}/out", *(f"present.{i}.{part}" for part in ("key", "value"))]
        return self.file.node(
            "Attention", f"{name}/Attention", [q, k, v, self.mask(sizes.windows[i]), *cache], made,
            q_num_heads=sizes.n_heads, kv_num_heads=sizes.n_kv_heads, scale=sizes.head_size**-0.5,
        )  # fmt: skip

    def _rotate(self, x: str, i: int, part: str, n_heads: int) -> str:
        file, name = self.file, f"/model/layers.{i}/attn/{part}"
        if self.has_head_norm(i, part):
            heads = self.ints(f"{part}_heads", 0, 0, n_heads, self.sizes.head_size)
            x = self.head_norm(file.node("Reshape", f"{name}/heads", [x, heads]), i, part)
            flat = self.ints(f"{part}_flat", 0, 0, n_heads * self.sizes.head_size)
            x = file.node("Reshape", f"{name}/flat", [x, flat])
        return file.node("RotaryEmbedding", f"{name}/RotaryEmbedding", [x, self.cos, self.sin], num_heads=n_heads)


class PlainGraph(DecoderGraph):
    """Elementwise operators and products. A group of query heads shares its key head by broadcasting."""

    opset = 21  # the first whose DequantizeLinear reads blocks of int4

    def norm(self, x: str, module: str, name: str) -> str:
        file = self.file
        wide = file.node("Cast", f"{name}/float", [x], to=file.type("FLOAT"))
        square = file.node("Mul", f"{name}/square", [wide, wide])
        mean = file.node("ReduceMean", f"{name}/ReduceMean", [square, self.ints("last", -1)])
        mean = file.node("Add", f"{name}/Add", [mean, file.constant("eps", np.array(self.sizes.eps, np.float32))])
        root = file.node("Sqrt", f"{name}/Sqrt", [mean])
        unit = file.node("Div", f"{name}/Div", [wide, root])
        unit = file.node("Cast", f"{name}/Cast", [unit], to=file.type(self.dtype))
        return file.node("Mul", f"{name}/Mul", [unit, self.layers.weight(f"{module}.weight")])

    def angles(self) -> None:
        super().angles()
        axis = self.ints("heads_axis", 1)  # [B, 1, T, D / 2], the same for all heads
        self.cos, self.sin = (self.file.node("Unsqueeze", f"{n}/heads", [n, axis]) for n in (self.cos, self.sin))

    def attention(self, q: str, k: str, v: str, i: int) -> str:
        file, sizes, name = self.file, self.sizes, f"/model/layers.{i}/attn"
        H, K, D = sizes.n_heads, sizes.n_kv_heads, sizes.head_size
        q = self._rotate(self._heads(q, i, "q", H), f"{name}/q")
        k = self._rotate(self._heads(k, i, "k", K), f"{name}/k")
        v = self._heads(v, i, "v", K)
        for part, new in (("key", k), ("value", v)):
            file.node("Concat", f"{name}/{part}", [f"past_key_values.{i}.{part}", new], [f"present.{i}.{part}"], axis=2)
        scale = file.constant("scale", np.array(D**-0.5, numpy_dtype(self.dtype)))
        q = file.node("Mul", f"{name}/scale", [q, scale])
        q = file.node("Reshape", f"{name}/groups", [q, self.ints("groups", 0, K, H // K, -1, D)])  # [B, K, H / K, T, D]
        axis = self.ints("groups_axis", 2)
        keys, values = (
            file.node("Unsqueeze", f"{name}/{part}/Unsqueeze", [f"present.{i}.{part}", axis])
            for part in ("key", "value")
        )  # [B, K, 1, S, D]
        keys = file.node("Transpose", f"{name}/key/Transpose", [keys], perm=[0, 1, 2, 4, 3])
        scores = file.node("MatMul", f"{name}/scores", [q, keys])  # [B, K, H / K, T, S]
        mask = self.mask(sizes.windows[i])
        scores = file.node("Add", f"{name}/masked", [scores, self._grouped(mask)])
        shares = file.node("Softmax", f"{name}/Softmax", [scores], axis=-1)
        y = file.node("MatMul", f"{name}/values", [shares, values])
        y = file.node("Reshape", f"{name}/ungroup", [y, self.ints("ungrouped", 0, H, -1, D)])
        y = file.node("Transpose", f"{name}/Transpose", [y], perm=[0, 2, 1, 3])
        return file.node("Reshape", f"{name}/Reshape", [y, self.ints("flat", 0, 0, H * D)])

    def _grouped(self, mask: str) -> str:
        made = f"{mask}/grouped"
        if not self.file.made(made):
            self.file.node("Unsqueeze", made, [mask, self.ints("heads_axis", 1)], [made])
        return made

    def _heads(self, x: str, i: int, part: str, n_heads: int) -> str:
        file, name = self.file, f"/model/layers.{i}/attn/{part}"
        shape = self.ints(f"{n_heads}_heads", 0, 0, n_heads, self.sizes.head_size)
        x = self.head_norm(file.node("Reshape", f"{name}/heads", [x, shape]), i, part)
        return file.node("Transpose", f"{name}/Transpose", [x], perm=[0, 2, 1, 3])  # [B, heads, T, D]

    def _rotate(self, x: str, name: str) -> str:
        """Rotate the two halves of each head."""
        file = self.file
        left, right = f"{name}/left", f"{name}/right"
        file.node("Split", f"{name}/Split", [x], [left, right], axis=-1, num_outputs=2)
        parts = {
            half + angle: file.node("Mul", f"{half}/{angle}", [half, {"cos": self.cos, "sin": self.sin}[angle]])
            for half in (left, right) for angle in ("cos", "sin")
        }  # fmt: skip
        real = file.node("Sub", f"{name}/real", [parts[f"{left}cos"], parts[f"{right}sin"]])
        imaginary = file.node("Add", f"{name}/imaginary", [parts[f"{right}cos"], parts[f"{left}sin"]])
        return file.node("Concat", f"{name}/Concat", [real, imaginary], axis=-1)
