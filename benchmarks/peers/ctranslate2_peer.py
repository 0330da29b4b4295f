"""CTranslate2: https://github.com/OpenNMT/CTranslate2"""

from __future__ import annotations

import time
from pathlib import Path

import ctranslate2
from checkpoint import Checkpoint
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
from engine import Prompts, Run

WEIGHTS = ("float32", "int8")  # bfloat16 is stored, but computed in float32 on a CPU


def convert(checkpoint: Checkpoint, weights: str, target: Path) -> None:
    """Write CTranslate2's directory. Its vocabulary is the token ids as text."""
    # Quantization works in place, hence the copies of matrices.
    spec = TransformerDecoderModelSpec.from_config(
        checkpoint.layers,
        checkpoint.heads,
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = checkpoint.tensor("wte.weight").copy()
    decoder.position_encodings.encodings = checkpoint.tensor("wpe.weight")
    decoder.projection.weight = checkpoint.tensor("wte.weight").copy()
    _norm(decoder.layer_norm, checkpoint, "ln_f")
    for index, layer in enumerate(decoder.layer):
        name = f"h.{index}"
        _norm(layer.self_attention.layer_norm, checkpoint, f"{name}.ln_1")
        _linear(layer.self_attention.linear[0], checkpoint, f"{name}.attn.c_attn")
        _linear(layer.self_attention.linear[1], checkpoint, f"{name}.attn.c_proj")
        _norm(layer.ffn.layer_norm, checkpoint, f"{name}.ln_2")
        _linear(layer.ffn.linear_0, checkpoint, f"{name}.mlp.c_fc")
        _linear(layer.ffn.linear_1, checkpoint, f"{name}.mlp.c_proj")
    vocabulary = [str(token) for token in range(len(checkpoint.tensor("wte.weight")))]
    spec.register_vocabulary(vocabulary)
    last = vocabulary[-1]
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = last
    spec.config.layer_norm_epsilon = checkpoint.config["layer_norm_epsilon"]
    spec.validate()
    spec.optimize(quantization=None if weights == "float32" else weights)
    target.mkdir()
    spec.save(str(target))


def _linear(spec, checkpoint: Checkpoint, name: str) -> None:
    spec.weight = checkpoint.tensor(f"{name}.weight").T.copy()
    spec.bias = checkpoint.tensor(f"{name}.bias")


def _norm(spec, checkpoint: Checkpoint, name: str) -> None:
    spec.gamma = checkpoint.tensor(f"{name}.weight")
    spec.beta = checkpoint.tensor(f"{name}.bias")


class Engine:
    """A generator with one batch at a time."""

    version = ctranslate2.__version__

    def __init__(self, target: Path, weights: str, threads: int):
        self._generator = ctranslate2.Generator(
            str(target), compute_type=weights, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        arrivals: list[float] = []

        def note(_) -> bool:
            arrivals.append(time.perf_counter())
            return False

        start = time.perf_counter()
        results = self._generator.generate_batch(
            [[str(token) for token in row] for row in prompts],
            include_prompt_in_result=False,
            max_length=new,
            min_length=new,
            beam_size=1,
            callback=note,
        )
        end = time.perf_counter()
        first = arrivals[len(prompts) - 1]
        tokens = [result.sequences_ids[0] for result in results]
        return Run(first - start, end - first, tokens)
