"""The fields of every request, defined once: they are checked by this, and described by it."""

from __future__ import annotations

from typing import Any

from .._system.docstrings import field_docstrings
from .._system.parsing import MOST_VALUES
from ..sampling import PROCESSORS, STEPWISE, Processor, SamplingOptions
from .fields import (
    AnyObject,
    Flag,
    Inputs,
    Kind,
    ListOf,
    Member,
    Number,
    OneOf,
    OneOrMore,
    Structure,
    Text,
    Tokens,
    Variants,
    Whole,
)
from .limits import Limits

LONGEST_GRAMMAR = 64 << 10
"""Characters of a regex or a grammar."""
_LARGEST_SEED = 2**63 - 1
_LARGEST_COUNT = 2**31 - 1
_MOST_STOPS = 16
_LONGEST_STOP = 1000

_IGNORED = {
    "user": Member(Text(longest=1000), "Kept for OpenAI's clients; nothing is done with it."),
    "metadata": Member(AnyObject(), "Kept for OpenAI's clients; nothing is done with it."),
}

_NOT_SERVED = {"penalty_alpha": "the engine has no contrastive search, which Generator has"}
"""Options of sampling that the engine does not have, and why."""

_OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


class Parameters:
    """The bodies of all endpoints of one model.

    Args:
        limits: the server's.
        positions: tokens that the model can see.
        vocabulary: number of its token ids that its tokenizer has, too.
        width: of its embeddings.
        heads: (layers, heads) of its attention.
    """

    def __init__(
        self,
        limits: Limits,
        positions: int,
        vocabulary: int,
        width: int,
        heads: tuple[int, int],
    ) -> None:
        self._limits, self._positions, self._vocabulary = limits, positions, vocabulary
        self.max_tokens = min(positions, limits.max_tokens or positions)
        self.max_choices = limits.max_choices
        self.max_prompt_tokens = min(positions, limits.max_prompt_tokens or positions)
        ours = limits.max_prompt_tokens is not None and limits.max_prompt_tokens < positions
        self._prompt_limit = "the server's max_prompt_tokens" if ours else "the model's n_positions"
        self.completion = self._completion()
        self.chat = self._chat()
        self.embedding = self._embedding(width)
        self.tokenize = Structure(
            {
                "model": _MODEL,
                "prompt": Member(Text(), "The text.", required=True),
                "add_special_tokens": Member(
                    Flag(), "Put the tokens around it that the tokenizer asks for.", default=True
                ),
            }
        )
        self.detokenize = Structure(
            {
                "model": _MODEL,
                "tokens": Member(
                    Tokens(vocabulary, MOST_VALUES, "what a body may hold", least=0),
                    "Token ids.",
                    required=True,
                ),
            }
        )
        layers, count = heads
        self.attention = Structure(
            {
                "prompt": Member(Text(), "The text; or give tokens."),
                "tokens": Member(self._tokens(positions), "Token ids of the text."),
                "layer": Member(Whole(0, layers - 1, "model's layers"), "From 0.", default=0),
                "head": Member(Whole(0, count - 1, "model's heads"), "From 0.", default=0),
            }
        )

    def _tokens(self, most: int) -> Tokens:
        return Tokens(self._vocabulary, most, self._prompt_limit)

    def _sampling(self) -> dict[str, Member]:
        """Fields of `SamplingOptions`, in OpenAI's names where it has them."""
        texts = field_docstrings(SamplingOptions)
        found = {}
        for name, option in {**PROCESSORS, **STEPWISE}.items():
            if name in _NOT_SERVED:
                continue
            default = _OPENAI_DEFAULTS.get(name)
            found[name] = Member(_kind(option), texts[name], default=default)
        found["temperature"] = Member(
            Number(0, 100), texts["temperature"], default=_OPENAI_DEFAULTS["temperature"]
        )
        return {
            **found,
            "logit_bias": Member(AnyObject(), texts["logit_bias"]),
            "seed": Member(Whole(0, _LARGEST_SEED), "Makes the draws repeatable."),
            "stop": Member(
                OneOrMore(Text(1, _LONGEST_STOP), _MOST_STOPS),
                "Texts that end a choice, and are left out of it.",
            ),
            "stop_token_ids": Member(
                ListOf(Whole(0, self._vocabulary - 1, "model's vocabulary"), 64),
                "More tokens that end a choice, and are left out of its text.",
            ),
            "ignore_eos": Member(Flag(), "Go on after end tokens.", default=False),
            "min_tokens": Member(
                Whole(0, self.max_tokens, "max_tokens"), "No end before this many tokens."
            ),
            "n": Member(
                Whole(1, self._limits.max_choices, "max_choices"), "Choices of each text.",
                default=1,
            ),
            "stream": Member(Flag(), "Send the answer piece by piece.", default=False),
            "stream_options": Member(
                Structure(
                    {"include_usage": Member(Flag(), "A last piece has the usage.", default=False)},
                    {"include_obfuscation": "answers are not padded"},
                ),
                "Only with stream.",
            ),
            "return_token_ids": Member(
                Flag(), "Token ids of prompts and choices, too.", default=False
            ),
            "response_format": Member(self._formats(), "What the text must be like."),
        }  # fmt: skip

    def _formats(self) -> Variants:
        grammar = Text(1, LONGEST_GRAMMAR)
        return Variants(
            {
                "text": Structure({}),
                "json_object": Structure({}),
                "json_schema": Structure(
                    {
                        "json_schema": Member(
                            Structure(
                                {
                                    "name": Member(Text(longest=1000)),
                                    "description": Member(Text(longest=10_000)),
                                    "schema": Member(AnyObject(), "a JSON Schema.", required=True),
                                    "strict": Member(Flag(), "Always so."),
                                }
                            ),
                            "an object with a schema.",
                            required=True,
                        )
                    }
                ),
                "regex": Structure(
                    {"regex": Member(grammar, "a regular expression.", required=True)}
                ),
                "choice": Structure(
                    {
                        "choices": Member(
                            ListOf(Text(1, 10_000), 1000, 1), "a list of texts.", required=True
                        )
                    }
                ),
                "lark": Structure(
                    {"lark": Member(grammar, "a grammar in Lark's notation.", required=True)}
                ),
            }
        )

    def _completion(self) -> Structure:
        limits = self._limits
        prompt = Inputs(Text(), self._tokens(self.max_prompt_tokens), limits.max_prompts)
        return Structure(
            {
                "model": _MODEL,
                "prompt": Member(
                    prompt, "A text, a list of texts, token ids, or a list of such lists.",
                    required=True,
                ),
                "max_tokens": Member(
                    Whole(0, self.max_tokens, "max_tokens"),
                    "Most new tokens. Left out, it is 16, or what is left of the model's context.",
                ),
                **self._sampling(),
                "best_of": Member(
                    Whole(1, limits.max_choices, "max_choices"),
                    "Make so many choices, and answer with the n likeliest ones by token.",
                ),
                "echo": Member(Flag(), "Begin each choice with its prompt.", default=False),
                "logprobs": Member(
                    Whole(0, limits.max_logprobs, "max_logprobs"),
                    "Log-probabilities of the tokens (of the prompt's, too, with echo), and of so "
                    "many of the likeliest ones in the place of each.",
                ),
                **_IGNORED,
            },
            {
                "suffix": "GPT-2 continues texts, and cannot fill in what comes before an end",
                "store": "nothing is stored",
                **_NOT_SERVED,
            },
        )  # fmt: skip

    def _chat(self) -> Structure:
        part = Variants({"text": Structure({"text": Member(Text(), "a text.", required=True)})})
        message = Structure(
            {
                "role": Member(
                    OneOf(("system", "developer", "user", "assistant")),
                    "who says it.",
                    required=True,
                ),
                "content": Member(_TextOrParts(part), "a text.", required=True),
                "name": Member(Text(longest=100), "Nothing is done with it."),
            },
            {
                "tool_calls": "the model calls no tools",
                "function_call": "the model calls no functions",
                "refusal": "the model refuses nothing",
                "audio": "the model reads texts only",
            },
        )
        most = Whole(1, self.max_tokens, "max_tokens")
        return Structure(
            {
                "model": _MODEL,
                "messages": Member(ListOf(message, 1000, 1), "the conversation.", required=True),
                "max_completion_tokens": Member(
                    most, "Most new tokens. Left out, it is what is left of the model's context."
                ),
                "max_tokens": Member(most, "The older name of max_completion_tokens."),
                **self._sampling(),
                "logprobs": Member(Flag(), "Log-probabilities of the tokens.", default=False),
                "top_logprobs": Member(
                    Whole(0, self._limits.max_logprobs, "max_logprobs"),
                    "So many of the likeliest tokens in the place of each; only with logprobs.",
                ),
                **_IGNORED,
            },
            {
                "tools": "the model calls no tools",
                "tool_choice": "the model calls no tools",
                "parallel_tool_calls": "the model calls no tools",
                "functions": "the model calls no functions",
                "function_call": "the model calls no functions",
                "audio": "the model writes texts only",
                "modalities": "the model writes texts only",
                "prediction": "drafts come from the server's own --speculate",
                "reasoning_effort": "the model does not reason",
                "store": "nothing is stored",
                **_NOT_SERVED,
                "web_search_options": "the model does not search",
            },
        )

    def _embedding(self, width: int) -> Structure:
        return Structure(
            {
                "model": _MODEL,
                "input": Member(
                    Inputs(Text(1), self._tokens(self.max_prompt_tokens), self._limits.max_prompts),
                    "A text, a list of texts, token ids, or a list of such lists.",
                    required=True,
                ),
                "encoding_format": Member(
                    OneOf(("float", "base64")), "How numbers are written.", default="float"
                ),
                "dimensions": Member(
                    Whole(width, width, "model's width"), "Vectors have the model's width."
                ),
                "pooling": Member(
                    OneOf(("mean", "last")),
                    "The mean of the last hidden states, or the last token's.",
                    default="mean",
                ),
                "user": _IGNORED["user"],
            }
        )


class _TextOrParts:
    """A text, or OpenAI's list of parts, joined."""

    def __init__(self, part: Variants) -> None:
        self._parts = ListOf(part, 1000, 1)

    def check(self, value: Any, name: str) -> str:
        if isinstance(value, list):
            return "".join(part["text"] for part in self._parts.check(value, name))
        return Text().check(value, name)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [Text().schema(), self._parts.schema()]}


_MODEL = Member(Text(longest=1000), "A name of the model; left out, it is the one there is.")


def _kind(option: Processor) -> Kind:
    if option.kind is int:
        return Whole(int(option.low), _LARGEST_COUNT)
    return Number(option.low, option.high, option.above, option.below)
