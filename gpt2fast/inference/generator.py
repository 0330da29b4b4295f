"""Text in, text out: a model together with its tokenizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import GenerationError
from ..model import GPT2
from ..sampling import DEFAULTS
from ..tokenizer import Tokenizer
from .beam_search import beam_search
from .continuation import Continuation, Generation, Request, TextStream
from .decoding import Step, Timing, decode
from .generation import (
    FROM_CONFIG,
    EosTokenId,
    beginning,
    check_length,
    check_vocabulary,
    end_tokens,
)
from .loading import load_pair
from .reading import TextScores, check_pooling, embed_texts, score_texts
from .sampling import Draw, Draws
from .scores import Scores
from .stopping import StopCriteria
from .teacher_forcing import score_sequences

WINDOWS = ("error", "slide", "stop")
_MOST_PADDING = 127
"""Most rows that pad a vocabulary: it is rounded up to a multiple of 128 at most."""

_BATCH_ROWS = 32
"""Continuations in a batch; more would take memory and save little time."""


class Generator:
    """Continues texts.

        generator = Generator.from_pretrained("gpt2")
        print(generator("Once upon a time", max_new_tokens=50))
        for piece in generator.stream("Once upon a time"):
            print(piece, end="", flush=True)

    Args:
        model, tokenizer: a pair; a tokenizer of transformers or tokenizers will do.
        window: treatment of a text longer than the model's `n_positions`: "error", the default
            here, refuses it in advance, as `GPT2.generate` does; "slide", the default of
            `python -m gpt2fast.generate`, goes on with the newest half of its tokens; "stop" ends
            it there.
        notify: called with a message when a text slides for the first time, and when the tokenizer
            has a much smaller vocabulary than the model.

    Raises:
        GenerationError: no such window, or a tokenizer with ids that the model does not have.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Any,
        *,
        window: str = "error",
        notify: Callable[[str], None] = warnings.warn,
    ):
        if window not in WINDOWS:
            raise GenerationError(f"window is {window!r}; choose one of {', '.join(WINDOWS)}")
        self.model = model
        self.tokenizer = Tokenizer.of(tokenizer)
        self.window = window
        self._notify = notify
        self._has_slid = False
        self._compare_vocabularies()

    @property
    def _allowed(self) -> int:
        """Ids below this may be chosen: not tokens that were added to the tokenizer alone."""
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        preset: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantize: str | None = None,
        pack: bool = False,
        window: str = "error",
        notify: Callable[[str], None] = warnings.warn,
    ) -> Generator:
        """Load a model and its tokenizer.

        Args:
            name_or_path: bundled model, model on the hub, directory or file; see
                `checkpoints.gpt2.from_pretrained`, which takes device, revision,
                local_files_only and preset too.
            dtype: of the weights; None means as stored, but float32 on a CPU where a half type
                is stored, since many CPUs only emulate those. With `pack`, float16 stays as it is:
                packed, it is multiplied in float32.
            tokenizer: where the tokenizer is, if not with the model; or a tokenizer.
            adapter: directory, or name on the hub, of LoRA adapters in PEFT's format, which are
                merged into the model.
            quantize: "int8" or "int4" weights, on the CPU: `GPT2.quantize`.
            pack: keep the weights in packed form alone, where the kernels that read it run: a
                `PackedGPT2`, for inference, in half the memory that both forms take.
            window, notify: see `Generator`.

        Raises:
            WeightsError, ConfigError, TokenizerError: something is missing or broken.
        """
        model, its_tokenizer = load_pair(
            name_or_path,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            preset=preset,
            adapter=adapter,
            quantize=quantize,
            pack=pack,
        )
        return cls(model, its_tokenizer, window=window, notify=notify)

    @overload
    def __call__(self, prompts: str, **options: Any) -> Generation | list[Generation]: ...

    @overload
    def __call__(
        self, prompts: Sequence[str], **options: Any
    ) -> list[Generation] | list[list[Generation]]: ...

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        eos_token_id: EosTokenId = FROM_CONFIG,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        timing: Timing | None = None,
        **options: Any,
    ) -> Generation | list[Generation] | list[list[Generation]]:
        """Continue one text or several.

        Args:
            prompts: a text, or a list of texts.
            eos_token_id: id or ids that end a continuation; None switches this off. By default
                the end token of the model's configuration and the tokenizer's.
            stop: strings that end a continuation, and are left out of its text.
            logprobs: give the tokens' log-probabilities too, under the model itself: log_softmax of
                its logits, before temperature, top-k and penalties. With `max_new_tokens=0`, those
                of the prompt's tokens, each after the ones before it (`prompt_logprobs`).
            top_logprobs: also return this many of the likeliest tokens in the place of each.
            timing: filled in with the time of each phase.
            options: see `SamplingOptions`; `DEFAULTS` holds for what is not given.

        Returns:
            A `Generation` for a text, a list of them for a list of texts. In place of each, a list
            of `num_return_sequences` of them where more than one is asked for.

        Raises:
            GenerationError: an option out of its range, or a prompt that is too long.
            TokenizerError: a text that cannot be encoded.
        """
        results = list(
            self.each(
                prompts,
                eos_token_id=eos_token_id,
                stop=stop,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                timing=timing,
                **options,
            )
        )
        if options.get("num_return_sequences", 1) == 1:
            return results[0][0] if isinstance(prompts, str) else [one for (one,) in results]
        return results[0] if isinstance(prompts, str) else results

    def each(
        self, prompts: str | Sequence[str], *, timing: Timing | None = None, **options: Any
    ) -> Iterator[list[Generation]]:
        """Continue many texts; yields the continuations of each as soon as its batch is done.

        Arguments and errors are those of a call; all prompts are checked before the first result.
        """
        request = self._request(**options)
        found = self._continue(prompts, request, timing)
        while together := list(islice(found, request.options.num_return_sequences)):
            yield together

    def one_by_one(
        self,
        prompts: str | Sequence[str],
        *,
        timing: Timing | None = None,
        draws: Draws | None = None,
        **options: Any,
    ) -> Iterator[Generation]:
        """Same as `each`, but one continuation at a time, before all of a prompt are done.

        With the `draws` of an earlier call, a prompt seen then gets further samples.
        """
        return self._continue(prompts, self._request(**options), timing, draws)

    def check(self, prompt: str, name: str = "the prompt", **options: Any) -> None:
        """Raise the error that a call with this prompt would raise, and compute nothing.

        Args:
            prompt: the text.
            name: its name in errors.
            options: of the call.
        """
        self._encode(prompt, self._request(**options), name)

    def stream(self, prompt: str, *, timing: Timing | None = None, **options: Any) -> TextStream:
        """Continue one text; yields the continuation piece by piece.

        Joined, the pieces are the `text` that a call with the same options and seed returns.
        Arguments and errors are those of a call.
        """
        request = self._request(**options)
        if request.scores_prompt:
            raise GenerationError(
                "a stream scores the tokens that it gives, and max_new_tokens=0 gives none: call "
                "the generator to score a prompt"
            )
        if request.options.num_beams > 1 or request.options.num_return_sequences > 1:
            raise GenerationError(
                "a stream is one continuation chosen token by token: set num_beams=1 and "
                "num_return_sequences=1, or call the generator for all of the text at once"
            )
        tokens = self._encode(prompt, request, "the prompt")
        draws = None
        if request.options.samples:
            draws = [Draws().take(tokens, request.options.seed, 1)]
        steps = self._steps([tokens], request, timing=timing, draws=draws)
        return TextStream(
            prompt,
            len(tokens),
            steps,
            self.tokenizer,
            request,
            None if draws is None else draws[0].seed,
        )

    def score(
        self, texts: Sequence[str], *, stride: int | None = None, start: bool = True
    ) -> list[TextScores]:
        """Log-probabilities of the tokens of texts, of any length.

        Args:
            texts: a list of texts.
            stride: new tokens in each window of a text that has more than `n_positions`; half of
                those by default. Fewer give every token a longer past, and take more time.
            start: read the tokenizer's end-of-text token, if it has one, before each text, so that
                the first token has a log-probability, too.

        Raises:
            GenerationError: not a list of texts, a stride that is not in 1 .. `n_positions`, or
                output that is not a number.
        """
        room = self.model.config.n_positions
        stride = max(1, room // 2) if stride is None else stride
        if type(stride) is not int or not 1 <= stride <= room:
            raise GenerationError(
                f"stride is {stride!r:.80}; it must be a whole number from 1 to the model's "
                f"n_positions, {room}"
            )
        first = self.tokenizer.start_token_id if start else None
        return score_texts(self.model, self._encode_all(texts), first, stride)

    def embed(self, texts: Sequence[str], *, pooling: str = "mean") -> Tensor:
        """(N, width) float32: a vector for each text, of the model's last hidden states.

        Args:
            texts: a list of texts of at most `n_positions` tokens each.
            pooling: "mean" over a text's tokens, or the state of its "last" one.

        Raises:
            GenerationError: not a list of texts, an empty or too long one, an unknown pooling, a
                packed model, or output that is not a number.
        """
        check_pooling(pooling)
        if not isinstance(self.model, GPT2):
            raise GenerationError(
                "packed and quantized models have no hidden states to read: load the model without "
                "pack and quantize"
            )
        found, room = self._encode_all(texts), self.model.config.n_positions
        for number, tokens in enumerate(found, start=1):
            if not 1 <= len(tokens) <= room:
                raise GenerationError(
                    f"text {number} has {len(tokens)} tokens; a vector is made of 1 to the model's "
                    f"n_positions, {room}: " + ("cut it" if tokens else "leave it out")
                )
        return embed_texts(self.model, found, pooling)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise GenerationError(f"texts is {texts!r:.80}; it must be a list of texts")
        found = []
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise GenerationError(f"text {number} is {text!r:.80}; it must be a text (str)")
            found.append(self.tokenizer.encode(text))
            check_vocabulary(self.model, found[-1], f"text {number}", self.tokenizer)
        return found

    def _continue(
        self,
        prompts: str | Sequence[str],
        request: Request,
        timing: Timing | None,
        hand_out: Draws | None = None,
    ) -> Iterator[Generation]:
        if not isinstance(prompts, Iterable):
            raise GenerationError(
                f"prompts is {prompts!r:.80}; it must be a text (str) or a list of texts"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [
            self._encode(
                text,
                request,
                f"prompt {number} of {len(texts)}" if len(texts) > 1 else "the prompt",
            )
            for number, text in enumerate(texts, start=1)
        ]
        copies, beams = request.options.num_return_sequences, request.options.num_beams
        draws: list[Draw] | None = None
        if request.options.samples:
            hand_out = Draws() if hand_out is None else hand_out
            draws = [hand_out.take(tokens, request.options.seed, copies) for tokens in encoded]
        samples_at_once = copies if beams > 1 else min(copies, _BATCH_ROWS)
        texts_at_once = max(1, _BATCH_ROWS // max(samples_at_once, beams))
        for first in range(0, len(texts), texts_at_once):
            chunk = slice(first, first + texts_at_once)
            for sample in range(0, copies, samples_at_once):
                count = min(samples_at_once, copies - sample)
                part = replace(
                    request, options=replace(request.options, num_return_sequences=count)
                )
                yield from self._complete(
                    texts[chunk],
                    encoded[chunk],
                    part,
                    timing,
                    None if draws is None else [draw.after(sample) for draw in draws[chunk]],
                )

    def _request(
        self,
        eos_token_id: EosTokenId = FROM_CONFIG,
        stop: Any = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        **options: Any,
    ) -> Request:
        if "num_beams" in options and options["num_beams"] != 1:
            options = {"do_sample": False, **options}
        chosen = DEFAULTS.changed(options)
        ends = end_tokens(self.model, eos_token_id)
        own_end = self.tokenizer.eos_token_id
        if eos_token_id is FROM_CONFIG and own_end is not None and own_end not in ends:
            ends += [own_end] if own_end < self.model.config.vocab_size else []
        alternatives = self._alternatives(logprobs, top_logprobs)
        return Request(chosen, StopCriteria(ends, stop, self.tokenizer), alternatives)

    def _alternatives(self, logprobs: bool, top_logprobs: int) -> int | None:
        """Number of likely alternatives to return with each token; None: nothing is scored."""
        if type(logprobs) is not bool:
            raise GenerationError(
                f"logprobs is {logprobs!r:.80}; it must be True or False (top_logprobs says how "
                "many of the likeliest tokens to name)"
            )
        most = self.model.config.vocab_size
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= most:
            raise GenerationError(
                f"top_logprobs is {top_logprobs!r:.80}; it must be a whole number from 0 to the "
                f"model's vocab_size, {most}"
            )
        if top_logprobs and not logprobs:
            raise GenerationError(
                f"top_logprobs is {top_logprobs}, and logprobs is off: pass logprobs=True too"
            )
        return top_logprobs if logprobs else None

    def _encode(self, text: str, request: Request, name: str) -> list[int]:
        """The prompt's tokens, checked for what the model can take."""
        if not isinstance(text, str):
            raise GenerationError(f"{name} is {text!r:.80}; it must be a text (str)")
        tokens = self.tokenizer.encode(text)
        if not tokens:
            # As in transformers: a text without a token to begin with follows the end token.
            first = beginning(self.model)
            first = self.tokenizer.start_token_id if first is None else first
            if first is None:
                raise GenerationError(
                    f"{name} is empty, and neither is there a bos_token_id in the model's "
                    "configuration nor an end-of-text token in the tokenizer to begin with: give "
                    "at least one character"
                )
            tokens = [first]
        check_vocabulary(self.model, tokens, name, self.tokenizer)
        room = self.model.config.n_positions
        if request.scores_prompt:
            if len(tokens) > room:
                raise GenerationError(
                    f"{name} has {len(tokens)} tokens, and the model scores no more than its "
                    f"n_positions={room} at a time: shorten it; python -m gpt2fast.evaluate --task "
                    "perplexity scores longer texts, window by window"
                )
        elif self.window == "error" or request.options.num_beams > 1:
            check_length(self.model, len(tokens), request.options.max_new_tokens, name)
        elif self.window == "stop" and len(tokens) >= room:
            raise GenerationError(
                f"{name} has {len(tokens)} tokens, which leaves nothing of the model's "
                f"n_positions={room} for new ones: shorten it, or slide the window"
            )
        elif len(tokens) > room:
            self._tell_slide()
        return tokens

    def _complete(
        self,
        texts: Sequence[str],
        prompts: Sequence[list[int]],
        request: Request,
        timing: Timing | None,
        draws: Sequence[Draw] | None,
    ) -> list[Generation]:
        options = request.options
        copies = options.num_return_sequences
        found = [Continuation(self.tokenizer, request) for _ in range(len(prompts) * copies)]
        alternatives = request.alternatives
        scored: list[Scores | None] = [None] * len(prompts)
        if alternatives is not None and request.scores_prompt:
            scored = list(score_sequences(self.model, prompts, alternatives, [1] * len(prompts)))
        if options.num_beams > 1 and options.max_new_tokens:
            beams = beam_search(
                self.model,
                prompts,
                options,
                request.criteria,
                vocab_size=self._allowed,
                timing=timing,
            )
            for row, tokens in enumerate(beams):
                reason = request.criteria.reason(tokens) or "length"
                for place, token in enumerate(tokens, start=1):
                    found[row].push(token, reason if place == len(tokens) else None)
            if alternatives is not None:
                reads = [prompts[row // copies] for row in range(len(beams))]
                whole = [read + tokens for read, tokens in zip(reads, beams, strict=True)]
                each = score_sequences(self.model, whole, alternatives, list(map(len, reads)))
                for continuation, scores in zip(found, each, strict=True):
                    continuation.scores = scores
        else:
            for step in self._steps(prompts, request, timing=timing, draws=draws):
                for place, row in enumerate(step.rows):
                    found[row].push(step.tokens[place], step.reasons[place])
                    if step.scores is not None:
                        found[row].scores.add(step.scores.of(place))
        return [
            Generation(
                prompt=texts[row // copies],
                text=continuation.text,
                tokens=continuation.tokens,
                prompt_tokens=len(prompts[row // copies]),
                finish_reason=continuation.reason or "length",
                seed=None if draws is None else draws[row // copies].seed,
                prompt_token_ids=prompts[row // copies],
                **continuation.scored(scored[row // copies]),
            )
            for row, continuation in enumerate(found)
        ]

    def _steps(
        self,
        prompts: Sequence[list[int]],
        request: Request,
        *,
        timing: Timing | None,
        draws: Sequence[Draw] | None,
    ) -> Iterator[Step]:
        new, room = request.options.max_new_tokens, self.model.config.n_positions
        if new == 0:
            return
        limits = [
            min(new, room - len(prompt)) if self.window == "stop" else new for prompt in prompts
        ]
        copies = request.options.num_return_sequences
        for count, step in enumerate(
            decode(
                self.model,
                prompts,
                limits,
                request.options,
                request.criteria,
                slides=self.window == "slide",
                alternatives=request.alternatives,
                vocab_size=self._allowed,
                draws=draws,
                timing=timing,
            ),
            start=1,
        ):
            for row, reason in zip(step.rows, step.reasons, strict=True):
                if reason is None and len(prompts[row // copies]) + count > room:
                    self._tell_slide()
            yield step

    def _compare_vocabularies(self) -> None:
        rows = self.model.config.vocab_size
        added = {token.id for token in self.tokenizer.added_tokens}
        # Added tokens often have no row in the model; a prompt that holds one is refused then.
        newest_first = range(self.tokenizer.vocab_size - 1, -1, -1)
        largest = next((id for id in newest_first if id not in added), -1)
        if largest >= rows:
            raise GenerationError(
                f"the tokenizer has ids up to {largest}, and the model's vocabulary ends at "
                f"{rows - 1}: load the tokenizer that belongs to the model"
            )
        if rows - self.tokenizer.vocab_size > _MOST_PADDING:
            self._notify(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, and the model's vocabulary "
                f"{rows}: if the text makes no sense, load the tokenizer that belongs to the model"
            )

    def _tell_slide(self) -> None:
        if not self._has_slid:
            self._has_slid = True
            room = self.model.config.n_positions
            self._notify(
                f"the text is longer than the model's {room} positions: it goes on from the "
                f"newest {max(1, room // 2)} tokens each time they are used up"
            )
