"""Quantized weights: how good they are, and that files of them are read back or refused."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2, GPT2Config
from gpt2fast.data import DataModule, prepare_data
from gpt2fast.errors import ArgumentError, WeightsError
from gpt2fast.inference.packed import PackedGPT2
from gpt2fast.inference.packing import pack_weights
from gpt2fast.quantization import (
    QuantizedWeights,
    from_tensors,
    is_quantized,
    matrix_shapes,
    quantize_weights,
    round_activations,
    simulate,
    to_tensors,
)
from gpt2fast.quantization.feedback import round_with_feedback
from gpt2fast.quantization.rounding import RANGE, round_to_nearest

SHAPES = [(64, 96), (96, 40), (33, 7), (1, 1), (200, 1030)]


def correlated(rows: int, width: int) -> Tensor:
    """Inputs such as activations are: a few directions hold most of them, and some are large."""
    basis = torch.randn(width, width) * torch.linspace(3, 0.05, width)[:, None]
    return torch.randn(rows, width) @ basis


def output_error(weight: Tensor, approximate: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - approximate)).square().sum())


@pytest.fixture(scope="module")
def model() -> GPT2:
    """Untied, odd in every size, so that nothing fits a group."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=101, n_positions=40, n_embd=36, n_layer=2, n_head=3, n_inner=75,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2(config)


@pytest.fixture(scope="module")
def adventures() -> GPT2:
    return GPT2.from_pretrained("adventures", dtype=torch.float32)


@pytest.fixture(scope="module")
def quantized(model: GPT2) -> QuantizedWeights:
    return quantize_weights(model, "int4", sensitive=["h.1.mlp.c_proj.weight"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64)])
def test_nearest_is_within_half_a_step_everywhere(shape, bits, group):
    weight = torch.randn(shape)
    matrix = round_to_nearest(weight, bits, group)
    assert matrix.q.shape == shape and matrix.q.dtype == torch.int8
    assert matrix.scales.shape == (-(-shape[0] // group), shape[1])
    assert matrix.scales.dtype == torch.float16
    steps = matrix.scales.float().repeat_interleave(group, 0)[: shape[0]]
    # float16 moves a scale by up to 1 / 2048, and the largest weight with it.
    assert ((matrix.dequantize() - weight).abs() <= steps * (0.5 + RANGE[bits][1] / 1024)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64)])
