"""GPT-2 as a GGUF file, which llama.cpp and its relatives read.

llama.cpp's converter refuses tokenizers that it does not know; here the tensors are written
directly.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from checkpoint import Checkpoint, PeerError

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
WEIGHTS = tuple(_TYPES)

_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def convert(
    checkpoint: Checkpoint,
    weights: str,
    target: Path,
    *,
    numbered: bool = False,
) -> None:
    """Write a GGUF file: matrices, the embedding included, in the format; the rest in float32.

    With `numbered` each token's text is its number and a space.
    """
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_block_count(checkpoint.layers)
    writer.add_context_length(checkpoint.config["n_positions"])
    writer.add_embedding_length(checkpoint.width)
    writer.add_feed_forward_length(checkpoint.inner_width)
    writer.add_head_count(checkpoint.heads)
    writer.add_layer_norm_eps(checkpoint.config["layer_norm_epsilon"])
    tokens, merges = _numbered(checkpoint) if numbered else _vocabulary(checkpoint)
    end = checkpoint.config["eos_token_id"]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[end] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)

    def add(name: str, value: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)

    matrix, plain = _TYPES[weights], gguf.GGMLQuantizationType.F32
    add("token_embd.weight", checkpoint.tensor("wte.weight"), matrix)
    add("position_embd.weight", checkpoint.tensor("wpe.weight"), plain)
    for kind in ("weight", "bias"):
        add(f"output_norm.{kind}", checkpoint.tensor(f"ln_f.{kind}"), plain)
    for layer in range(checkpoint.layers):
        for ours, theirs in _PARTS.items():
            weight = checkpoint.tensor(f"h.{layer}.{ours}.weight")
            add(f"blk.{layer}.{theirs}.weight", weight.T, matrix if weight.ndim == 2 else plain)
            add(f"blk.{layer}.{theirs}.bias", checkpoint.tensor(f"h.{layer}.{ours}.bias"), plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Tokens in their order, and merges."""
    vocabulary = checkpoint.directory / "vocab.json"
    merges = checkpoint.directory / "merges.txt"
    if not vocabulary.is_file() or not merges.is_file():
        raise PeerError(
            f"{checkpoint.directory} has no vocab.json and merges.txt, which a GGUF file holds: "
            "save the model together with its tokenizer"
        )
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#version")]
    return sorted(tokens, key=tokens.__getitem__), rules


def _numbered(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    space = "\u0120"  # as byte-level BPE writes it
    tokens = [f"{token}{space}" for token in range(checkpoint.config["vocab_size"])]
    return tokens, [f"0 {space}"]
