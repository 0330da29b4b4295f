"""llm.c's files: the model's logits are those of the weights that were written into it."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2, GPT2Config
from gpt2fast.cli.generate import main as generate
from gpt2fast.cli.train import main as train
from gpt2fast.errors import TokenizerError, WeightsError
from gpt2fast.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer
from gpt2fast.tokenizer.merges import BYTE_TO_CHAR
from small_checkpoints import TINY, assert_same_parameters, random_model, tokens, write_config

# llm.c's model has the tanh form of GELU, no dropout, and an end token in GPT-2's vocabulary alone.
CONFIG = replace(TINY, eos_token_id=None, dropout=None)


def model_file(path: Path, model: GPT2, *, rows: int = 128, **header: int) -> Path:
    """Write a model like write_model of llm.c's train_gpt2.py: by kind of tensor, (out, in)."""
    config, state = model.config, model.state_dict()
    fields = {
        "magic": 20240326,
        "version": 3 if model.dtype == torch.float32 else 5,
        "positions": config.n_positions,
        "vocabulary": config.vocab_size,
        "layers": config.n_layer,
        "heads": config.n_head,
        "width": config.n_embd,
        "rows": rows,
    } | header
    order: list[Tensor] = [
        torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, rows - config.vocab_size)),
        state["wpe.weight"],
    ]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            order += [state[f"h.{i}.{module}.{part}"].t() for i in range(config.n_layer)]
    order += [state["ln_f.weight"], state["ln_f.bias"]]
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", *fields.values(), *[0] * (256 - len(fields))))
        for tensor in order:
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("rows", [61, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_file_gives_the_weights_that_were_written(tmp_path, dtype, rows):
    model = random_model(CONFIG, dtype)
    path = model_file(tmp_path / "model_00000010.bin", model, rows=rows)
    write_config(tmp_path, n_layer=7)  # of another model: the file describes its own
    loaded = GPT2.from_pretrained(path)
    assert loaded.config == CONFIG and loaded.dtype == dtype
    assert_same_parameters(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert GPT2.from_pretrained(path, dtype="float64").dtype == torch.float64
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in GPT2.from_pretrained(path).parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_gpt2s_own_vocabulary_has_gpt2s_end_token(tmp_path):
    config = GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1, dropout=0.0)
    path = model_file(tmp_path / "gpt2.bin", random_model(config), rows=50304)
    assert GPT2.from_pretrained(path).config == config


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"version": 1}, "of version 1; read are 3"),
        ({"version": 2}, "of version 2; read are 3"),
        ({"rows": 0}, "of version 3 without padded vocabulary"),
        ({"rows": 60}, "has 61 token ids, and a token embedding of 60 rows"),
        ({"heads": 5}, "n_head=5"),
        ({"heads": 0}, "n_head=0"),
        ({"layers": -1}, "n_layer=-1"),
        ({"layers": 2**31 - 1}, "n_layer=2147483647"),
        ({"width": 2**23, "heads": 1, "layers": 4000}, "has 1351"),
        ({"layers": 3}, "which has .* bytes, but it has"),
        ({"version": 5}, "which has .* bytes, but it has"),
        ({"magic": 20240327}, "is llm.c's activations"),
        ({"magic": 20240328}, "is llm.c's tokenizer"),
        ({"magic": 20240520}, "is llm.c's training data"),
        ({"magic": 1}, "is not a checkpoint"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_before_memory_is_taken(tmp_path, header, reason):
    path = model_file(tmp_path / "model.bin", random_model(CONFIG), **{"rows": 128} | header)
    with pytest.raises(WeightsError, match=f"model.bin .*{reason}"):
        GPT2.from_pretrained(path)


@pytest.mark.parametrize("change", ["a byte less", "a byte more", "the header alone", "half of it"])
def test_a_file_of_another_length_is_refused(tmp_path, change):
    path = model_file(tmp_path / "model.bin", random_model(CONFIG))
    data = path.read_bytes()
    path.write_bytes(
        {"a byte less": data[:-1], "a byte more": data + b"\0"}.get(
            change, data[: 1024 if change == "the header alone" else 500]
        )
    )
    with pytest.raises(WeightsError, match=r"model\.bin .*bytes"):
        GPT2.from_pretrained(path)


def test_the_command_lines_take_a_model_file(tmp_path, capsys):
    text = "the cat sat on the mat; the dog sat on the cat. " * 40
    (tmp_path / "text.txt").write_text(text)
    tokenizer = CharTokenizer.train([text])
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, dropout=None)
    path = model_file(tmp_path / "model.bin", random_model(config))
    tokenizer.save_pretrained(tmp_path / "characters")
    options = ["--max-new-tokens", "4", "--greedy", "the cat"]
    characters = str(tmp_path / "characters")
    assert generate(["--model", str(path), "--tokenizer", characters, *options]) == 0
    assert capsys.readouterr().out.startswith("the cat")

    def trained(out: str, *more: str) -> int:
        arguments = ["--init-from", str(path), "--data", str(tmp_path / "text.txt"), "--out", out]
        settings = ["--max-steps", "2", "--block-size", "8", "--batch-size", "2", "--threads", "1"]
        return train([*arguments, *settings, *more])

    assert trained(str(tmp_path / "none")) == 2
    assert re.search(r"model\.bin has no tokenizer.*--tokenizer", capsys.readouterr().err)
    assert generate(["--model", str(path), *options]) != 0
    assert re.search(r"holds no tokenizer.*--tokenizer", capsys.readouterr().err)

    assert trained(str(tmp_path / "named"), "--tokenizer", characters) == 0
    tokenizer.save_pretrained(tmp_path)  # beside it
    assert trained(str(tmp_path / "beside")) == 0
    assert generate(["--model", str(path), *options]) == 0
    assert generate(["--model", str(tmp_path / "named"), *options]) == 0


