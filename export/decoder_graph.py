"""A decoder as an ONNX graph, its key/value cache as inputs and outputs.

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
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetune.export.decoder_layers import POSITIONS, Dtype, FloatLayers, numpy_dtype
from edgetune.export.decoder_source import FULL, Rotation
from edgetune.export.onnx_file import OnnxFile

MASKED = -3e4  # added to a score: its exponential is 0, float16 holds the sum, and a row of nothing else is finite


class DecoderGraph(ABC):
    """What both dialects share: the way from token ids to logits."""

    opset: int

    def __init__(self, file: OnnxFile, layers: FloatLayers) -> None:
        self.file, self.layers, self.source, self.sizes = file, layers, layers.source, layers.source.sizes
        self.dtype, self.family, self.scales = layers.dtype, layers.source.family, layers.source.scales
        self.cos: dict[str, str] = {}  # of each kind of layer
        self.sin: dict[str, str] = {}
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
        x = self.scaled(self.layers.embed(ids), self.scales.embedding, "/model/embed_tokens/scaled")
        if self.family.positions:
            placed = file.node(
                "Gather", "/model/embed_positions/Gather", [self.layers.weight(POSITIONS), "position_ids"]
            )
            x = file.node("Add", "/model/embed_positions/Add", [x, placed])
        for i in range(sizes.n_layers):
            x = self.block(x, i)
        self._logits(self.norm(x, "model.norm", "/model/norm"))
        file.save(self.opset)

    def _logits(self, x: str) -> None:
        scales = self.scales
        rest = [scales.logits != 1.0, bool(scales.logit_cap)]  # what is still to be done before they are "logits"
        x = self.layers.head(x, "/lm_head/out" if any(rest) else "logits")
        if rest[0]:
            factor = self.file.constant("logit_scale", np.array(scales.logits, np.float32))
            x = self.file.node("Mul", "/lm_head/scaled", [x, factor], ["/lm_head/scaled/out" if rest[1] else "logits"])
        if scales.logit_cap:
            self.capped(x, scales.logit_cap, "/lm_head/cap", "FLOAT", ["logits"])

    def scaled(self, x: str, factor: float, name: str) -> str:
        """Multiply by a number of the family, where it is not 1."""
        if factor == 1.0:
            return x
        stored = self.file.constant(f"times {factor:.9g}", np.array(factor, numpy_dtype(self.dtype)))
        return self.file.node("Mul", name, [x, stored])

    def capped(self, x: str, cap: float, name: str, dtype: Dtype, out: list[str] | None = None) -> str:
        """Give cap * tanh(x / cap)."""
        stored = self.file.constant(f"{dtype} cap {cap:.9g}", np.array(cap, numpy_dtype(dtype)))
        x = self.file.node("Div", f"{name}/Div", [x, stored])
        x = self.file.node("Tanh", f"{name}/Tanh", [x])
        return self.file.node("Mul", f"{name}/Mul", [x, stored], out)

    def block(self, x: str, i: int) -> str:
        """One block: what attention and a multilayer perceptron give is added to what the block read."""
        layers, norms, module, name = self.layers, self.family.norms, f"model.layers.{i}", f"/model/layers.{i}"
        h = self.norm(x, f"{module}.{norms.before_attention}", f"{name}/{norms.before_attention}")
        q, k, v = self._projections(h, i)
        y = self.attention(q, k, v, i)
        h = layers.linear(y, f"{module}.self_attn.o_proj")
        attended = self._added(x, h, i, norms.after_attention, "attn")
        h = self.norm(
            x if self.source.parallel else attended, f"{module}.{norms.before_mlp}", f"{name}/{norms.before_mlp}"
        )
        h = self._perceptron(h, i)
        return self._added(attended, layers.linear(h, f"{module}.mlp.down_proj"), i, norms.after_mlp, "mlp")

    def _perceptron(self, x: str, i: int) -> str:
        """What the down projection reads."""
        linear, module, name = self.layers.linear, f"model.layers.{i}.mlp", f"/model/layers.{i}/mlp"
        if not self.family.gated:
            return self.activated(linear(x, f"{module}.up_proj"), name)
        if self.family.joint:
            gate, up = self._parts(linear(x, f"{module}.gate_up_proj"), name, ("gate", "up"))
        else:
            gate, up = (linear(x, f"{module}.{part}_proj") for part in ("gate", "up"))
        return self.file.node("Mul", f"{name}/Mul", [self.activated(gate, name), up])

    def _projections(self, x: str, i: int) -> list[str]:
        """Queries [B, T, H * D], keys and values [B, T, K * D]."""
        module, sizes = f"model.layers.{i}.self_attn", self.sizes
        if not self.family.joint:
            return [self.layers.linear(x, f"{module}.{part}_proj") for part in "qkv"]
        widths = self.ints("qkv", *(n * sizes.head_size for n in (sizes.n_heads, *2 * [sizes.n_kv_heads])))
        return self._parts(self.layers.linear(x, f"{module}.qkv_proj"), f"/model/layers.{i}/attn", "qkv", widths)

    def _parts(self, x: str, name: str, parts: Sequence[str], widths: str | None = None) -> list[str]:
        made = [f"{name}/{part}_proj/out" for part in parts]
        equal: dict[str, Any] = {} if widths else {"num_outputs": len(parts)}
        self.file.node("Split", f"{name}/Split", [x, *([widths] if widths else [])], made, axis=-1, **equal)
        return made

    def _added(self, x: str, h: str, i: int, norm: str | None, part: str) -> str:
        """Add what attention or multilayer perceptron gave to what the block carries on."""
        name = f"/model/layers.{i}"
        if norm is not None:
            h = self.norm(h, f"model.layers.{i}.{norm}", f"{name}/{norm}")
        h = self.scaled(h, self.scales.residual, f"{name}/{part}/scaled")
        return self.file.node("Add", f"{name}/{part}/Add", [x, h])

    def activated(self, x: str, name: str) -> str:
        """Apply the family's activation."""
        if self.family.activation != "silu":
            return self.gelu(x, f"{name}/gelu", exact=self.family.activation == "gelu")
        sigmoid = self.file.node("Sigmoid", f"{name}/Sigmoid", [x])
        return self.file.node("Mul", f"{name}/silu", [x, sigmoid])

    def angles(self) -> None:
        """Compute cosine and sine [B, T, rotated / 2] of each position, in float32, once for all layers of a kind."""
        file = self.file
        positions = file.node("Cast", "/rotary/positions", ["position_ids"], to=file.type("FLOAT"))
        positions = file.node("Unsqueeze", "/rotary/Unsqueeze", [positions, self.ints("last", -1)])
        for kind, rotation in self.source.rotations.items():
            name = "/rotary" if kind == FULL else f"/rotary/{kind}"
            frequencies = file.constant("inv_freq" if kind == FULL else f"inv_freq {kind}", rotation.inv_freq)
            turned = file.node("Mul", f"{name}/Mul", [positions, frequencies])
            self.cos[kind], self.sin[kind] = (self._angle(op, turned, name, rotation) for op in ("Cos", "Sin"))

    def _angle(self, op: str, turned: str, name: str, rotation: Rotation) -> str:
        file, made = self.file, self.file.node(op, f"{name}/{op}", [turned])
        if rotation.scale != 1.0:
            scale = file.constant(f"{name}/scale", np.array(rotation.scale, np.float32))
            made = file.node("Mul", f"{name}/{op}/Mul", [made, scale])
        return file.node("Cast", f"{name}/{op}/Cast", [made], to=file.type(self.dtype))

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
        """Divide by the root mean square of the last axis and multiply by the weight of `module`.

        A `layer_norm` takes the mean off before, and adds the bias of `module`.
        """

    @abstractmethod
    def gelu(self, x: str, name: str, *, exact: bool) -> str:
        """Apply GELU (arXiv:1606.08415), where it need not be exact in its form with tanh."""

    @abstractmethod
    def attention(self, q: str, k: str, v: str, i: int) -> str:
        """Rotate [B, T, heads * D], append keys and values to the cache of layer `i`, attend; gives [B, T, H * D]."""

    def norm_weight(self, module: str) -> str:
        return self.layers.weight(f"{module}.weight", self.family.norm_offset)

    @property
    def score_scale(self) -> float:
        return self.sizes.head_size**-0.5 if self.scales.scores is None else self.scales.scores

    def by_head(self, x: str, name: str, n_heads: int) -> str:
        """Reshape [B, T, heads * D] to [B, T, heads, D]."""
        return self.file.node("Reshape", name, [x, self.ints(f"{n_heads}_heads", 0, 0, n_heads, self.sizes.head_size)])

    def heads_first(self, x: str, name: str) -> str:
        """Transpose [B, T, heads, D] to [B, heads, T, D]."""
        return self.file.node("Transpose", name, [x], perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, i: int) -> str:
        """Attend in single operators: [B, heads, T, D], rotated; a group of query heads shares its key head."""
        file, sizes, name = self.file, self.sizes, f"/model/layers.{i}/attn"
        H, K, D = sizes.n_heads, sizes.n_kv_heads, sizes.head_size
        for part, new in (("key", k), ("value", v)):
            file.node("Concat", f"{name}/{part}", [f"past_key_values.{i}.{part}", new], [f"present.{i}.{part}"], axis=2)
        scale = file.constant("scale", np.array(self.score_scale, numpy_dtype(self.dtype)))
        q = file.node("Mul", f"{name}/scale", [q, scale])
        q = file.node("Reshape", f"{name}/groups", [q, self.ints("groups", 0, K, H // K, -1, D)])  # [B, K, H / K, T, D]
        axis = self.ints("groups_axis", 2)
        keys, values = (
            file.node("Unsqueeze", f"{name}/{part}/Unsqueeze", [f"present.{i}.{part}", axis])
            for part in ("key", "value")
        )  # [B, K, 1, S, D]
        keys = file.node("Transpose", f"{name}/key/Transpose", [keys], perm=[0, 1, 2, 4, 3])
        scores = file.node("MatMul", f"{name}/scores", [q, keys])  # [B, K, H / K, T, S]
        if self.scales.score_cap:  # before the mask, which a cap would let through
            scores = self.capped(scores, self.scales.score_cap, f"{name}/cap", self.dtype)
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

    def head_norm(self, x: str, i: int, part: str) -> str:
        """Normalize each head of [B, T, heads, D], in the families that do."""
        module = f"model.layers.{i}.self_attn.{part}_norm"
        return self.norm(x, module, f"/model/layers.{i}/attn/{part}_norm") if self.has_head_norm(i, part) else x

    def has_head_norm(self, i: int, part: str) -> bool:
        return f"model.layers.{i}.self_attn.{part}_norm.weight" in self.source.names


class FusedGraph(DecoderGraph):
    """One operator for each of norm, rotation and attention.

    Where scores are capped attention is single operators: runtimes differ in whether Attention masks before its cap.
    """

    opset = 23

    def norm(self, x: str, module: str, name: str) -> str:
        weights, op = [self.norm_weight(module)], "RMSNormalization"
        if self.family.layer_norm:
            weights, op = [*weights, self.layers.weight(f"{module}.bias")], "LayerNormalization"
        return self.file.node(op, name, [x, *weights], axis=-1, epsilon=self.sizes.eps)

    def gelu(self, x: str, name: str, *, exact: bool) -> str:
        return self.file.node("Gelu", name, [x], approximate="none" if exact else "tanh")

    def attention(self, q: str, k: str, v: str, i: int) -> str:
        sizes, name = self.sizes, f"/model/layers.{i}/attn"
        q = self._rotate(q, i, "q", sizes.n_heads)
        k = self._rotate(k, i, "k", sizes.n_kv_heads)
        if self.scales.score_cap:
            q, k, v = (
                self.heads_first(self.by_head(x, f"{name}/{part}/by_head", n), f"{name}/{part}/heads_first")
                for x, part, n in ((q, "q", sizes.n_heads), (k, "k", sizes.n_kv_heads), (v, "v", sizes.n_kv_heads))
            )
            return self.attend(q, k, v, i)
        cache = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        made = [f"{name}/out", *(f"present.{i}.{part}" for part in ("key", "value"))]
        return self.file.node(
            "Attention", f"{name}/Attention", [q, k, v, self.mask(sizes.windows[i]), *cache], made,
            q_num_heads=sizes.n_heads, kv_num_heads=sizes.n_kv_heads, scale=self.score_scale,
        )  # fmt: skip

    def _rotate(self, x: str, i: int, part: str, n_heads: int) -> str:
        file, name, sizes = self.file, f"/model/layers.{i}/attn/{part}", self.sizes
        if self.has_head_norm(i, part):
            heads = self.ints(f"{part}_heads", 0, 0, n_heads, sizes.head_size)
            x = self.head_norm(file.node("Reshape", f"{name}/heads", [x, heads]), i, part)
            flat = self.ints(f"{part}_flat", 0, 0, n_heads * sizes.head_size)
            x = file.node("Reshape", f"{name}/flat", [x, flat])
        if not self.source.rotated:
            return x
        partly: dict[str, Any] = (
            {} if self.source.rotated == sizes.head_size else {"rotary_embedding_dim": self.source.rotated}
        )
        angles = [self.cos[sizes.kinds[i]], self.sin[sizes.kinds[i]]]
        return file.node("RotaryEmbedding", f"{name}/RotaryEmbedding", [x, *angles], num_heads=n_heads, **partly)


class PlainGraph(DecoderGraph):
    """Elementwise operators and products. A group of query heads shares its key head by broadcasting."""

    opset = 21  # the first whose DequantizeLinear reads blocks of int4

    def norm(self, x: str, module: str, name: str) -> str:
        file = self.file
        wide = file.node("Cast", f"{name}/float", [x], to=file.type("FLOAT"))
        if self.family.layer_norm:
            middle = file.node("ReduceMean", f"{name}/mean", [wide, self.ints("last", -1)])
            wide = file.node("Sub", f"{name}/Sub", [wide, middle])
        square = file.node("Mul", f"{name}/square", [wide, wide])
        mean = file.node("ReduceMean", f"{name}/ReduceMean", [square, self.ints("last", -1)])
        mean = file.node("Add", f"{name}/Add", [mean, file.constant("eps", np.array(self.sizes.eps, np.float32))])
        root = file.node("Sqrt", f"{name}/Sqrt", [mean])
        unit = file.node("Div", f"{name}/Div", [wide, root])
        unit = file.node("Cast", f"{name}/Cast", [unit], to=file.type(self.dtype))
        scaled = file.node("Mul", f"{name}/Mul", [unit, self.norm_weight(module)])
        if not self.family.layer_norm:
            return scaled
        return file.node("Add", f"{name}/bias", [scaled, self.layers.weight(f"{module}.bias")])

    def gelu(self, x: str, name: str, *, exact: bool) -> str:
        """x / 2 * (1 + erf(x / sqrt(2))), or with tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)) in its place."""
        file, dtype = self.file, numpy_dtype(self.dtype)
        cubic, root, half, one = (
            file.constant(f"gelu_{what}", np.array(value, dtype))
            for what, value in (
                ("cubic", 0.044715), ("root", 0.5**0.5 if exact else (2 / np.pi) ** 0.5), ("half", 0.5), ("one", 1),
            )
        )  # fmt: skip
        inner = x
        if not exact:
            inner = file.node("Mul", f"{name}/square", [x, x])
            inner = file.node("Mul", f"{name}/cubic", [inner, cubic])
            inner = file.node("Add", f"{name}/inner", [inner, one])
            inner = file.node("Mul", f"{name}/by_x", [inner, x])
        inner = file.node("Mul", f"{name}/root", [inner, root])
        bent = "Erf" if exact else "Tanh"
        inner = file.node(bent, f"{name}/{bent}", [inner])
        inner = file.node("Add", f"{name}/Add", [inner, one])
        half = file.node("Mul", f"{name}/half", [x, half])
        return file.node("Mul", f"{name}/Mul", [half, inner])

    def angles(self) -> None:
        super().angles()
        axis = self.ints("heads_axis", 1)  # [B, 1, T, rotated / 2], the same for all heads
        for made in (self.cos, self.sin):
            for kind, name in made.items():
                made[kind] = self.file.node("Unsqueeze", f"{name}/heads", [name, axis])

    def attention(self, q: str, k: str, v: str, i: int) -> str:
        sizes, name = self.sizes, f"/model/layers.{i}/attn"
        q = self._rotate(self._heads(q, i, "q", sizes.n_heads), f"{name}/q", i)
        k = self._rotate(self._heads(k, i, "k", sizes.n_kv_heads), f"{name}/k", i)
        return self.attend(q, k, self._heads(v, i, "v", sizes.n_kv_heads), i)

    def _heads(self, x: str, i: int, part: str, n_heads: int) -> str:
        name = f"/model/layers.{i}/attn/{part}"
        x = self.head_norm(self.by_head(x, f"{name}/heads", n_heads), i, part)
        return self.heads_first(x, f"{name}/Transpose")  # [B, heads, T, D]

    def _rotate(self, x: str, name: str, i: int) -> str:
        """Rotate the two halves of each head, or of the part of it that is rotated."""
        if not self.source.rotated:
            return x
        file, sizes, still = self.file, self.sizes, []
        left, right = f"{name}/left", f"{name}/right"
        if self.source.rotated == sizes.head_size:
            file.node("Split", f"{name}/Split", [x], [left, right], axis=-1, num_outputs=2)
        else:
            still, half = [f"{name}/still"], self.source.rotated // 2
            widths = self.ints("rotated", half, half, sizes.head_size - 2 * half)
            file.node("Split", f"{name}/Split", [x, widths], [left, right, *still], axis=-1)
        angles = {"cos": self.cos[sizes.kinds[i]], "sin": self.sin[sizes.kinds[i]]}
        parts = {
            half + angle: file.node("Mul", f"{half}/{angle}", [half, angles[angle]])
            for half in (left, right) for angle in angles
        }  # fmt: skip
        real = file.node("Sub", f"{name}/real", [parts[f"{left}cos"], parts[f"{right}sin"]])
        imaginary = file.node("Add", f"{name}/imaginary", [parts[f"{right}cos"], parts[f"{left}sin"]])
        return file.node("Concat", f"{name}/Concat", [real, imaginary, *still], axis=-1)
