"""Writes the first inputs of every target into corpus/: small files as they should be.

    python tests/fuzz/seeds.py

Inputs that have found something lie beside them and stay.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from targets import CONFIG, joined, op_arguments

import test_llm_c
import test_tensorflow_files
from gpt2fast import GPT2
from gpt2fast.checkpoints.run_folder import OLD_STATE, STATE
from gpt2fast.data.tokens import MAGIC
from gpt2fast.lora import add_adapters, save_adapter
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer
from gpt2fast.training.checkpoints.position import Position
from gpt2fast.training.checkpoints.shards import save_tensors
from gpt2fast.training.checkpoints.state import write_state
from gpt2fast.training.distributed import Group

CORPUS = Path(__file__).parent / "corpus"
TEXT = "The cat and the rat sat on a mat, at 12 o'clock.\nThe cat's hat!\n"


def saved(content: object, **how: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def seeds() -> dict[str, dict[str, bytes]]:
    """By target and name."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    few = {name: state[name] for name in ("wte.weight", "h.0.ln_1.weight")}
    made: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model.save_pretrained(root / "model", tokenizer=CharTokenizer.train(["abcdefghijklmnop"]))
        whole = files_of(root / "model")
        model.quantize("int8").save_pretrained(root / "int8")
        BPETokenizer.train([TEXT * 20], 280).save_pretrained(root / "bpe")
        bpe = files_of(root / "bpe")
        adapted = GPT2(CONFIG)
        add_adapters(adapted, rank=2)
        save_adapter(adapted, root / "adapter")
        save_tensors({"exp_avg.wte.weight": torch.zeros(3, 3)}, root / "optimizer", Group("cpu"))
        index = (root / "optimizer" / ".metadata").read_bytes()
        made["adapter"] = {"lora": joined(files_of(root / "adapter"))}
        made["folder"] = {
            "whole": joined(whole),
            "int8": joined(files_of(root / "int8")),
            "bin": joined({"config.json": whole["config.json"], "pytorch_model.bin": saved(state)}),
            "shards": joined(
                {
                    "config.json": whole["config.json"],
                    "a.safetensors": whole["model.safetensors"],
                    "model.safetensors.index.json": json.dumps(
                        {"weight_map": {f"transformer.{name}": "a.safetensors" for name in state}}
                    ).encode(),
                }
            ),
            "nanogpt": joined({"ckpt.pt": saved({"model": state, "model_args": {
                "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": True,
                "vocab_size": 17, "dropout": 0.0}})}),
        }  # fmt: skip
        (root / "tensorflow").mkdir()
        test_tensorflow_files.bundle(
            root / "tensorflow", test_tensorflow_files.openai_tensors(model), compressed=True
        )
        description = test_tensorflow_files.hparams(CONFIG).encode()
        made["tensorflow"] = {
            "release": joined({**files_of(root / "tensorflow"), "hparams.json": description})
        }
        path = test_llm_c.model_file(root / "model.bin", model, rows=24)
        made["llm_c"] = {"model": path.read_bytes()}
        made["safetensors"] = {"model": whole["model.safetensors"]}
        made["config"] = {
            "gpt2": joined(
                {
                    "config.json": whole["config.json"],
                    "generation_config.json": b'{"eos_token_id": [1, 2], "do_sample": true}',
                }
            )
        }
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        words = {
            "version": "1.0",
            "added_tokens": [{**flags, "id": 3, "content": "<|endoftext|>", "special": True}],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordLevel",
                "vocab": {"a": 0, "the": 1, "[U]": 2},
                "unk_token": "[U]",
            },
        }
        made["tokenizer"] = {
            "words": json.dumps(words).encode(),
            "bpe": joined({n: bpe[n] for n in ("tokenizer.json", "tokenizer_config.json")}),
            "files": joined({n: bpe[n] for n in ("vocab.json", "merges.txt")}),
            "characters": joined({n: whole[n] for n in ("vocab.json", "tokenizer_config.json")}),
        }
    made["pickle"] = {
        "zip": saved(few),
        "legacy": saved(few, _use_new_zipfile_serialization=False),
        "wrapped": saved({"model": few, "iter_num": 3, "config": {"a": [1.5, None, "x"]}}),
    }
    random.seed(0)
    training = {
        "format": 2,
        "position": vars(Position()),
        "random": [{"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": []}],
        "scale": {},
        "updates": 3,
        "data": {},
        "config": {"lr": 0.1},
    }
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / STATE
        write_state(path, training)
        now = path.read_bytes()
    made["resume"] = {
        "state": joined({OLD_STATE: saved(training), ".metadata": index}),
        "tensors": joined({STATE: now, ".metadata": index}),
    }
    made["recipe"] = {
        "train": b"data: a.txt\nlr: &a 1e-3\nmin_lr: 1.0e-4\nn_layer: 2\ncompile: false\n",
        "mixture": b"mixture: {a.txt: 0.7, b.jsonl: 0.3}\nmax_steps: null\nmax_epochs: 1.5\n",
        "space": b"lr: {low: 1e-4, high: 1e-2, log: true}\nn_layer: {low: 2, high: 6, step: 2}\n"
        b"optimizer: [adamw, muon]\nmomentum: {low: 0.8, high: 0.99, when: {optimizer: muon}}\n",
    }
    header = struct.pack("<3i", MAGIC, 1, 5) + bytes(1012)
    array = io.BytesIO()
    np.save(array, np.arange(9, dtype=np.uint16))
    made["tokens"] = {
        "raw": bytes(range(64)),
        "shard": header + bytes(10),
        "array": array.getvalue(),
    }
    vocab = {name: whole[name] for name in ("vocab.json", "tokenizer_config.json")}
    meta = {"format": 1, "dtype": "uint16", "vocab_size": 17, "train_tokens": 100,
            "val_tokens": 100, "train_characters": 9, "val_characters": 9, "tokenizer": "char",
            "tokenizer_fingerprint": CharTokenizer.train(["abcdefghijklmnop"]).fingerprint(),
            "eos_token_id": None, "split": "position", "files": ["train.bin"], "corpora": [
                {"name": n, "weight": w, "train_tokens": 50, "val_tokens": 50}
                for n, w in (("a", 1.0), ("b", 2))]}  # fmt: skip
    made["prepared"] = {"mixture": joined({"meta.json": json.dumps(meta).encode(), **vocab})}
    made["prompts"] = {
        "lines": b'"Once"\n{"prompt": "upon", "id": 7, "temperature": 0.5, "stop": ["a", "b"]}\n'
        b'{"prompt": "a", "max_new_tokens": 3, "top_k": 5, "top_p": 0.9, "seed": 1}\n'
    }
    made["text"] = {
        "plain": (TEXT + "<|endoftext|>\r\né\u2028😀").encode(),
        "records": b'{"text": "a b", "n": [1, {"a": null}]}\n{"text": "c<|endoftext|>d"}\n\n',
        "array": b'[{"text": "a b", "n": [1, {"a": null}]}, {"text": "c\\r\\n"}]',
        "table": b'id,text\n1,"a ""b"", c"\n2,"d\ne"\n',
        "tabs": b"id\ttext\n1\ta b\n",
        "gzip": gzip.compress(TEXT.encode(), mtime=0),
        "xz": lzma.compress(TEXT.encode()),
        "zip": zipped("text.csv", b"text,n\na,1\n"),
        "utf-16": TEXT.encode("utf-16"),
    }
    made["encoded"] = {
        "western": "Größe, für\n".encode("cp1252") * 3,
        "japanese": "吾輩は猫である\n".encode("cp932"),
        "escapes": "吾輩は猫である\n".encode("iso2022_jp"),
        "wide": "Größe 猫\n".encode("utf-16-le"),
    }
    made["ops"] = {
        f"{name}": bytes([0, place, 0, 0, 13]) + bytes(20)
        for place, name in enumerate(op_arguments.arguments())
    }
    made["logs"] = {
        "csv": joined(
            {
                "log.csv": b"step,tokens,train_loss,val_loss\n0,0,,4.1\n1,64,4.0,\n2,128,nan,3.9\n",
                "config.yaml": b"lr: 0.001\nout: x\n",
            }
        ),
        "lines": joined(
            {"log.jsonl": b'{"step": 1, "train_loss": 4.0}\n{"step": 2, "lr": null}\n'}
        ),
    }
    return made


if __name__ == "__main__":
    for target, inputs in seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (CORPUS / target / name).write_bytes(content)
