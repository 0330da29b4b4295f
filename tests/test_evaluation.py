"""Log-likelihoods and windows, held against transformers by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2, Error, GPT2Config, Tokenizer
from gpt2fast.checkpoints.hub import BUNDLED
from gpt2fast.data import prepare_data
from gpt2fast.evaluation import Request, Scorer
from gpt2fast.evaluation.perplexity import Perplexity
from gpt2fast.evaluation.windows import rolling_windows
from small_predictors import small_predictor

CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2:
    return small_predictor(tokenizer.vocab_size, n_layer=2, n_embd=32, n_positions=CONTEXT)


@pytest.fixture(scope="module")
def reference(model: GPT2, tmp_path_factory: pytest.TempPathFactory):
    """transformers' model with the same weights: (T,) ids -> (T, V) log-probabilities."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def logprobs(ids: list[int]) -> Tensor:
        return theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return logprobs


def make_requests(vocab_size: int, count: int = 24) -> list[Request]:
    """Contexts of 1 to 60 tokens, which the model reads 48 of, with 1 to 4 endings each."""
    draw = random.Random(1)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(draw.randint(low, high))]

    return [
        Request(tokens(1, 60), [tokens(1, 12) for _ in range(1 + number % 4)])
        for number in range(count)
    ]


def by_hand(reference, context: list[int], ending: list[int]) -> tuple[Tensor, Tensor]:
    read = (context + ending)[-(CONTEXT + 1) :][:-1]
    logprobs = reference(read)[-len(ending) :]
    wanted = torch.tensor(ending)
    return logprobs.gather(1, wanted[:, None])[:, 0], logprobs.argmax(-1) == wanted


def test_likelihoods_equal_transformers_one_ending_at_a_time(model, tokenizer, reference) -> None:
    requests = make_requests(tokenizer.vocab_size)
    # So that something is greedy.
    likeliest = reference(requests[1].context[-CONTEXT:])[-1].argmax().item()
    requests[1].endings[0][:] = [likeliest]
    found = Scorer(model, tokenizer, batch_size=5).score(requests)
    assert found[1][0].is_greedy
    for request, likelihoods in zip(requests, found, strict=True):
        for ending, likelihood in zip(request.endings, likelihoods, strict=True):
            logprobs, greedy = by_hand(reference, request.context, ending)
            torch.testing.assert_close(likelihood.logprobs, logprobs, atol=2e-5, rtol=1e-5)
            assert likelihood.greedy.tolist() == greedy.tolist()
            assert likelihood.total == pytest.approx(logprobs.sum().item(), rel=1e-5)


def test_results_do_not_depend_on_the_batch_size(model, tokenizer) -> None:
    requests = make_requests(tokenizer.vocab_size)
    totals = [
        torch.tensor(
            [
                one.total
                for likelihoods in Scorer(model, tokenizer, batch_size=size).score(requests)
                for one in likelihoods
            ]
        )
        for size in (1, 3, 64)
    ]
    for other in totals[1:]:
        torch.testing.assert_close(other, totals[0], atol=1e-5, rtol=1e-5)


@contextmanager
def sizes_seen(module: torch.nn.Module) -> Iterator[list[torch.Size]]:
    """The shapes of what a module is called with."""
    sizes: list[torch.Size] = []
    handle = module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    yield sizes
    handle.remove()


def test_a_shared_context_is_read_once(model, tokenizer) -> None:
    with sizes_seen(model.wte) as sizes:
        Scorer(model, tokenizer).score([Request(list(range(30)), [[5, 6, 7]] * 4)])
    assert sum(size.numel() for size in sizes) == 29 + 4 * 3


@pytest.mark.parametrize("form", ["pack", "int8"])
def test_packed_models_are_scored_by_their_own_logits(model, tokenizer, form) -> None:
    if not model.can_be_packed():
        pytest.skip("no compiled kernels here")
    packed = model.pack() if form == "pack" else model.quantize("int8", method="nearest")
    requests = make_requests(tokenizer.vocab_size, count=8)
    for request, likelihoods in zip(
        requests, Scorer(packed, tokenizer, batch_size=3).score(requests), strict=True
    ):
        for ending, likelihood in zip(request.endings, likelihoods, strict=True):
            read = torch.tensor([(request.context + ending)[-(CONTEXT + 1) :]])
            logits = packed(read[:, :-1]).logits[0, -len(ending) :].double()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ending)[:, None])[:, 0]
            torch.testing.assert_close(likelihood.logprobs, expected, atol=1e-4, rtol=1e-4)


