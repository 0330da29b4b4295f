"""Text in, text out: a model together with its tokenizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import Error, GenerationError
from ..model import GPT2
from ..tokenizer import Tokenizer
from .completion import Completer
from .continuation import Generation, Request, TextStream
from .decoding import Step, Timing
from .generation import FROM_CONFIG, EosTokenId
from .grammar import Grammar
from .job_runner import Ask, JobRunner
from .loading import load_pair
from .reading import TextScores, embed_texts, score_texts
from .requests import check_pair, encode_prompt, encode_texts, make_request
from .sampling import Draw, Draws
from .speculation import Drafter
from .speculation.choice import OFF, Speculate, Speculation
from .window import Window


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
        speculate: what proposes tokens, several of which the model verifies in one step: "lookup"
            (what followed the same tokens earlier), a smaller Generator, GPT2 or PackedGPT2 with
            the same vocabulary, or its name or path; "off", the default, nothing. Texts are the
            same. A call may say otherwise. It takes packed weights, on the CPU; beam search, and
            texts that outgrow the model, go on without.

    Raises:
        GenerationError: no such window, a tokenizer with ids that the model does not have, or a
            draft model with another vocabulary.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Any,
        *,
        window: str = "error",
        notify: Callable[[str], None] = warnings.warn,
        speculate: Speculate = OFF,
    ):
        self._window = Window(window, notify)
        self.model = model
        self.tokenizer = Tokenizer.of(tokenizer)
        check_pair(model, self.tokenizer, notify)
        self._speculation = Speculation(model, self.tokenizer, speculate)

    @property
    def window(self) -> str:
        """Treatment of a text longer than the model's `n_positions`."""
        return self._window.kind

    @property
    def can_speculate(self) -> bool:
        """True if the model runs on packed weights, which speculation takes."""
        return self._speculation.is_possible

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
        speculate: Speculate = OFF,
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
            window, notify, speculate: see `Generator`.

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
        return cls(model, its_tokenizer, window=window, notify=notify, speculate=speculate)

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
        bad_words: str | Sequence[str] | None = None,
        logits_processor: Iterable[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Iterable[Callable[..., Any]] | None = None,
        grammar: Grammar | None = None,
        timing: Timing | None = None,
        speculate: Speculate | None = None,
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
            bad_words: texts that never occur, as they are and after a space, each in the tokens
                that the tokenizer makes of it; in addition to `bad_words_ids`.
            logits_processor, stopping_criteria: as in `GPT2.generate`; a processor sees the scores
                of the tokens that both the model and the tokenizer have.
            grammar: what a continuation must be; what does not fit is never chosen. It ends when
                it is complete, but `max_new_tokens`, a stop string or the like may cut it before.
            timing: filled in with the time of each phase.
            speculate: see `Generator`; None takes what that was given.
            options: see `SamplingOptions`. For what is not given, the model's
                generation_config.json holds as far as it is honored, and then `DEFAULTS`.

        Returns:
            A `Generation` for a text, a list of them for a list of texts. In place of each, a list
            of `num_return_sequences` of them where more than one is asked for.

        Raises:
            GenerationError: an option out of its range, a prompt that is too long, or options that
                ban every token that a grammar allows.
            TokenizerError: a text that cannot be encoded.
        """
        results = list(
            self.each(
                prompts,
                eos_token_id=eos_token_id,
                stop=stop,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                bad_words=bad_words,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                grammar=grammar,
                timing=timing,
                speculate=speculate,
                **options,
            )
        )
        if options.get("num_return_sequences", 1) == 1:
            return results[0][0] if isinstance(prompts, str) else [one for (one,) in results]
        return results[0] if isinstance(prompts, str) else results

    def each(
        self,
        prompts: str | Sequence[str],
        *,
        timing: Timing | None = None,
        speculate: Speculate | None = None,
        **options: Any,
    ) -> Iterator[list[Generation]]:
        """Continue many texts; yields the continuations of each as soon as its batch is done.

        Arguments and errors are those of a call; all prompts are checked before the first result.
        """
        request = self._request(**options)
        found = self._continue(prompts, request, timing, speculate)
        while together := list(islice(found, request.options.num_return_sequences)):
            yield together

    def one_by_one(
        self,
        prompts: str | Sequence[str],
        *,
        timing: Timing | None = None,
        draws: Draws | None = None,
        speculate: Speculate | None = None,
        **options: Any,
    ) -> Iterator[Generation]:
        """Same as `each`, but one continuation at a time, before all of a prompt are done.

        With the `draws` of an earlier call, a prompt seen then gets further samples.
        """
        return self._continue(prompts, self._request(**options), timing, speculate, draws)

    def run(
        self,
        prompts: Iterable[tuple[str, Mapping[str, Any]]],
        *,
        done: int = 0,
        timing: Timing | None = None,
        speculate: Speculate | None = None,
    ) -> Iterator[list[Generation] | Error]:
        """Continue any number of prompts, each with options of its own, many at a time.

        Args:
            prompts: texts, and the options of a call for each; taken as there is room for them.
            done: so many of them, at the beginning, have their results, and get none; they count
                where prompts that come again draw their next samples.
            timing: filled in with the time of each phase.
            speculate: see `Generator`; None takes what that was given.

        Yields:
            The continuations of each prompt, in the order of the prompts. In place of what cannot
            be carried out, its error: all that a call raises for a prompt or its options.
        """
        completer = Completer(self.model, self.tokenizer, self._window)

        def otherwise(ask: Ask) -> list[Generation]:
            draws = None if ask.draw is None else [ask.draw]
            texts, tokens = [ask.text], [ask.tokens]
            return list(completer.continue_all(texts, tokens, ask.request, timing, draws))

        with self._speculation.drafting(speculate) as drafter:
            runner = JobRunner(self.model, self.tokenizer, self._window, drafter)
            yield from runner.each(self._asks(prompts, done), otherwise, timing)

    def check(self, prompt: str, name: str = "the prompt", **options: Any) -> int:
        """Raise the error that a call with this prompt would raise, and compute nothing.

        Args:
            prompt: the text.
            name: its name in errors.
            options: of the call.

        Returns:
            The most tokens that the call would add.
        """
        request = self._request(**options)
        tokens = self._encode(prompt, request, name)
        return request.options.new_tokens(len(tokens), name)

    def stream(
        self,
        prompt: str,
        *,
        timing: Timing | None = None,
        speculate: Speculate | None = None,
        **options: Any,
    ) -> TextStream:
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
        draw = self._draw(tokens, request, Draws())
        steps = self._steps(Ask(prompt, tokens, request, draw), timing, speculate)
        seed = None if draw is None else draw.seed
        return TextStream(prompt, len(tokens), steps, self.tokenizer, request, seed)

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
        found = encode_texts(self.model, self.tokenizer, texts)
        first = self.tokenizer.start_token_id if start else None
        return score_texts(self.model, found, first, stride)

    def embed(self, texts: Sequence[str], *, pooling: str = "mean") -> Tensor:
        """(N, width) float32: a vector for each text, of the model's last hidden states.

        Args:
            texts: a list of texts of at most `n_positions` tokens each.
            pooling: "mean" over a text's tokens, or the state of its "last" one.

        Raises:
            GenerationError: not a list of texts, an empty or too long one, an unknown pooling, a
                packed model, or output that is not a number.
        """
        return embed_texts(self.model, encode_texts(self.model, self.tokenizer, texts), pooling)

    def _continue(
        self,
        prompts: str | Sequence[str],
        request: Request,
        timing: Timing | None,
        speculate: Speculate | None,
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
        drafting = self._speculation.drafting(speculate)  # raises now what is wrong with it
        hand_out = Draws() if hand_out is None else hand_out
        return self._carry_out(texts, encoded, request, timing, drafting, hand_out)

    def _carry_out(
        self,
        texts: Sequence[str],
        encoded: Sequence[list[int]],
        request: Request,
        timing: Timing | None,
        drafting: AbstractContextManager[Drafter | None],
        hand_out: Draws,
    ) -> Iterator[Generation]:
        """The continuations of texts, with an engine where there is speculation."""
        draws = [self._draw(tokens, request, hand_out) for tokens in encoded]
        with drafting as drafter:
            runner = JobRunner(self.model, self.tokenizer, self._window, drafter)
            if drafter is not None and all(runner.can_run(request, len(t)) for t in encoded):
                asks = [
                    Ask(text, tokens, request, draw)
                    for text, tokens, draw in zip(texts, encoded, draws, strict=True)
                ]
                yield from runner.continue_all(asks, timing)
                return
            completer = Completer(self.model, self.tokenizer, self._window)
            known = [draw for draw in draws if draw is not None]
            yield from completer.continue_all(texts, encoded, request, timing, known or None)

    def _draw(self, tokens: list[int], request: Request, hand_out: Draws) -> Draw | None:
        """The draw of a prompt's first continuation; None where nothing is drawn."""
        options = request.options
        if not options.samples:
            return None
        return hand_out.take(tokens, options.seed, options.num_return_sequences)

    def _steps(
        self, ask: Ask, timing: Timing | None, speculate: Speculate | None
    ) -> Iterator[Step]:
        """The steps of one continuation, with an engine where there is speculation."""
        drafting = self._speculation.drafting(speculate)

        def steps() -> Iterator[Step]:
            with drafting as drafter:
                runner = JobRunner(self.model, self.tokenizer, self._window, drafter)
                if drafter is not None and runner.can_run(ask.request, len(ask.tokens)):
                    yield from runner.steps(ask, timing)
                    return
                completer = Completer(self.model, self.tokenizer, self._window)
                draws = None if ask.draw is None else [ask.draw]
                yield from completer.steps([ask.tokens], ask.request, timing=timing, draws=draws)

        return steps()

    def _asks(
        self, prompts: Iterable[tuple[str, Mapping[str, Any]]], done: int
    ) -> Iterator[Ask | Error]:
        """Prompts, encoded and with their draws; or what is wrong with one."""
        hand_out = Draws()
        for number, (text, options) in enumerate(prompts):
            ask: Ask | Error
            try:
                request = self._request(**options)
                tokens = self._encode(text, request, f"prompt {number + 1}")
                ask = Ask(text, tokens, request, self._draw(tokens, request, hand_out))
            except Error as error:
                ask = error
            if number >= done:
                yield ask

    def _encode(self, text: str, request: Request, name: str) -> list[int]:
        return encode_prompt(self.model, self.tokenizer, self._window, text, request, name)

    def _request(self, **options: Any) -> Request:
        return make_request(self.model, self.tokenizer, **options)