def test_feedback_gives_integers_of_the_same_form(shape, bits, group):
    x = correlated(300, shape[0])
    matrix = round_with_feedback(torch.randn(shape), x.t() @ x, bits, group)
    assert matrix.q.shape == shape and matrix.q.dtype == torch.int8
    assert matrix.scales.shape == (-(-shape[0] // group), shape[1])
    low, high = RANGE[bits]
    assert low <= int(matrix.q.min()) and int(matrix.q.max()) <= high


@pytest.mark.parametrize("group", [32, 64])
def test_feedback_and_searched_scales_each_lower_the_error_of_the_outputs(group):
    weight, x = torch.randn(192, 300), correlated(2000, 192)
    hessian = x.t() @ x
    nearest, searched, fed = (
        output_error(weight, matrix.dequantize(), x)
        for matrix in (
            round_to_nearest(weight, 4, group),
            round_with_feedback(weight, torch.diag(hessian.diagonal()), 4, group),
            round_with_feedback(weight, hessian, 4, group),
        )
    )
    assert searched < 0.95 * nearest
    assert fed < 0.7 * searched


def test_padding_changes_nothing():
    """An incomplete group is rounded as if it were filled up with zeros."""
    weight = torch.randn(70, 9)
    padded = torch.cat([weight, torch.zeros(26, 9)])
    for bits, group in ((8, 64), (4, 32)):
        short, long = (round_to_nearest(w, bits, group) for w in (weight, padded))
        assert torch.equal(short.q, long.q[:70]) and not long.q[70:].any()
        assert torch.equal(short.scales, long.scales[: len(short.scales)])


def test_zeros_and_unseen_inputs_are_no_trouble():
    weight = torch.randn(64, 8)
    weight[:, 3] = 0
    weight[32:, 5] = 0
    x = correlated(50, 64)  # fewer rows than inputs: H is singular
    x[:, 10] = 0
    for hessian in (x.t() @ x, torch.zeros(64, 64)):
        for bits, group in ((8, 64), (4, 32)):
            result = round_with_feedback(weight, hessian, bits, group).dequantize()
            assert result.isfinite().all()
            assert (
                not result[:, 3].any() and not round_to_nearest(weight, bits, group).q[:, 3].any()
            )
            assert output_error(weight, result, torch.eye(64)) < 0.1 * float(weight.square().sum())


def test_every_matrix_is_there_and_nothing_else_changes(model, quantized):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(quantized.matrices) == list(matrix_shapes(model.config))
    assert {n: tuple(m.q.shape) for n, m in quantized.matrices.items()} == matrix_shapes(
        model.config
    )
    kept = {name for name, matrix in quantized.matrices.items() if matrix.bits == 8}
    assert kept == {"h.1.mlp.c_proj.weight"}
    copy = simulate(model, quantized)
    for name, tensor in copy.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.shape == before[name].shape
        assert torch.equal(tensor, before[name]) == (name not in quantized.matrices)
        assert torch.equal(model.state_dict()[name], before[name])
    assert model.training and not copy.training


def test_an_embedding_that_is_also_the_projection_is_stored_once(adventures):
    weights = quantize_weights(adventures, "int4", method="nearest")
    assert "lm_head.weight" not in weights.matrices
    assert weights.matrices["wte.weight"].q.shape == (256, 2048)
    assert weights.matrices["wte.weight"].bits == 8  # it is narrow
    assert simulate(adventures, weights).projection.shape == (2048, 256)
    whole = quantize_weights(adventures, "int4", method="nearest", sensitive=[])
    assert {matrix.bits for matrix in whole.matrices.values()} == {4}


def test_bits_per_weight_count_everything_that_is_stored(model, quantized):
    tensors, _ = to_tensors(quantized, model.config)
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    rest = sum(
        32 * tensor.numel()
        for name, tensor in model.state_dict().items()
        if name not in quantized.matrices
    )
    # An odd number of inputs leaves half a byte empty.
    odd = sum(4 * m.q.shape[1] for m in quantized.matrices.values() if m.bits == 4 and len(m.q) % 2)
    exact = (stored - odd + rest) / model.config.parameter_count
    assert quantized.bits_per_weight(model.config) == pytest.approx(exact)


def test_a_seed_decides_everything(model, quantized):
    state = torch.get_rng_state()
    again = quantize_weights(model, "int4", sensitive=["h.1.mlp.c_proj.weight"], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    other = quantize_weights(model, "int4", sensitive=["h.1.mlp.c_proj.weight"], seed=1)
    same = [torch.equal(again.matrices[n].q, m.q) for n, m in quantized.matrices.items()]
    different = [torch.equal(other.matrices[n].q, m.q) for n, m in quantized.matrices.items()]
    assert all(same) and not all(different)
    assert "seed 0" in again.calibration and "seed 1" in other.calibration


def test_given_text_calibrates(model):
    ids = torch.randint(101, (500,))
    seen: list[tuple[str, int, int]] = []
    flat = quantize_weights(
        model, "int4", calibration=ids.tolist(), progress=lambda *step: seen.append(step)
    )
    rows = quantize_weights(model, "int4", calibration=ids[:480].view(12, 40))
    for name, matrix in flat.matrices.items():
        assert torch.equal(matrix.q, rows.matrices[name].q)
    assert flat.calibration == "rounded with feedback on 480 given tokens in windows of 40"
    assert sorted(name for name, _, _ in seen) == sorted(flat.matrices)
    assert [(done, total) for _, done, total in seen] == [(i + 1, 10) for i in range(10)]


def test_int8_takes_no_calibration(model):
    assert quantize_weights(model, "int8").calibration == "rounded to nearest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_dtype_are_quantized(model, dtype):
    copy = simulate(model, quantize_weights(model, "int8")).to(dtype)
    weights = quantize_weights(copy, "int4")
    assert simulate(copy, weights).dtype == torch.float32


@pytest.mark.parametrize("width", [1, 64, 100])
def test_activations_are_rounded_group_by_group(width):
    x = torch.randn(3, 5, width) * torch.logspace(-3, 3, width)
    rounded = round_activations(x, 32)
    for first in range(0, width, 32):
        part = x[..., first : first + 32]
        step = part.abs().amax(-1, keepdim=True) / 127
        missed = (rounded[..., first : first + 32] - part).abs()
        assert (missed <= 0.501 * step).all()
    assert not round_activations(torch.zeros(2, width), 32).any()


def test_the_simulation_rounds_what_goes_into_each_matrix(model, quantized):
    ids = torch.randint(101, (2, 40))
    with torch.no_grad():
        exact = simulate(model, quantized).hidden_states(ids)
        rounded = simulate(model, quantized, activations=True).hidden_states(ids)
    error = float((exact - rounded).norm() / exact.norm())
    assert 0.001 < error < 0.05


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_saved_is_read_back(model, scheme, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = quantize_weights(model, scheme, sensitive=["h.0.*"])
    tensors, metadata = to_tensors(weights, model.config)
    save_file(tensors, tmp_path / "q.safetensors", metadata)
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert is_quantized(file.metadata()) and not is_quantized({"format": "pt"})
        back = from_tensors(read, file.metadata(), model.config, "q.safetensors")
    assert (back.scheme, back.group) == (weights.scheme, weights.group)
    assert back.calibration == weights.calibration
    for name, matrix in weights.matrices.items():
        other = back.matrices[name]
        assert torch.equal(other.q, matrix.q) and torch.equal(other.scales, matrix.scales)
        assert (other.bits, other.group) == (matrix.bits, matrix.group)
    if scheme == "int4":
        stored = tensors["h.1.mlp.c_fc.weight.q"]
        q = weights.matrices["h.1.mlp.c_fc.weight"].q
        assert stored.shape == (18, 75)
        assert int(stored[3, 5]) == int(q[6, 5]) + 8 + 16 * (int(q[7, 5]) + 8)


DAMAGES = {
    "lacks 1 tensors": lambda t, m: t.pop("wte.weight.q"),
    "has 1 tensors": lambda t, m: t.update({"h.2.attn.c_attn.weight.q": t["wte.weight.q"]}),
    "is torch.uint8 (18, 100)": lambda t, m: t.update({"wte.weight.q": t["wte.weight.q"][:, :100]}),
    "is torch.int16": lambda t, m: t.update({"wte.weight.q": t["wte.weight.q"].short()}),
    "scales is torch.float32": lambda t, m: t.update(
        {"wte.weight.scales": t["wte.weight.scales"].float()}
    ),
    "not finite": lambda t, m: t["wte.weight.scales"].fill_(float("nan")),
    "-128, outside": lambda t, m: t["h.1.mlp.c_proj.weight.q"].fill_(-128),
    "version '7'": lambda t, m: m.update({"quantization.version": "7"}),
    "version None": lambda t, m: m.clear(),
    "scheme='int3'": lambda t, m: m.update({"quantization.scheme": "int3"}),
    "group_size=-1": lambda t, m: m.update({"quantization.group": "many"}),
    "group_size=128": lambda t, m: m.update({"quantization.group": "128"}),
    "is torch.float16 (2, 101), not": lambda t, m: m.update({"quantization.group": "64"}),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_refused(model, quantized, message):
    tensors, metadata = to_tensors(quantized, model.config)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    DAMAGES[message](tensors, metadata)
    with pytest.raises(WeightsError) as caught:
        from_tensors(tensors, metadata, model.config, "broken.safetensors")
    assert message in str(caught.value) and str(caught.value).startswith("broken.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "scheme='int3' is not one of int8, int4"),
        ({"group_size": 48}, "group_size=48 is not one that int4 has: 32 or 64"),
        ({"scheme": "int8", "group_size": 32}, "is not one that int8 has: 64"),
        ({"method": "best"}, "method='best' is not one of feedback, nearest"),
        ({"sensitive": "wte.weight"}, "must be a list of patterns"),
        ({"sensitive": ["h.7.*"]}, "'h.7.*', which matches no matrix"),
        ({"calibration": []}, "calibration has 0 tokens"),
        ({"calibration": [5, 101]}, "token id 101, outside the vocabulary 0 .. 100"),
        ({"calibration": torch.zeros(2, 41).long()}, "beyond this model's n_positions=40"),
        ({"calibration": torch.zeros(70000).long()}, "calibration has 70000 tokens"),
        ({"calibration": [0.5]}, "whole numbers"),
        ({"calibration": "text"}, "must be token ids, (T,) or (B, T), not str"),
    ],
)
def test_a_wrong_argument_is_told(model, options, message):
    with pytest.raises(ArgumentError) as caught:
        quantize_weights(model, **{"scheme": "int4", **options})
    assert message in str(caught.value)


def test_a_model_without_weights_or_with_broken_ones_is_told(model):
    with pytest.raises(ArgumentError, match="device 'meta'"):
        quantize_weights(GPT2(model.config, device="meta"), "int8")
    for value in (float("nan"), 1e30):
        broken = GPT2(replace(model.config, dropout=None))
        broken.h[1].mlp.c_fc.weight.data[3, 4] = value
        with pytest.raises(WeightsError, match="cannot be quantized"):
            quantize_weights(broken, "int8")
        with pytest.raises(WeightsError, match="cannot be quantized"):
            quantize_weights(broken, "int4", calibration=torch.arange(40))


GATE = {"int8": 0.003, "int4": 0.02}
"""Largest rise of the perplexity on held-out text over float32."""


def perplexity(
    model: GPT2 | PackedGPT2, batches: list[tuple[Tensor, Tensor]], cached: bool = False
) -> float:
    total = count = 0.0
    with torch.inference_mode():
        for input_ids, targets in batches:
            cache = model.new_cache(*input_ids.shape) if cached else None
            loss = model(input_ids, targets=targets, cache=cache).loss
            assert loss is not None
            total += float(loss) * targets.numel()
            count += targets.numel()
    return math.exp(total / count)


def assert_gate(model: GPT2, scheme: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Simulated, as the kernels compute it, and with the cache that they write by default."""
    exact = perplexity(model, batches)
    weights = quantize_weights(model, scheme)
    packed = pack_weights(model, weights)
    changes = {
        "simulated": perplexity(simulate(model, weights, activations=True), batches),
        "packed": perplexity(packed, batches),
        f"cache in {packed.new_cache(1, 1).k.dtype}": perplexity(packed, batches, cached=True),
    }
    changes = {name: found / exact - 1 for name, found in changes.items()}
    print(
        f"{scheme}: perplexity {exact:.3f};",
        ", ".join(f"{name} {100 * change:+.3f} %" for name, change in changes.items()),
        f"at {weights.bits_per_weight(model.config):.2f} bits per weight",
    )
    assert all(change < GATE[scheme] for change in changes.values()), changes


def held_out(folder: Path, block_size: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """The first tokens of the validation split, in batches of about 2048."""
    batch_size = max(1, 2048 // block_size)
    batches = []
    for batch in DataModule(folder, block_size, batch_size).val_dataloader():
        batches.append(batch)
        if sum(targets.numel() for _, targets in batches) >= tokens:
            break
    return batches


@pytest.fixture(scope="module")
def books(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The books that the bundled model was trained on, and those that it was not."""
    folder = tmp_path_factory.mktemp("books") / "data"
    prepare_data(
        [data_dir / "adventure_books.txt"],
        folder,
        tokenizer=str(files("gpt2fast") / "assets" / "adventures"),
        split="documents",
        val_fraction=0.05,
    )
    return folder


@pytest.mark.parametrize("scheme", GATE)
def test_the_bundled_model_passes_the_gate(adventures, books, scheme):
    assert_gate(adventures, scheme, held_out(books, 256, 40_000))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheme", GATE)
def test_a_trained_model_passes_the_gate(scheme):
    """GPT2FAST_QUANTIZATION_MODEL and _DATA name a checkpoint and the data of its training."""
    checkpoint = os.environ.get("GPT2FAST_QUANTIZATION_MODEL")
    data = os.environ.get("GPT2FAST_QUANTIZATION_DATA")
    if not checkpoint or not data:
        pytest.skip("GPT2FAST_QUANTIZATION_MODEL and GPT2FAST_QUANTIZATION_DATA are not set")
    model = GPT2.from_pretrained(checkpoint, dtype=torch.float32)
    batches = held_out(Path(data), min(1024, model.config.n_positions), 8_000)
    assert_gate(model, scheme, batches)
