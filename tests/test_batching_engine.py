"""The engine's promises about jobs that end early, wait, fail, or share what they begin with."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpt2fast import ops
from gpt2fast.errors import EngineBusy, GenerationError
from gpt2fast.inference.batching import (
    BatchEngine,
    Failed,
    Finished,
    Job,
    PromptRead,
    Token,
    choosing,
)
from gpt2fast.inference.batching.pages import PagePool, page_keys
from gpt2fast.inference.batching.row import Row
from gpt2fast.inference.generator import Generator
from gpt2fast.inference.sampling import Draw
from small_engines import (
    ALPHABET,
    TOKENIZER,
    assert_idle,
    job,
    skip_where_sums_vary,
    small_engine,
)
from small_generators import small_model

LONG = (ALPHABET * 2)[:80]
GREEDY = dict(do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module")
def model():
    skip_where_sums_vary("float32")
    return small_model(n_positions=96).pack()


# -- events ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("listens", [True, False])
def test_events_come_in_order(model, listens):
    wanted = Generator(model, TOKENIZER)(LONG[:40], max_new_tokens=9, **GREEDY)
    told = []
    with small_engine(model) as engine:
        ticket = engine.submit(
            job(model, LONG[:40], max_new_tokens=9, logprobs=True, prompt_alternatives=2, **GREEDY),
            told.append if listens else None,
        )
        if not listens:
            told += ticket.events()
            assert list(ticket.events()) == []
        result = ticket.result()
    read, *tokens, finished = told
    assert isinstance(read, PromptRead) and (read.prompt_tokens, read.cached_tokens) == (40, 0)
    assert len(read.scores.logprobs) == 39 and all(len(top) == 2 for top in read.scores.top)
    assert [token.index for token in tokens] == list(range(9))
    assert [token.token for token in tokens] == wanted.tokens == result.tokens
    assert "".join(token.piece for token in tokens) == wanted.text == result.text
    assert [x for token in tokens for x in token.scores.logprobs] == result.logprobs
    assert finished == Finished(result)


def test_prompts_are_scored_as_by_a_generator(model):
    wanted = Generator(model, TOKENIZER)(
        LONG, max_new_tokens=0, logprobs=True, top_logprobs=3, do_sample=False
    )
    with small_engine(model) as engine:
        for _ in range(2):  # the second time, all pages are cached
            result = engine.submit(
                job(model, LONG, max_new_tokens=3, prompt_alternatives=3, **GREEDY)
            ).result()
            assert result.logprobs is None
            assert result.prompt_logprobs[0] is None and result.prompt_top_logprobs[0] is None
            assert result.prompt_logprobs[1:] == pytest.approx(wanted.prompt_logprobs[1:], abs=1e-5)
            assert [list(top) for top in result.prompt_top_logprobs[1:]] == [
                list(top) for top in wanted.prompt_top_logprobs[1:]
            ]


def test_a_draw_is_the_generators(model):
    three = Generator(model, TOKENIZER)("abc", seed=5, num_return_sequences=3, max_new_tokens=9)
    with small_engine(model) as engine:
        request = dict(seed=5, max_new_tokens=9)
        jobs = [job(model, "abc", draw=Draw(5, sample), **request) for sample in range(3)]
        assert list(engine.run(jobs)) == three
        assert next(engine.run([job(model, "abc", **request)])) == three[0]


# -- ends -----------------------------------------------------------------------------------------


def test_cancelling_works_in_every_state(model):
    seen = set()
    with small_engine(model, max_rows=2, cache_tokens=176, share_prefixes=False) as engine:
        for steps in range(22):
            tickets = [
                engine.submit(job(model, prompt, max_new_tokens=8, **GREEDY))
                for prompt in (LONG, LONG[::-1], "abc")
            ]
            for _ in range(steps):
                engine.step()
            rows = [*engine._worker.scheduler.running.values()]
            seen |= {"reading" if row.generated == 0 else "decoding" for row in rows}
            seen |= {"waiting"} if engine._worker.scheduler.waiting or not steps else set()
            ended = [ticket.done for ticket in tickets]
            for ticket in tickets:
                ticket.cancel()
                ticket.cancel()
            engine.step()
            assert_idle(engine)
            for ticket, was_done in zip(tickets, ended, strict=True):
                result = ticket.result()
                assert result.finish_reason == ("length" if was_done else "cancelled")
                assert (len(result.tokens) == 8) == was_done
            seen |= {"done"} if any(ended) else set()
    assert seen == {"waiting", "reading", "decoding", "done"}


def test_a_cancelled_job_keeps_the_text_that_was_held_back(model):
    text = Generator(model, TOKENIZER)("abc", max_new_tokens=3, **GREEDY).text
    told = []
    with small_engine(model) as engine:
        request = dict(max_new_tokens=20, stop=[text + "###"], **GREEDY)
        ticket = engine.submit(job(model, "abc", **request), told.append)
        for _ in range(3):
            engine.step()
        ticket.cancel()
        engine.step()
    assert ticket.result().text == text
    assert "".join(event.piece for event in told if isinstance(event, Token)) == ""


def test_deadlines_end_jobs_in_every_state(model):
    with small_engine(model, max_rows=2) as engine:
        past = time.monotonic() - 1
        result = engine.submit(job(model, "abc", deadline=past, max_new_tokens=9)).result()
        assert (result.tokens, result.finish_reason) == ([], "time")
        result = engine.submit(job(model, "abc", max_time=1e-9, max_new_tokens=9)).result()
        assert result.finish_reason == "time"
        soon = engine.submit(
            job(model, LONG, deadline=time.monotonic() + 0.05, max_new_tokens=9, **GREEDY)
        )
        engine.step()
        time.sleep(0.06)
        engine.step()
        assert soon.result().finish_reason == "time"
        assert_idle(engine)


def test_deadlines_of_jobs_that_have_ended_are_forgotten(model):
    later = time.monotonic() + 1000
    with small_engine(model) as engine:
        calls = [job(model, "abc", deadline=later, max_new_tokens=1) for _ in range(300)]
        list(engine.run(calls))
        rows = sum(type(thing) is Row for thing in gc.get_objects())
    assert rows < 150


def test_close_gives_jobs_their_grace(model):
    engine = small_engine(model)
    ticket = engine.submit(job(model, "abc", max_new_tokens=30, **GREEDY))
    engine.close(grace=60)
    assert ticket.result().finish_reason == "length"
    with pytest.raises(EngineBusy, match="closed"):
        engine.submit(job(model, "abc"))
    engine = small_engine(model)
    engine.start()
    tickets = [engine.submit(job(model, "abc", max_new_tokens=90, **GREEDY)) for _ in range(9)]
    engine.close()
    reasons = {ticket.result(timeout=10).finish_reason for ticket in tickets}
    assert reasons <= {"length", "cancelled"}
    assert_idle(engine)
    engine = small_engine(model)
    engine.start()
    tickets = [engine.submit(job(model, "abc", max_new_tokens=90, **GREEDY)) for _ in range(9)]
    engine.close(grace=60)
    assert {ticket.result(timeout=0).finish_reason for ticket in tickets} == {"length"}
    with pytest.raises(GenerationError, match="closed"):
        engine.start()


# -- limits ---------------------------------------------------------------------------------------


def test_a_full_queue_refuses(model):
    with small_engine(model, queue_limit=3) as engine:
        for _ in range(3):
            engine.submit(job(model, "abc", max_new_tokens=9))
        with pytest.raises(EngineBusy, match="3 jobs wait already, and the queue's limit is 3"):
            engine.submit(job(model, "abc"))
        engine.step()
        engine.submit(job(model, "abc"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=94), "n_positions=96"),
        (dict(max_new_tokens=50), "the engine's cache holds 48 tokens"),
        (dict(num_beams=2, do_sample=False), "num_beams is 2"),
        (dict(num_return_sequences=2), "num_return_sequences 2"),
        (dict(prompt_alternatives=99), "prompt_alternatives is 99"),
    ],
)
def test_what_cannot_be_run_is_refused(model, options, message):
    with small_engine(model, cache_tokens=48) as engine:
        with pytest.raises(GenerationError, match=message):
            engine.submit(job(model, "abc", **options))
        fits = engine.submit(job(model, "abc", max_new_tokens=46, **GREEDY))
        assert len(fits.result().tokens) == 46
        with pytest.raises(GenerationError, match="no token"):
            engine.submit(Job([], fits_request(model)))
        with pytest.raises(GenerationError, match="61"):
            engine.submit(Job([61], fits_request(model)))


def fits_request(model):
    return job(model, "a", max_new_tokens=3).request


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(page_size=8), "page_size is 8"),
        (dict(page_size=40), "multiple of 16"),
        (dict(max_rows=0), "max_rows is 0"),
        (dict(chunk_tokens=None), "chunk_tokens is None"),
        (dict(queue_limit=0), "queue_limit is 0; it must be a whole number of at least 1, or None"),
        (dict(cache_tokens=10**15), "cannot be allocated.*cache_tokens"),
    ],
)
def test_impossible_sizes_are_refused(model, sizes, message):
    with pytest.raises(GenerationError, match=message):
        small_engine(model, **sizes)


def test_the_cache_has_room_for_every_row_by_default(model):
    stats = BatchEngine(model, TOKENIZER, max_rows=3).stats()
    assert (stats.page_size, stats.pages_total) == (32, 9)
    assert stats.cache_bytes == 9 * 32 * model.new_cache(1, 1).entry_bytes


def test_prompts_take_turns(model):
    """A short prompt is read beside a long one, and running texts get a token in every step."""
    with small_engine(model, max_rows=4, chunk_tokens=32, share_prefixes=False) as engine:
        runs, reads = [], []
        engine.submit(job(model, "abc", max_new_tokens=60, **GREEDY), runs.append)
        engine.step()
        engine.submit(job(model, LONG, max_new_tokens=2, **GREEDY))
        engine.step()
        engine.submit(job(model, LONG[5:20], max_new_tokens=2, **GREEDY), reads.append)
        before = len(runs)
        engine.step()
        assert isinstance(reads[0], PromptRead) and isinstance(reads[1], Token)
        assert len(runs) == before + 1


# -- failures -------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def broken(*arguments):
    raise Broken("no")


@pytest.mark.parametrize("where", ["listener", "processor", "criterion", "first", "last"])
def test_what_a_job_raises_ends_that_job_only(model, where):
    wanted = Generator(model, TOKENIZER)("abc", max_new_tokens=20, **GREEDY)
    options, listener = {}, None
    if where == "processor":
        options = dict(logits_processor=[broken])
    elif where == "criterion":
        options = dict(stopping_criteria=[broken])
    else:
        kinds = {"listener": Token, "first": PromptRead, "last": Finished}

        def listener(event):
            if isinstance(event, kinds[where]):
                raise Broken("no")

    with small_engine(model) as engine:
        good = engine.submit(job(model, "abc", max_new_tokens=20, **GREEDY))
        bad = engine.submit(job(model, "bcd", max_new_tokens=20, **options), listener)
        assert good.result() == wanted
        if where == "last":
            assert bad.result().finish_reason in ("length", "eos")
        else:
            with pytest.raises(Broken):
                bad.result()
        assert_idle(engine)


def test_not_a_number_ends_that_job_only(model):
    sick = small_model(n_positions=96)
    with torch.no_grad():
        sick.wpe.weight[50] = float("nan")
    sick = sick.pack()
    told = []
    with small_engine(sick) as engine:
        short = job(sick, "abc", max_new_tokens=20, **GREEDY)
        good = engine.submit(short)
        long = engine.submit(job(sick, LONG, max_new_tokens=5, **GREEDY))
        grows = engine.submit(job(sick, LONG[:40], max_new_tokens=20, **GREEDY), told.append)
        scored = engine.submit(job(sick, LONG, max_new_tokens=5, prompt_alternatives=0))
        assert good.result() == Generator(sick, TOKENIZER)("abc", max_new_tokens=20, **GREEDY)
        for ticket in (long, grows, scored):
            with pytest.raises(GenerationError, match="not a number"):
                ticket.result()
        assert_idle(engine)
    assert isinstance(told[-1], Failed)
    assert [type(event) for event in told[1:-1]] == [Token] * 11


def test_running_out_of_memory_fails_the_jobs_of_that_step(model, monkeypatch):
    with small_engine(model, max_rows=2, chunk_tokens=64, share_prefixes=False) as engine:
        wanted = next(engine.run([job(model, "abc", max_new_tokens=9, **GREEDY)]))
        tickets = [engine.submit(job(model, "abc", max_new_tokens=9, **GREEDY)) for _ in range(3)]
        with monkeypatch.context() as patch:

            def step(given):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

            patch.setattr(engine._worker._model, "step", step)
            engine.step()
        for ticket in tickets[:2]:
            with pytest.raises(RuntimeError, match="allocate memory"):
                ticket.result()
        assert tickets[2].result() == wanted
        assert_idle(engine)


@pytest.mark.parametrize("where", ["sample", "score"])
def test_running_out_of_memory_while_choosing_does_too(model, monkeypatch, where):
    with small_engine(model, max_rows=2, chunk_tokens=64) as engine:
        options = dict(max_new_tokens=9, logprobs=True, **GREEDY)
        wanted = next(engine.run([job(model, "abc", **options)]))
        tickets = [engine.submit(job(model, "abc", **options)) for _ in range(3)]
        with monkeypatch.context() as patch:

            def fails(*arguments, **named):
                raise MemoryError

            patch.setattr(ops if where == "sample" else choosing, where, fails)
            engine.step()
        for ticket in tickets[:2]:
            with pytest.raises(MemoryError):
                ticket.result()
        assert tickets[2].result() == wanted
        assert_idle(engine)


def test_a_mistake_within_a_step_does_not_leave_jobs_waiting(model, monkeypatch):
    with small_engine(model) as engine:
        monkeypatch.setattr(engine._worker.scheduler, "plan", broken)
        engine.start()
        with pytest.raises(Broken):
            engine.submit(job(model, "abc")).result(timeout=10)
        monkeypatch.undo()
        result = engine.submit(job(model, "abc", max_new_tokens=2, **GREEDY)).result(timeout=10)
        assert len(result.tokens) == 2


# -- shared pages ---------------------------------------------------------------------------------


def cached_tokens(ticket):
    (read,) = (event for event in ticket.events() if isinstance(event, PromptRead))
    return read.cached_tokens


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
def test_what_was_read_is_not_read_again(model, length):
    call = job(model, LONG[:length], seed=1, max_new_tokens=9, logprobs=True)
    with small_engine(model) as engine:
        first, again = engine.submit(call), engine.submit(call)
        assert first.result() == again.result()
        assert cached_tokens(first) + cached_tokens(again) >= (length - 1) // 16 * 16
        for keeps in (True, True, False, True):
            if not keeps:
                engine._worker.scheduler._kept.clear()
            before = engine.stats().steps
            ticket = engine.submit(call)
            assert ticket.result() == first.result()
            # The last token is read for its logits, unless they are there.
            assert cached_tokens(ticket) == length - (not keeps)
            assert engine.stats().steps - before == 9 - keeps
        longer = job(model, LONG[:length] + "zyx", seed=1, max_new_tokens=9, logprobs=True)
        hits = engine.stats().prefix_hit_tokens
        shared = engine.submit(longer).result()
        assert engine.stats().prefix_hit_tokens - hits == length // 16 * 16
        assert engine.submit(call).result() == first.result()
        assert_idle(engine)
    with small_engine(model, share_prefixes=False) as engine:
        assert next(engine.run([longer])) == shared
        assert next(engine.run([call])) == first.result()
        assert engine.stats().prefix_hit_tokens == engine.stats().pages_cached == 0


def test_prompts_that_arrive_together_are_read_once(model):
    calls = [job(model, LONG[:64] + char, max_new_tokens=4, **GREEDY) for char in "abcdef"]
    with small_engine(model, max_rows=6, chunk_tokens=48) as engine:
        together = list(engine.run(calls))
        assert engine.stats().prefix_hit_tokens == 5 * 64
        assert_idle(engine)
    for call, result in zip(calls, together, strict=True):
        with small_engine(model) as engine:
            assert next(engine.run([call])) == result


def test_who_waits_for_anothers_page_reads_it_if_the_other_leaves(model):
    call = job(model, LONG, max_new_tokens=4, **GREEDY)
    with small_engine(model) as engine:
        first, second = engine.submit(call), engine.submit(call)
        engine.step()
        first.cancel()
        assert len(second.result().tokens) == 4
        assert_idle(engine)


def test_keys_name_all_tokens_before_a_page_s_end():
    tokens = list(range(64))
    keys = page_keys(tokens, 16)
    assert len(keys) == len(set(keys)) == 4
    assert page_keys(tokens[:63], 16)[:3] == keys[:3] != page_keys(tokens[:63], 16)[1:]
    other = page_keys([1, *tokens[1:]], 16)
    assert not set(other) & set(keys)
    assert len(page_keys(tokens[:15], 16)) == 1


# -- pages that run out ---------------------------------------------------------------------------


def test_jobs_that_were_set_back_get_the_same(model):
    calls = [
        job(model, LONG[i : i + 3], seed=i, max_new_tokens=80, logprobs=True, eos_token_id=None)
        for i in range(6)
    ]
    with small_engine(model) as engine:
        wanted = list(engine.run(calls))
        assert engine.stats().preemptions == 0
    told = [[] for _ in calls]
    with small_engine(model, max_rows=6, cache_tokens=128) as engine:
        tickets = [
            engine.submit(call, events.append) for call, events in zip(calls, told, strict=True)
        ]
        assert [ticket.result() for ticket in tickets] == wanted
        assert engine.stats().preemptions > 3
        assert_idle(engine)
    for events in told:  # nothing is told twice
        assert [type(event) for event in events] == [PromptRead, *[Token] * 80, Finished]


class Pages(RuleBasedStateMachine):
    """Texts of two kinds of tokens take, fill, share and release pages."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(7)
        self.texts = []
        self.content = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def begin(self, tokens):
        keys, pages = page_keys(tokens, 2)[: len(tokens) // 2], []
        for key in keys:
            page = self.pool.find(key)
            if page is None:
                break
            assert self.content[page] == key
            self.pool.share(page)
            pages.append(page)
        self.texts.append((keys, pages))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def grow(self, data):
        keys, pages = data.draw(st.sampled_from(self.texts))
        page = self.pool.take()
        held = {page for _, pages in self.texts for page in pages}
        assert (page is None) == (len(held) == 7)
        if page is not None:
            assert page not in held
            pages.append(page)
            self.content[page] = None
            if len(pages) <= len(keys):
                key = keys[len(pages) - 1]
                self.content[page] = key
                self.pool.publish(page, key)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data):
        place = data.draw(st.integers(0, len(self.texts) - 1))
        self.pool.release(self.texts.pop(place)[1])

    @invariant()
    def counts_are_right(self):
        self.pool.check()
        held = [page for _, pages in self.texts for page in pages]
        assert self.pool.used == len(set(held))
        for page in held:
            assert self.pool.holders(page) == held.count(page)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- threads --------------------------------------------------------------------------------------