def test_logits_of_many_positions_come_in_pieces(model, tokenizer, monkeypatch) -> None:
    request = Request([1], [list(range(40))])
    whole = Scorer(model, tokenizer).score([request])
    # No setting: the results do not depend on it, and the usual pieces are of many megabytes.
    monkeypatch.setattr("gpt2fast.evaluation.likelihood._CHUNK_BYTES", 1)
    with sizes_seen(model.lm_head) as sizes:
        pieces = Scorer(model, tokenizer).score([request])
    assert [size[0] for size in sizes] == [1] * 40
    torch.testing.assert_close(pieces[0][0].logprobs, whole[0][0].logprobs, atol=1e-5, rtol=1e-5)


def test_an_ending_longer_than_the_model_is_refused(model, tokenizer) -> None:
    with pytest.raises(Error, match="n_positions=48"):
        Scorer(model, tokenizer).score([Request([1], [[2] * 49])])


def test_weights_that_are_not_numbers_are_named(tokenizer) -> None:
    broken = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        broken.get_parameter("ln_f.bias").fill_(float("nan"))
    with pytest.raises(Error, match="not a number"):
        Scorer(broken, tokenizer).score([Request([1], [[2]])])


def test_white_space_before_an_ending_belongs_to_it(model, tokenizer) -> None:
    scorer = Scorer(model, tokenizer)
    context, ending = scorer.encode("Once upon a ", "time")
    assert tokenizer.decode(context) == "Once upon a"
    assert tokenizer.decode(ending) == " time"
    assert scorer.encode("", "time")[0] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("first_token", [None, 7])
def test_windows_predict_each_token_once(length: int, stride: int, first_token) -> None:
    tokens = list(range(100, 100 + length))
    windows = list(rolling_windows(tokens, 16, stride, first_token))
    predicted = [token for _, (ending,) in windows for token in ending]
    if first_token is not None:
        assert predicted == tokens
    elif stride < 16:
        assert predicted == tokens[1:]
    else:  # each window begins with a token that nothing stands before
        assert predicted == [token for place, token in enumerate(tokens) if place % 16]
    text = ([] if first_token is None else [first_token]) + tokens
    for number, (context, (ending,)) in enumerate(windows):
        assert len(context) + len(ending) <= 16 + (first_token is not None)
        # What is read before a token is what stands before it.
        assert "".join(map(chr, context + ending)) in "".join(map(chr, text))
        if number and first_token is not None:
            assert len(context) + len(ending) == 17


def test_strided_perplexity_is_that_of_the_guide(model, tokenizer, reference) -> None:
    """The loop of transformers' guide to perplexity, the mean taken over tokens."""
    draw = random.Random(2)
    tokens = [draw.randrange(tokenizer.vocab_size) for _ in range(200)]
    losses, done = [], 0
    for begin in range(0, len(tokens), 20):
        end = min(begin + CONTEXT, len(tokens))
        logprobs = reference(tokens[begin:end])
        for place in range(max(done, begin + 1), end):
            losses.append(-logprobs[place - 1 - begin, tokens[place]].item())
        done = end
        if end == len(tokens):
            break
    found = Scorer(model, tokenizer).score(list(rolling_windows(tokens, CONTEXT, 20, None)))
    assert len(losses) == 199
    assert -sum(one.total for (one,) in found) == pytest.approx(sum(losses), rel=1e-6)


def test_progress_counts_every_ending(model, tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    requests = make_requests(tokenizer.vocab_size, count=9)
    scorer = Scorer(
        model, tokenizer, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    scorer.score(requests)
    total = sum(len(request.endings) for request in requests)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_importing_the_package_does_not_load_evaluation() -> None:
    import subprocess
    import sys

    code = "import sys, gpt2fast; sys.exit('gpt2fast.evaluation' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_a_text_is_scored_as_training_on_it_reads_it(tmp_path, newline, mark):
    """The tokens of `prepare`, wherever the lines' ends come from and documents are divided."""
    text = "A storm.\nIt blew.\n<|endoftext|>\nThe next\nday.<|endoftext|>Calm\n\nat last.\n"
    path = tmp_path / "book.txt"
    path.write_bytes(mark + text.replace("\n", newline).encode())
    (document,) = Perplexity().read(path)
    data = tmp_path / "data"
    prepare_data(path, data, "char", val_fraction=0.3)
    files = [data / "train.bin", data / "val.bin"]
    prepared = sorted(numpy.concatenate([numpy.fromfile(file, numpy.uint16) for file in files]))
    assert sorted(Tokenizer.from_pretrained(data).encode(document.text)) == prepared
    assert document.text == (
        "A storm.\nIt blew.\n<|endoftext|>The next\nday.<|endoftext|>Calm\n\nat last.\n"
    )
    assert document.units["character"] == len(document.text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_text_of_wide_characters_is_not_scored_as_something_else(tmp_path, encoding):
    path = tmp_path / "book.txt"
    path.write_bytes("A storm blew.".encode(encoding))
    with pytest.raises(Error, match="not UTF-8"):
        Perplexity().read(path)
