"""The tasks' readers and scores."""

from __future__ import annotations

import bz2
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config, Tokenizer
from gpt2fast.checkpoints.hub import BUNDLED
from gpt2fast.evaluation import (
    TASKS,
    Choice,
    ChoiceTask,
    Scorer,
    Settings,
    evaluate,
    hellaswag,
    wikitext,
)
from gpt2fast.evaluation.cbt import CommonNouns, NamedEntities
from gpt2fast.evaluation.cbt import detokenize as detokenize_cbt
from gpt2fast.evaluation.compression import Enwik8, Text8
from gpt2fast.evaluation.hellaswag import HellaSwag
from gpt2fast.evaluation.lambada import Lambada
from gpt2fast.evaluation.published import published_size
from gpt2fast.evaluation.results import as_object, as_table
from gpt2fast.evaluation.sources import load
from gpt2fast.evaluation.wikitext import WikiText2, WikiText2Joined
from gpt2fast.tokenizer import CharTokenizer
from small_predictors import small_predictor

CBT = """\
1 `` It 's a fine day , '' said the fox -LRB- who was sly -RRB- .
2 He did n't go .
3 The XXXXX 's tail was long , and the fox went home .\tfox\t\tdog|fox|hen

1 Once there was a king .
2 He had a `` XXXXX '' .\tcrown\t\tcrown|dog|hen

"""
WIKI = """\
 \n = One = \n \n He had a role @-@ a small one . \n = = Part = = \n \n It cost 1 @,@ 000 . \n \
\n = Two = \n \n More " words " here . \n"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2:
    return small_predictor(tokenizer.vocab_size, n_layer=1, n_embd=16, n_positions=32)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def test_perplexities_divide_one_likelihood_by_each_unit(model, tokenizer, tmp_path) -> None:
    text = "Once upon a time,\nthere was an émigré. " * 9
    file = write(tmp_path / "text.txt", text)
    (result,) = evaluate(model, tokenizer, ["perplexity"], data={"perplexity": file})
    tokens = tokenizer.encode(text)
    total = 0.0
    read = [tokenizer.eos_token_id, *tokens]
    for begin in range(0, len(tokens), 32):
        end = min(begin + 32, len(tokens))
        start = begin if begin == 0 else end - 32  # the last window is a full one
        logits = model(torch.tensor([read[max(0, start) : end]])).logits[0]
        kept = logits.log_softmax(-1)[-(end - begin) :]
        total += kept.gather(1, torch.tensor(tokens[begin:end])[:, None]).sum().item()
    units = {
        "token": len(tokens),
        "word": len(text.split()),
        "byte": len(text.encode()),
        "character": len(text),
    }
    for unit, count in units.items():
        value = result.metrics[f"{unit}_perplexity"].value
        assert value == pytest.approx(math.exp(-total / count), rel=1e-4)
    for unit in ("byte", "character"):
        bits = -total / units[unit] / math.log(2)
        assert result.metrics[f"bits_per_{unit}"].value == pytest.approx(bits, rel=1e-5)


def test_the_batch_size_changes_no_score(model, tokenizer, tmp_path) -> None:
    wiki, cbt = write(tmp_path / "wiki", WIKI * 3), write(tmp_path / "cbt.txt", CBT)
    data = {"wikitext2": wiki, "cbt_cn": cbt}
    first, second = (
        evaluate(model, tokenizer, list(data), data=data, batch_size=size) for size in (1, 7)
    )
    for one, other in zip(first, second, strict=True):
        for name, metric in one.metrics.items():
            assert other.metrics[name].value == pytest.approx(metric.value, rel=1e-5)


def test_limit_keeps_the_first_windows_of_a_text(model, tokenizer, tmp_path) -> None:
    text = "The wolf and the fox went into the wood. " * 40
    scores = []
    for content, limit in ((text, 2), (tokenizer.decode(tokenizer.encode(text)[:64]), None)):
        file = write(tmp_path / "text.txt", content)
        scores += evaluate(
            model, tokenizer, ["perplexity"], data={"perplexity": file},
            settings=Settings(limit=limit),
        )  # fmt: skip
    assert scores[0].metrics == scores[1].metrics


def test_a_smaller_stride_reads_more_before_each_token(model, tokenizer, tmp_path) -> None:
    file = write(tmp_path / "text.txt", "The wolf and the fox went into the wood. " * 20)
    values = set()
    for settings in (
        Settings(),
        Settings(stride=8),
        Settings(context=8),
        Settings(first_token=False),
    ):
        (result,) = evaluate(
            model, tokenizer, ["perplexity"], data={"perplexity": file}, settings=settings
        )
        values.add(result.metrics["token_perplexity"].value)
    assert len(values) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 33}, "at most 32"),
        ({"context": 8, "stride": 9}, "stride is 9"),
        ({"context": 1, "first_token": False}, "take 2 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, tokenizer, tmp_path, settings, words) -> None:
    file = write(tmp_path / "text.txt", "The wolf and the fox.")
    with pytest.raises(Error, match=words):
        evaluate(
            model, tokenizer, ["perplexity"], data={"perplexity": file},
            settings=Settings(**settings),
        )  # fmt: skip


def test_wikitext_is_split_into_articles_and_counted_as_it_was(tmp_path) -> None:
    documents = WikiText2().read(write(tmp_path / "wiki.raw", WIKI))
    assert [document.text.strip().split("\n")[0] for document in documents] == [
        "= One =",
        "= Two =",
    ]
    assert "a role-a small one. " in documents[0].text.replace("\n", " ")
    assert "cost 1,000" in documents[0].text
    assert '"words"' in documents[1].text
    # Words, and an <eos> for each line.
    expected = len(WIKI.split()) + WIKI.count("\n")
    assert sum(document.units["original_token"] for document in documents) == expected


def test_wikitext2_has_its_published_counts(data_dir) -> None:
    path = data_dir / "wiki.test.raw"
    documents = WikiText2().read(path)
    assert len(documents) == 62
    assert sum(document.units["original_token"] for document in documents) == 245_569
    (joined,) = WikiText2Joined().read(path)
    tokens = Tokenizer.from_pretrained(data_dir / "gpt2").encode(joined.text)
    assert len(tokens) == 287_644


def test_lambada_reads_both_spellings_and_scores_the_last_word(model, tokenizer, tmp_path) -> None:
    passages = ["The wolf ate the\n\ngrandmother", "Once upon a time there was a king"]
    texts = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in passages))
    split = [text.rsplit(" ", 1) for text in passages]
    parts = write(
        tmp_path / "b.jsonl",
        "".join(json.dumps({"context": a, "continuation": b}) + "\n" for a, b in split),
    )
    assert Lambada().read(texts) == Lambada().read(parts)
    (result,) = evaluate(model, tokenizer, ["lambada"], data={"lambada": texts})
    words, lasts = [], []
    for context, word in split:
        before, both = tokenizer.encode(context), tokenizer.encode(f"{context} {word}")
        assert both[: len(before)] == before
        logprobs = model(torch.tensor([both])).logits[0].log_softmax(-1)
        each = [logprobs[at - 1, both[at]].item() for at in range(len(before), len(both))]
        words.append(sum(each))
        lasts.append(each[-1])
    value = result.metrics["perplexity"].value
    assert value == pytest.approx(math.exp(-sum(words) / 2), rel=1e-4)
    value = result.metrics["perplexity_last_token"].value
    assert value == pytest.approx(math.exp(-sum(lasts) / 2), rel=1e-4)


def test_hellaswag_is_prepared_as_the_harness_does(tmp_path) -> None:
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Take flour. [step] Mix",
        "ctx_b": "the cook",
        "endings": ["[substeps] eats.", "runs [title] Away", "sings", "[step] waits"],
        "label": "2",
    }
    file = write(tmp_path / "hellaswag_val.jsonl", json.dumps(row) + "\n")
    (choice,) = HellaSwag().read(file)
    assert choice.context == "Baking: How to bake.  Take flour. Mix The cook".replace(".  ", ". ")
    assert list(choice.endings) == ["  eats.", " runs. Away", " sings", "  waits"]
    assert choice.gold == 2


def test_hellaswag_in_six_lines(tmp_path) -> None:
    text = "A: he\n1\nruns.\nwaits.\nsings.\neats.\n" * 2
    path = tmp_path / "h.txt.bz2"
    path.write_bytes(bz2.compress(text.encode()))
    choices = HellaSwag().read(path)
    assert choices == [Choice("A: he", [" runs.", " waits.", " sings.", " eats."], 1)] * 2


def test_hellaswag_has_its_published_size(data_dir) -> None:
    assert len(HellaSwag().read(data_dir / "hellaswag_val_full.txt.bz2")) == 10_042
    assert len(Lambada().read(data_dir / "lambada_test.jsonl")) == 5_153


def test_accuracy_is_by_likelihood_and_acc_norm_by_characters(model, tokenizer) -> None:
    class Two(ChoiceTask):
        name = "two"
        about = ""

        def read(self, path: Path) -> list[Choice]:
            raise NotImplementedError

    examples = [
        Choice("Once upon a time", [" there was a king who had a daughter", " he"], gold)
        for gold in (0, 1, 1)
    ]
    count, metrics = Two().evaluate(examples, Scorer(model, tokenizer), Settings())
    totals = []
    for ending in examples[0].endings:
        before = tokenizer.encode(examples[0].context)
        both = tokenizer.encode(examples[0].context + ending)
        logprobs = model(torch.tensor([both])).logits[0].log_softmax(-1)
        totals.append(sum(logprobs[i - 1, both[i]].item() for i in range(len(before), len(both))))
    assert totals[1] > totals[0] and totals[0] / 35 > totals[1] / 2  # so the two differ
    assert count == 3
    assert metrics["acc"].value == pytest.approx(2 / 3)
    assert metrics["acc_norm"].value == pytest.approx(1 / 3)
    assert metrics["acc"].stderr == pytest.approx(1 / 3)  # sqrt((2/3)(1/3)(3/2) / 3)


def test_cbt_puts_each_candidate_into_the_sentence(tmp_path) -> None:
    first, second = CommonNouns().read(write(tmp_path / "cbt.txt", CBT))
    assert first.context == ("\"It's a fine day,\" said the fox (who was sly). He didn't go. The")
    assert first.endings[1] == " fox's tail was long, and the fox went home."
    assert (first.gold, second.gold) == (1, 0)
    # No space between the quotation mark and the word.
    assert second.context + second.endings[0] == 'Once there was a king. He had a "crown".'
    row = {
        "sentences": ["Once there was a king ."],
        "question": "He had a `` XXXXX '' .",
        "answer": "crown",
        "options": ["crown", "dog", "hen"],
    }
    file = write(tmp_path / "cbt.jsonl", json.dumps(row) + "\n")
    assert NamedEntities().read(file) == [second]


def test_cbt_marks_of_tokens_are_undone() -> None:
    tokens = "`` Do n't ! '' cried the boys ' dog ; `` I 'm here -LRB- now -RRB- , it 's late ? ''"
    expected = "\"Don't!\" cried the boys' dog; \"I'm here (now), it's late?\""
    assert detokenize_cbt(tokens) == expected


def test_enwik8_is_its_last_five_megabytes(tmp_path, monkeypatch) -> None:
    # enwik8 has a hundred million bytes.
    monkeypatch.setattr("gpt2fast.evaluation.compression._WHOLE", 100)
    monkeypatch.setattr("gpt2fast.evaluation.compression._TEST", 20)
    # The cut before the last twenty bytes, and the end, each go through a character.
    data = b"x" * 79 + "é".encode() + b"test </a> and more" + "é".encode()[:1]
    assert len(data) == 100
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", data)
    (document,) = Enwik8().read(tmp_path / "enwik8.zip")
    assert document.text == "test </a> and more"
    assert document.units["byte"] == 18
    write(tmp_path / "text8", "a b c" * 4)
    assert Text8().read(tmp_path / "text8")[0].text == "a b c" * 4


@pytest.mark.parametrize(
    ("task", "name", "content", "words"),
    [
        ("lambada", "a.jsonl", "{broken", "line 1: it is not valid JSON"),
        ("lambada", "a.jsonl", '["text"]', "not a JSON object"),
        ("lambada", "a.jsonl", '{"words": 1}', "needs 'text'"),
        ("lambada", "a.jsonl", '{"text": "ends in a space "}', "ends in no word"),
        ("lambada", "a.jsonl", "", "holds no examples"),
        ("hellaswag", "a.txt", "one\ntwo\n", "no multiple of six"),
        ("hellaswag", "a.txt", "a\n7\nb\nc\nd\ne\n", "not the index"),
        ("hellaswag", "a.jsonl", '{"ctx_a": "x"}', "needs 'ctx_b'"),
        ("cbt_cn", "a.txt", "1 A XXXXX .\tfox\n", "not 2 parts"),
        ("cbt_cn", "a.txt", "1 A XXXXX .\tfox\t\tdog|hen\n", "not among the candidates"),
        ("cbt_cn", "a.txt", "1 A dog .\tfox\t\tdog|fox\n", "no single XXXXX"),
        ("perplexity", "a.txt.gz", "not gzip", "cannot be unpacked"),
        ("perplexity", "missing.txt", None, "is no file"),
    ],
)
def test_broken_data_are_told_in_one_line(tmp_path, task, name, content, words) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(Error, match=words) as caught:
        load(TASKS[task](), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc \xff def and more")
    for task in ("perplexity", "enwik8"):
        with pytest.raises(Error, match="at byte 4"):
            load(TASKS[task](), tmp_path / "a.txt")


def test_data_are_looked_for_in_the_folder_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GPT2FAST_DATA", str(tmp_path))
    file = write(tmp_path / "lambada_test.jsonl", '{"text": "a king"}\n')
    place, examples = load(Lambada())
    assert place == str(file) and examples == [("a", "king")]


def test_missing_data_say_where_they_are_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GPT2FAST_DATA", str(tmp_path))
    with pytest.raises(Error, match="mattmahoney"):
        load(TASKS["enwik8"]())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(Error, match=r"gpt2fast\[datasets\]") as caught:
        load(TASKS["hellaswag"]())
    assert "hellaswag_val.jsonl" in str(caught.value)


def test_rows_of_the_hub_are_the_files_rows(monkeypatch) -> None:
    import sys
    import types

    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [{"page": page} for page in wikitext.pages(WIKI)]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    place, documents = load(WikiText2())
    assert asked == [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")]
    assert "wikitext_document_level" in place and len(documents) == 2
    assert hellaswag.HellaSwag.hub is not None

    def offline(*arguments, **named):
        raise ConnectionError("no network\nhere")

    module.load_dataset = offline
    with pytest.raises(Error, match="cannot be had from the hub") as caught:
        load(WikiText2())
    assert "\n" not in str(caught.value) and "--data FILE" in str(caught.value)


def test_the_papers_figures_stand_beside_its_models_only(model, tokenizer, tmp_path) -> None:
    assert published_size("gpt2", GPT2Config.preset("gpt2")) == 0
    assert published_size("openai-community/gpt2-xl", GPT2Config.preset("gpt2-xl")) == 3
    assert published_size("gpt2", model.config) is None
    assert published_size("out/run", GPT2Config.preset("gpt2")) is None
    file = write(tmp_path / "a.jsonl", '{"text": "a king"}\n')
    results = evaluate(model, tokenizer, ["lambada"], data={"lambada": file})
    assert "35.13" in as_table(results, 0) and "stop words" in as_table(results, 0)
    assert "GPT-2 paper" not in as_table(results, None)
    shown = as_object(results, 1)["lambada"]["metrics"]
    assert shown["perplexity"]["paper"] == 15.60
    assert "paper" not in as_object(results, None)["lambada"]["metrics"]["perplexity"]


def test_a_tokenizer_without_end_of_text_skips_the_first_token(tmp_path) -> None:
    text = "a wolf and a fox " * 9
    tokenizer = CharTokenizer.train([text])
    model = GPT2(
        GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32, vocab_size=tokenizer.vocab_size)
    )
    file = write(tmp_path / "text.txt", text)
    data = {"perplexity": file}
    given, skipped = (
        evaluate(model, tokenizer, ["perplexity"], data=data, settings=settings)[0].metrics
        for settings in (Settings(), Settings(first_token=False))
    )
    assert given == skipped
    with pytest.raises(Error, match="no end-of-text token"):
        evaluate(model, tokenizer, ["perplexity"], data=data, settings=Settings(first_token=True))
