"""OpenVINO: https://github.com/openvinotoolkit/openvino

The graph is what its generation library runs: keys and values are state that
`ScaledDotProductAttention` appends to in place, logits are made for the last position only. NNCF
compresses the weights, as optimum-intel has it do.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino
from checkpoint import Checkpoint, PeerError
from engine import Prompts, Run
from openvino import Model, Node, PartialShape, Type
from openvino import opset13 as opset
from openvino.op.util import Variable, VariableInfo

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
"""int8: a scale for each column. int4: groups of 128 inputs, NNCF's own choice, embedding and
output projection included."""


def convert(checkpoint: Checkpoint, weights: str, target: Path) -> None:
    """Write a folder with model.xml and model.bin."""
    target.mkdir()
    model = _graph(checkpoint)
    if weights.startswith("int"):
        import nncf

        if weights == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            mode = nncf.CompressWeightsMode.INT4_SYM
            model = nncf.compress_weights(model, mode=mode, group_size=128, all_layers=True)
    openvino.save_model(model, target / "model.xml", compress_to_fp16=False)


def _graph(checkpoint: Checkpoint) -> Model:
    """GPT-2 with its cache as state, operation by operation, in float32."""
    heads, width = checkpoint.heads, checkpoint.width
    head_dim = width // heads
    constants: dict[str, Node] = {}

    def weight(name: str) -> Node:
        if name not in constants:
            value = np.ascontiguousarray(checkpoint.tensor(name))
            constants[name] = opset.constant(value, name=name)
        return constants[name]

    def integers(*values: int) -> Node:
        return opset.constant(np.array(values, np.int64))

    def norm(x: Node, name: str) -> Node:
        eps = checkpoint.config["layer_norm_epsilon"]
        normed = opset.mvn(x, integers(-1), True, eps, "inside_sqrt")
        return opset.add(opset.multiply(normed, weight(f"{name}.weight")), weight(f"{name}.bias"))

    def linear(x: Node, name: str) -> Node:
        # (out, in), the order in which NNCF groups weights and in which kernels want them.
        matrix = opset.constant(np.ascontiguousarray(checkpoint.tensor(f"{name}.weight").T))
        return opset.add(opset.matmul(x, matrix, False, True), weight(f"{name}.bias"))

    def argument(name: str, kind: Type, *dims: int) -> Node:
        node = opset.parameter(PartialShape(dims), kind)
        node.output(0).get_tensor().set_names({name})
        return node

    ids = argument("input_ids", Type.i64, -1, -1)
    places = argument("position_ids", Type.i64, -1, -1)
    rows = argument("beam_idx", Type.i32, -1)
    shape = opset.shape_of(ids)
    count = opset.gather(shape, integers(0), opset.constant(np.int64(0)))
    empty = opset.concat([count, integers(heads, 0, head_dim)], 0)
    zero = opset.constant(np.float32(0))
    axis = opset.constant(np.int64(0))
    updates: list[Node] = []
    # Entries up to each query's own.
    own = opset.unsqueeze(places, integers(2))
    end = opset.add(opset.reduce_max(own, integers(0, 1, 2)), opset.constant(np.int64(1)))
    entries = opset.range(axis, end, opset.constant(np.int64(1)), "i64")
    hidden = opset.constant(np.finfo(np.float32).min)
    seen = opset.select(opset.less_equal(entries, own), zero, hidden)
    visible = opset.unsqueeze(seen, integers(1))  # (rows, 1, new, entries)

    def appended(new: Node, name: str) -> Node:
        """The entries of a cache, (rows, heads, entries, head_dim), with new ones."""
        info = VariableInfo()
        info.data_shape = PartialShape([-1, heads, -1, head_dim])
        info.data_type = Type.f32
        info.variable_id = name
        variable = Variable(info)
        before = opset.read_value(opset.broadcast(zero, empty), variable)
        # The plugin looks for this gather, which beam search would need.
        after = opset.concat([opset.gather(before, rows, axis), new], 2)
        updates.append(opset.assign(after, variable))
        return after

    stream = opset.add(
        opset.gather(weight("wte.weight"), ids, axis),
        opset.gather(weight("wpe.weight"), places, axis),
    )
    for index in range(checkpoint.layers):
        block = f"h.{index}"
        qkv = linear(norm(stream, f"{block}.ln_1"), f"{block}.attn.c_attn")
        split = opset.reshape(qkv, integers(0, 0, 3 * heads, head_dim), True)
        by_head = opset.transpose(split, integers(0, 2, 1, 3))
        q, k, v = opset.split(by_head, opset.constant(np.int64(1)), 3).outputs()
        attended = opset.scaled_dot_product_attention(
            q,
            appended(k, f"past_key_values.{index}.key"),
            appended(v, f"past_key_values.{index}.value"),
            visible,
        )
        joined = opset.reshape(
            opset.transpose(attended, integers(0, 2, 1, 3)), integers(0, 0, width), True
        )
        stream = opset.add(stream, linear(joined, f"{block}.attn.c_proj"))
        inner = linear(norm(stream, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        stream = opset.add(stream, linear(opset.gelu(inner, "tanh"), f"{block}.mlp.c_proj"))
    last = opset.gather(norm(stream, "ln_f"), integers(-1), opset.constant(np.int64(1)))
    logits = opset.matmul(last, weight("wte.weight"), False, True)
    best = opset.topk(logits, opset.constant(np.int64(1)), 2, "max", "none", "i64")
    found = opset.result(opset.reshape(best.output(1), integers(-1), False))
    return Model([found], updates, [ids, places, rows], "gpt2")


class Engine:
    """A compiled model; what is not set is the plugin's own choice."""

    def __init__(self, target: Path, weights: str, threads: int):
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
        }
        if weights == "float32":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        elif weights == "bfloat16":
            settings |= {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
        compiled = openvino.Core().compile_model(target / "model.xml", "CPU", settings)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if weights == "bfloat16" and precision != "bf16":
            raise PeerError(f"OpenVINO computes in {precision} on this processor, not in bfloat16")
        self.version = f"{openvino.__version__}, computes in {precision}"
        self._compiled = compiled
        # One for each number of rows: in a request whose 8-bit cache has held fewer rows, 2026.4
        # writes wrong tokens for the further ones.
        self._requests: dict[int, openvino.InferRequest] = {}

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        rows, read = len(prompts), len(prompts[0])
        if rows not in self._requests:
            self._requests[rows] = self._compiled.create_infer_request()
        request = self._requests[rows]
        start = time.perf_counter()
        request.reset_state()
        tokens = [_step(request, np.array(prompts, np.int64), 0)]
        first = time.perf_counter()
        for position in range(read, read + new - 1):
            tokens.append(_step(request, tokens[-1][:, None], position))
        end = time.perf_counter()
        return Run(first - start, end - first, np.stack(tokens, 1).tolist())


def _step(request: openvino.InferRequest, ids: np.ndarray, position: int) -> np.ndarray:
    """The likeliest token after each row's new ones, whose first stands at `position`."""
    rows, count = ids.shape
    places: np.ndarray = np.arange(position, position + count, dtype=np.int64)
    inputs = {
        "input_ids": ids,
        "position_ids": np.ascontiguousarray(np.tile(places, (rows, 1))),
        "beam_idx": np.arange(rows, dtype=np.int32),
    }
    return request.infer(inputs, share_inputs=True)[0].copy()