def test_jobs_come_from_many_threads(model):
    generator = Generator(model, TOKENIZER)
    options = dict(seed=3, max_new_tokens=12)
    wanted = {length: generator(LONG[:length], **options) for length in range(1, 40, 4)}
    failures = []
    with small_engine(model, max_rows=5, cache_tokens=320) as engine:
        engine.start()

        def submit(number):
            try:
                for length, result in wanted.items():
                    ticket = engine.submit(job(model, LONG[:length], **options))
                    leaver = engine.submit(job(model, LONG[:50], max_new_tokens=30))
                    if number % 2:
                        assert list(ticket.events())[-1] == Finished(result)
                    assert ticket.result(timeout=60) == result
                    leaver.cancel()
                    leaver.result(timeout=60)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert_idle(engine)


def test_results_can_be_waited_for_in_vain(model):
    with small_engine(model) as engine:
        ticket = engine.submit(job(model, "abc", max_new_tokens=90, **GREEDY))
        with pytest.raises(TimeoutError, match="has not ended in 0 s"):
            ticket.result(timeout=0)
        assert ticket.result(timeout=60).finish_reason == "length"


def test_run_takes_jobs_as_there_is_room(model):
    taken = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield job(model, "abc", max_new_tokens=3, draw=Draw(number, 0))

    with small_engine(model, max_rows=2) as engine:
        results = engine.run(jobs())
        assert next(results).seed == 0
        assert len(taken) < 10
        results.close()
        assert_idle(engine)
        assert [result.seed for result in engine.run(jobs())] == list(range(100))
        engine.start()
        assert [result.seed for result in engine.run(jobs())] == list(range(100))


def test_run_raises_the_error_of_a_job_in_its_place(model):
    calls = [job(model, "abc", max_new_tokens=3, **GREEDY) for _ in range(3)]
    calls[1] = job(model, "abc", max_new_tokens=3, logits_processor=[broken], **GREEDY)
    for starts in (False, True):
        with small_engine(model) as engine:
            if starts:
                engine.start()
            results = engine.run(calls)
            next(results)
            with pytest.raises(Broken):
                next(results)