# gpt2_tokenizer.bin


def tokenizer_file(folder: Path, tokenizer: BPETokenizer, version: int = 2) -> Path:
    """Write a tokenizer like write_tokenizer of llm.c's train_gpt2.py."""
    end = tokenizer.eos_token_id
    bytes_of = {character: bytes([byte]) for byte, character in BYTE_TO_CHAR.items()}
    tokenizer.save_pretrained(folder / "saved")
    vocab = json.loads((folder / "saved" / "vocab.json").read_text())
    tokens = [
        END_OF_TEXT.encode() if token == END_OF_TEXT else b"".join(map(bytes_of.__getitem__, token))
        for token in sorted(vocab, key=vocab.get)
    ]
    header = [20240328, version, len(tokens), end if version == 2 else 0]
    path = folder / "gpt2_tokenizer.bin"
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", *header, *[0] * 252))
        for token in tokens:
            file.write(struct.pack("<B", len(token)) + token)
    return path


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    pages = Path(__file__).parents[1].joinpath("docs").glob("*.md")
    return BPETokenizer.train([page.read_text() for page in pages], vocab_size=3000)


@pytest.mark.parametrize("version", [1, 2])
def test_llm_cs_tokenizer_encodes_as_the_one_that_it_was_written_from(tmp_path, trained, version):
    path = tokenizer_file(tmp_path, trained, version)
    for place in (tmp_path, path):
        loaded = Tokenizer.from_pretrained(place)
        assert loaded.fingerprint() == trained.fingerprint()
        text = Path(__file__).read_text() + "naïve 字 😀  \n\n<|endoftext|>\tx"
        assert loaded.encode(text) == trained.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.eos_token_id == trained.eos_token_id


def test_llm_cs_folder_generates(tmp_path, trained, capsys):
    tokenizer_file(tmp_path, trained)
    config = replace(CONFIG, vocab_size=trained.vocab_size, dropout=None)
    path = model_file(tmp_path / "gpt2_124M.bin", random_model(config), rows=3072)
    assert generate(["--model", str(path), "--greedy", "--max-new-tokens", "3", "The model"]) == 0
    assert capsys.readouterr().out.startswith("The model")


def test_a_broken_tokenizer_of_llm_c_is_one_error(tmp_path, trained):
    path = tokenizer_file(tmp_path, trained)
    whole = path.read_bytes()
    twice = whole[:1024] + b"\x01!" * 3000
    long = whole[:8] + struct.pack("<i", 3000) + whole[12:1024] + (b"\xff" + b"!" * 255) * 3000
    strange = whole.replace(b"\x03the", b"\x03\xff\xfe\xfd")
    assert strange != whole
    for damaged in (
        b"",
        whole[:1023],
        whole[:-1],
        whole + b"\0",
        twice,
        long,
        strange,
        whole[1024:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(TokenizerError, match="gpt2_tokenizer.bin"):
            Tokenizer.from_pretrained(tmp_path)
    for place, number in ((1, 3), (2, 2999), (2, 2**31 - 1), (2, -1), (3, 3000), (3, -1)):
        path.write_bytes(whole[: 4 * place] + struct.pack("<i", number) + whole[4 * place + 4 :])
        with pytest.raises(TokenizerError, match="gpt2_tokenizer.bin"):
            Tokenizer.from_pretrained(tmp_path)
