"""The script that runs transformers' own tests on fused models, on a checkout of a few tests."""

from __future__ import annotations

import upstream

CASES = """
import unittest
import transformers


class GPT2ModelTest(unittest.TestCase):
    def build(self):
        config = transformers.GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=31, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config)

    def test_same(self):
        self.assertIsInstance(self.build(), transformers.GPT2LMHeadModel)

    def test_never(self):
        self.fail("either way")

    def test_sdpa_can_dispatch_non_composite_models(self):
        self.assertEqual(self.build().config._attn_implementation, "sdpa")

    def test_only_plain(self):
        self.assertTrue(type(self.build()).__module__.startswith("transformers."))

    @unittest.skip("no")
    def test_skipped(self):
        pass
"""


def checkout(folder, cases):
    for name in upstream.TESTS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cases if "gpt2" in name and "image" not in name else "")
    return str(folder)


def test_what_fails_on_fused_models_alone_is_named(tmp_path, capsys):
    assert upstream.main([checkout(tmp_path, CASES)]) == 1
    out = capsys.readouterr().out
    assert (
        "1 tests pass both ways, 1 are skipped, 1 fail on plain models, 3 on fused ones, "
        "2 on fused ones alone"
    ) in out
    assert "GPT2ModelTest.test_only_plain: AssertionError" in out
    assert "test_never" not in out and "test_same" not in out
    assert "dispatch_non_composite_models: AssertionError" in out and "    expected: it asks" in out


def test_what_is_expected_is_no_failure(tmp_path, capsys):
    expected = CASES.replace("test_only_plain", "only_plain")
    assert upstream.main([checkout(tmp_path / "checkout", expected)]) == 0
    assert upstream.main([str(tmp_path)]) == 2
    assert "has no tests/models/gpt2" in capsys.readouterr().out
