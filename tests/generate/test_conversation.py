"""--interactive: one growing text."""

from __future__ import annotations

from generate_command import TEXT


def converse(run, *lines, flags=()):
    flags = ["--interactive", "--seed", 2, "--max-new-tokens", 12, *flags]
    return run(*flags, stdin="".join(line + "\n" for line in lines))


def answer(generator, text, seed=2, **options):
    return generator(text, **{"seed": seed, "max_new_tokens": 12, **options}).text


def test_a_conversation_is_one_growing_text(run, generator):
    code, out, _err = converse(run, "The cat", "The dog", "")
    first = answer(generator, "The cat")
    second = answer(generator, f"The cat{first}\nThe dog", seed=3)
    third = answer(generator, f"The cat{first}\nThe dog{second}", seed=4)
    assert code == 0
    assert out == f"{first}\n{second}\n{third}\n"


def test_a_conversation_may_begin_with_the_prompt(run, generator):
    for flags in (["The cat"], ["--prompt", "The cat"]):
        assert converse(run, flags=flags)[1] == f"The cat{answer(generator, 'The cat')}\n"


def test_reset_forgets_and_set_changes(run, generator):
    code, out, err = converse(run, "The cat", "/reset", "/set top-k 1", "The dog")
    assert code == 0
    assert out.splitlines()[-1] == answer(generator, "The dog", seed=3, top_k=1)
    code, out, err = converse(run, "/set temperature none", "/set max_new_tokens 5", "/set", "The")
    assert out == answer(generator, "The", temperature=None, max_new_tokens=5) + "\n"
    assert "  temperature none\n" in err
    assert "  max_new_tokens 5\n" in err


def test_save_writes_the_text(run, generator, tmp_path):
    file = tmp_path / "story.txt"
    code, _, err = converse(run, "The cat", f"/save {file}", "/quit", "never read")
    assert code == 0
    assert file.read_text(encoding="utf-8") == "The cat" + answer(generator, "The cat")
    assert str(file) in err


def test_mistakes_do_not_end_a_conversation(run, generator, tmp_path):
    mistakes = {
        "/set temperature nan": "temperature is nan",
        "/set temperature": "takes a number",
        "/set top_k 1.5": "whole number",
        "/set color 3": "color",
        "/jump": "/jump",
        "/save": "file name",
        f"/save {tmp_path}/no/where.txt": "where.txt",
    }
    code, out, err = converse(run, *mistakes, "/help", "The cat")
    assert code == 0
    assert out == answer(generator, "The cat") + "\n"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for line, part in zip(errors, mistakes.values(), strict=True):
        assert part in line
    for command in ("/set", "/reset", "/save", "/quit"):
        assert command in err


def test_a_text_that_is_too_long_does_not_end_a_conversation(run, generator):
    code, out, err = converse(run, TEXT * 5, "/reset", "The cat", flags=["--window", "error"])
    assert code == 0
    assert out == answer(generator, "The cat", seed=3) + "\n"
    assert "n_positions=64" in err
