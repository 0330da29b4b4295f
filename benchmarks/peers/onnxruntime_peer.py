"""ONNX Runtime: https://onnxruntime.ai

The graph is the one that its generation library would run: fused attention which writes into a
cache that the caller owns, fused normalization and GELU, logits for the last position only. An
export by tracing (optimum) copies the cache at every step.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from checkpoint import Checkpoint
from engine import Prompts, Run
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = ("float32", "int8", "int8-blocks", "int4")
"""int8: one scale a column, activations quantized as a whole (`quantize_dynamic`), the fastest for
prompts and batches. int8-blocks and int4: a scale for every so many weights."""

_CONTRIB = "com.microsoft"
_BITS = {"int8-blocks": 8, "int4": 4}
_BLOCK = {8: 64, 4: 32}
"""Weights that share a scale."""


def convert(checkpoint: Checkpoint, weights: str, target: Path) -> None:
    """Write a folder with model.onnx and its weights beside it."""
    target.mkdir()
    graph = _Graph(checkpoint, weights)
    file = target / "model.onnx"
    graph.save(file)
    if weights == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        plain = target / "float32.onnx"
        file.rename(plain)
        quantize_dynamic(
            plain,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            # It cannot infer the types behind fused operations.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        plain.unlink()
        (target / "model.weights").unlink()


class _Graph:
    """GPT-2 with a cache, operation by operation."""

    def __init__(self, checkpoint: Checkpoint, weights: str):
        self._checkpoint = checkpoint
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        layers, heads = checkpoint.layers, checkpoint.heads
        head_dim = checkpoint.width // heads
        wte = checkpoint.tensor("wte.weight")

        tokens = self._node("Gather", [self._constant("wte", wte), "input_ids"])
        places = self._node("Gather", [self._weight("wpe.weight"), "position_ids"])
        stream = self._node("Add", [tokens, places])
        normed = self._node(
            "LayerNormalization",
            [stream, self._weight("h.0.ln_1.weight"), self._weight("h.0.ln_1.bias")],
            epsilon=checkpoint.config["layer_norm_epsilon"],
        )
        for index in range(layers):
            name = f"h.{index}"
            qkv = self._node(
                "Add",
                [self._product(normed, f"{name}.attn.c_attn"),
                 self._weight(f"{name}.attn.c_attn.bias")],
            )  # fmt: skip
            attended = self._node(
                "GroupQueryAttention",
                [qkv, "", "", f"past_k.{index}", f"past_v.{index}", "seqlens_k", "total_length"],
                [f"attended.{index}", f"present_k.{index}", f"present_v.{index}"],
                domain=_CONTRIB,
                num_heads=heads,
                kv_num_heads=heads,
                do_rotary=0,
            )
            branch = self._product(attended, f"{name}.attn.c_proj")
            stream, normed = self._add_norm(stream, branch, f"{name}.attn.c_proj", f"{name}.ln_2")
            inner = self._node(
                "FastGelu",
                [self._product(normed, f"{name}.mlp.c_fc"), self._weight(f"{name}.mlp.c_fc.bias")],
                domain=_CONTRIB,
            )
            branch = self._product(inner, f"{name}.mlp.c_proj")
            following = f"h.{index + 1}.ln_1" if index + 1 < layers else "ln_f"
            stream, normed = self._add_norm(stream, branch, f"{name}.mlp.c_proj", following)
        last = self._node("Gather", [normed, self._constant("last", np.array(-1))], axis=1)
        logits = self._product(last, "head", wte.T)
        self._node("ArgMax", [logits], ["next"], axis=1, keepdims=0)

        rows, length = "rows", "length"
        cache = [rows, heads, length, head_dim]
        names = [f"{kind}.{index}" for index in range(layers) for kind in ("k", "v")]
        self._graph = helper.make_graph(
            self._nodes,
            "gpt2",
            [
                _value("input_ids", TensorProto.INT64, [rows, "new"]),
                _value("position_ids", TensorProto.INT64, [rows, "new"]),
                _value("seqlens_k", TensorProto.INT32, [rows]),
                _value("total_length", TensorProto.INT32, []),
                *(_value(f"past_{name}", TensorProto.FLOAT, cache) for name in names),
            ],
            [
                _value("next", TensorProto.INT64, [rows]),
                *(_value(f"present_{name}", TensorProto.FLOAT, cache) for name in names),
            ],
            self._constants,
        )

    def save(self, file: Path) -> None:
        """Write the model, its weights in a file of their own."""
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(self._graph, opset_imports=opsets, ir_version=8)
        onnx.save_model(model, file, save_as_external_data=True, location="model.weights")

    def _node(self, kind: str, inputs: list[str], outputs=None, **attributes) -> str:
        outputs = outputs or [f"{kind}.{len(self._nodes)}"]
        self._nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def _weight(self, name: str) -> str:
        return self._constant(name, self._checkpoint.tensor(name))

    def _product(self, x: str, name: str, weight: np.ndarray | None = None) -> str:
        if weight is None:
            weight = self._checkpoint.tensor(f"{name}.weight")
        if self._weights not in _BITS:
            return self._node("MatMul", [x, self._constant(f"{name}.weight", weight)])
        inputs, outputs = weight.shape
        bits = _BITS[self._weights]
        packed, scales = _packed(weight, bits)
        return self._node(
            "MatMulNBits",
            [x, self._constant(f"{name}.q", packed), self._constant(f"{name}.scales", scales)],
            domain=_CONTRIB,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=_BLOCK[bits],
            accuracy_level=4,  # activations in int8
        )

    def _add_norm(self, stream: str, branch: str, bias: str, norm: str) -> tuple[str, str]:
        """The residual stream with the branch added, and its normalization."""
        number = len(self._nodes)
        normed, summed = f"normed.{number}", f"summed.{number}"
        self._node(
            "SkipLayerNormalization",
            [stream, branch, self._weight(f"{norm}.weight"), self._weight(f"{norm}.bias"),
             self._weight(f"{bias}.bias")],
            [normed, "", "", summed],
            domain=_CONTRIB,
            epsilon=self._checkpoint.config["layer_norm_epsilon"],
        )  # fmt: skip
        return summed, normed


def _packed(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """MatMulNBits' layout of an (in, out) matrix: (out, blocks, bytes), low nibble first, the
    middle at 2 ** (bits - 1); scales (out * blocks,)."""
    blocks = weight.T.reshape(weight.shape[1], -1, _BLOCK[bits])
    middle = 2 ** (bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = extreme / -middle
    divisors = np.where(scales == 0, 1, scales)
    q = np.clip(np.round(blocks / divisors) + middle, 0, 2 * middle - 1).astype(np.uint8)
    packed = q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4
    return packed, scales.astype(np.float32).reshape(-1)


def _value(name: str, dtype: int, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


class Engine:
    """A session; the cache is written in place."""

    version = onnxruntime.__version__

    def __init__(self, target: Path, weights: str, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads spin within a step, and sleep between ours and another peer's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(
            str(target / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        past = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self._cache_names = [value.name.removeprefix("past_") for value in past]
        self._heads, self._head_dim = past[0].shape[1], past[0].shape[3]

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        rows, read = len(prompts), len(prompts[0])
        shape = (rows, self._heads, read + new, self._head_dim)
        start = time.perf_counter()
        cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name in self._cache_names
        }
        tokens = [self._step(cache, np.array(prompts, np.int64), 0)]
        first = time.perf_counter()
        for position in range(read, read + new - 1):
            tokens.append(self._step(cache, tokens[-1][:, None], position))
        end = time.perf_counter()
        return Run(first - start, end - first, np.stack(tokens, 1).tolist())

    def _step(self, cache: dict, ids: np.ndarray, position: int) -> np.ndarray:
        rows, count = ids.shape
        places = np.arange(position, position + count, dtype=np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(np.tile(places, (rows, 1))))
        binding.bind_cpu_input("seqlens_k", np.full(rows, position + count - 1, np.int32))
        binding.bind_cpu_input("total_length", np.array(position + count, np.int32))
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_output("next")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()
