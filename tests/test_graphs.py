"""Steps that run ahead of the host: on a CPU, where a stand-in is captured and replayed."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch.overrides import TorchFunctionMode

from comparison import backend, needs_gpu, needs_simulator
from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.inference import async_decoder, decoding, engine, graph_pool
from gpt2fast.inference import cuda_graphs as graphs
from gpt2fast.inference.stopping import StopCriteria
from gpt2fast.ops.backend import record_calls
from gpt2fast.sampling import SamplingOptions
from time_limits import patience

PROMPTS = torch.tensor([[0, 0, 7, 3], [5, 1, 2, 9], [0, 4, 4, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def small_model(seed: int = 1, **options) -> GPT2:
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 64}
    return GPT2(GPT2Config(**{**sizes, **options})).eval()


@pytest.fixture
def model() -> GPT2:
    return small_model()


class Graph:
    """Stand-in for a CUDA graph: reads and writes at the addresses of its capture."""

    def __init__(self, steps: graphs.CapturedStep):
        self.steps, self.weights = steps, list(steps._weights)
        self.buffers = self.addresses()

    def addresses(self) -> list[int]:
        steps, cache = self.steps, self.steps.cache
        buffers = [
            steps.tokens,
            steps.history,
            steps._growth,
            cache.k,
            cache.v,
            cache.lengths,
            cache.positions,
        ]
        if steps._uniform is not None:
            buffers.append(steps._uniform)
        return [buffer.data_ptr() for buffer in buffers]

    def replay(self) -> None:
        assert self.addresses() == self.buffers
        current = self.steps._weights
        assert current, "nobody holds the weights while the graph reads them"
        self.steps._weights = self.weights
        self.steps._step()
        self.steps._weights = current


@dataclass
class Seen:
    """Record of captures and replays."""

    captured: list[int] = field(default_factory=list)
    """Rows of each graph that was captured."""
    started: list[int] = field(default_factory=list)
    """Rows of each text that a graph went on with."""


@pytest.fixture
def ahead(monkeypatch) -> Seen:
    """Lets steps run ahead on the CPU, with stand-ins for graphs: only a GPU has real ones."""
    seen = Seen()
    start = graphs.CapturedStep.start

    def capture(self):
        self._step()
        seen.captured.append(self.rows)
        return Graph(self)

    def counted(self, model, cache, longest, tokens, rows=None, history=None):
        seen.started.append(len(tokens))
        return start(self, model, cache, longest, tokens, rows, history)

    monkeypatch.setattr(graphs.CapturedStep, "_capture", capture)
    monkeypatch.setattr(graphs.CapturedStep, "start", counted)
    monkeypatch.setattr(engine, "is_worthwhile", lambda model, steps: True)
    monkeypatch.setattr(GPT2, "for_decoding", lambda self: self)  # packed models are the CPU's
    return seen


@pytest.fixture
def plainly(monkeypatch):
    """Generates without steps that run ahead."""

    def generate(model: GPT2, *prompt: torch.Tensor, **options) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "is_worthwhile", lambda model, steps: False)
            return model.generate(*prompt, **options)

    return generate


def prompts(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 4) tokens and a mask: prompts of one to four tokens."""
    tokens = torch.randint(61, (rows, 4), generator=torch.Generator().manual_seed(rows))
    lengths = torch.arange(rows) % 4 + 1
    return tokens, (torch.arange(4) >= 4 - lengths[:, None]).long()


OPTIONS = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"do_sample": True, "seed": 3, "top_k": 20, "temperature": 0.9}, id="sampled"),
    pytest.param({"do_sample": True, "seed": 3, "num_return_sequences": 3}, id="three-samples"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["torch", pytest.param("simulator", marks=needs_simulator)])
def test_running_ahead_changes_no_token(name, options, model, ahead, plainly):
    arguments = {"max_new_tokens": 37, "eos_token_id": 11, "pad_token_id": 0, **options}
    with backend(name):
        found = model.generate(PROMPTS, MASK, **arguments)
    assert ahead.started, "nothing ran ahead"
    with backend("torch"):
        assert torch.equal(found, plainly(model, PROMPTS, MASK, **arguments))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_padding_changes_no_token(rows, model, ahead, plainly):
    with backend("torch"):
        found = model.generate(*prompts(rows), max_new_tokens=40, eos_token_id=None)
        again = model.generate(*prompts(rows), max_new_tokens=40, eos_token_id=None)
        assert torch.equal(found, again)
        assert torch.equal(
            found, plainly(model, *prompts(rows), max_new_tokens=40, eos_token_id=None)
        )
    assert ahead.captured == [{1: 1, 3: 4, 5: 8}[rows]]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda-triton"])
def test_cuda_graphs_are_kept_and_change_no_token(name, model, plainly, monkeypatch):
    captured: list[torch.cuda.CUDAGraph | None] = []
    capture = graphs.CapturedStep._capture

    def counted(self):
        captured.append(capture(self))
        return captured[-1]

    monkeypatch.setattr(graphs.CapturedStep, "_capture", counted)
    model.cuda()
    with backend(name):
        for rows in (1, 3, 5, 3, 1):
            prompt = [part.cuda() for part in prompts(rows)]
            found = model.generate(*prompt, max_new_tokens=40, eos_token_id=None)
            expected = plainly(model, *prompt, max_new_tokens=40, eos_token_id=None)
            assert torch.equal(found, expected)
    assert len(captured) == 3 and None not in captured


@torch.inference_mode()
@pytest.mark.parametrize("name", ["torch", pytest.param("simulator", marks=needs_simulator)])
def test_padding_stays_where_it_is_and_no_row_sees_it(name, model):
    cache = model.new_cache(3, 16)
    with backend(name):
        model(torch.tensor([[1, 2], [3, 4], [5, 6]]), cache=cache)
        caches = []
        for rows in (3, 4):
            steps = graphs.CapturedStep(model, rows, 16, samples=False)
            # Of whoever had the graph before.
            steps.cache.k[3:] = steps.cache.v[3:] = torch.nan
            for left in (steps.tokens, steps._growth, steps.cache.lengths, steps.cache.positions):
                left.fill_(9)
            steps.start(model, cache, 2, torch.tensor([7, 8, 9]))
            chosen = steps.run(5, None)
            caches.append((chosen[:3], steps.cache.k[:, :3], steps.cache.v[:, :3]))
    assert steps.cache.lengths.tolist() == steps.cache.positions.tolist() == [7, 7, 7, 0]
    assert torch.equal(caches[0][0], caches[1][0])
    if name == "simulator":  # torch's products of other shapes round otherwise
        assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))


def test_rows_that_ended_leave_when_half_of_them_have(model, ahead):
    # Each row ends with the token that it would choose at a step of its own.
    with backend("torch"):
        plain = model.generate(PROMPTS, MASK, max_new_tokens=40, do_sample=False)
        stops = [plain[0, 4:8].tolist(), plain[1, 4:9].tolist()]
        for _ in range(2):
            model.generate(PROMPTS, MASK, max_new_tokens=40, do_sample=False, stop=stops)
    assert ahead.started == [3, *[3, 1] * 2]
    assert ahead.captured == [4, 1], "rows that leave use a graph that was there"


@pytest.mark.parametrize("options", OPTIONS)
def test_torchs_default_device_changes_no_token_of_what_runs_ahead(options, model, ahead):
    arguments = {"max_new_tokens": 40, "eos_token_id": 11, "pad_token_id": 0, **options}
    with backend("torch"):
        expected = model.generate(PROMPTS, MASK, **arguments)
        graph_pool.pool_of(model).clear()
        with torch.device("meta"):  # where data are of no use
            found = model.generate(PROMPTS, MASK, **arguments)
    assert len(ahead.captured) > 1 and torch.equal(found, expected)


class Copies(TorchFunctionMode):
    """Records what is sent to a device by ways that wait for the device, where it is a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        made = name in ("tensor", "as_tensor") and kwargs.get("device") != "cpu"
        moved = name in ("to", "cuda") and not kwargs.get("non_blocking")
        if made or moved or name in ("item", "nonzero", "__bool__"):
            self.waiting.append(name)
        return function(*args, **kwargs)


def test_a_block_is_started_without_a_copy_that_waits(model, ahead, monkeypatch):
    sent = []

    def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert tensor.device.type == "cpu"
        sent.append(device)
        return tensor

    monkeypatch.setattr(async_decoder, "to_device", send)
    begin, copies = async_decoder.AsyncDecoder._begin, Copies()

    def watched(self, remaining):
        # As on another device: index lists and tensors made there would be copied.
        with copies:
            begin(self, remaining)

    monkeypatch.setattr(async_decoder.AsyncDecoder, "_begin", watched)
    with backend("torch"):
        plain = model.generate(PROMPTS, MASK, max_new_tokens=60, do_sample=True, seed=3)
        stops = [plain[0, 4:8].tolist(), plain[1, 4:9].tolist()]
        sent.clear()
        model.generate(PROMPTS, MASK, max_new_tokens=60, do_sample=True, seed=3, stop=stops)
    assert ahead.started[-2:] == [3, 1], "rows left on the way"
    assert len(sent) == 5, "random numbers of each block, and once the rows that stay"
    assert copies.waiting == []


def test_a_graph_is_captured_once_for_all_calls_that_it_fits(model, ahead, plainly):
    with backend("torch"):
        for length in (4, 2):
            prompt = PROMPTS[:, -length:]
            found = model.generate(prompt, max_new_tokens=30)
            assert torch.equal(found, plainly(model, prompt, max_new_tokens=30))
        model.generate(prompts(4)[0], max_new_tokens=20)
        assert ahead.captured == [4]
        for _ in range(2):
            model.generate(PROMPTS, max_new_tokens=30, do_sample=True, top_k=3)
        assert ahead.captured == [4, 4], "what is chosen, and how, is part of the graph"
    with backend("reference"):
        model.generate(PROMPTS, max_new_tokens=30)
    assert ahead.captured == [4, 4, 4], "and so is the backend"


def test_a_longer_text_has_a_graph_of_its_own(ahead):
    model = small_model(n_positions=300)
    with backend("torch"):
        for new in (100, 120, 160, 260, 100):
            model.generate(PROMPTS, max_new_tokens=new, eos_token_id=None)
    assert ahead.captured == [4, 4, 4]
    lengths = {steps.cache.max_length for steps in graph_pool.pool_of(model)._idle}
    assert lengths == {128, 256, 300}


def test_buckets():
    rows = [graph_pool.rows_bucket(count) for count in (1, 2, 3, 5, 9, 33, 64, 65, 129)]
    assert rows == [1, 2, 4, 8, 16, 64, 64, 128, 192]
    lengths = [graph_pool.length_bucket(count, 1000) for count in (1, 128, 129, 513, 1000)]
    assert lengths == [128, 128, 256, 1000, 1000]


def test_weights_changed_in_place_are_read_and_others_captured_anew(model, ahead, plainly):
    def check() -> None:
        found = model.generate(PROMPTS, MASK, max_new_tokens=30)
        assert torch.equal(found, plainly(model, PROMPTS, MASK, max_new_tokens=30))

    with backend("torch"):
        check()
        model.load_state_dict(small_model(2).state_dict())
        check()
        assert ahead.captured == [4]
        model.load_state_dict(small_model(3).state_dict(), assign=True)
        check()
        assert ahead.captured == [4, 4]
        model.h[1].mlp.c_fc.weight.data = model.h[1].mlp.c_fc.weight.data * 2
        check()
        assert ahead.captured == [4, 4, 4]
        pool = graph_pool.pool_of(model)
        assert len(pool) == 1, "graphs of weights that are gone go, too"
        model.to(torch.float32)
        assert len(pool) == 1
        model.double()
        assert len(pool) == 0, "moving the weights frees the graphs"
        check()


def test_weights_replaced_on_the_way_end_with_the_call(model, ahead):
    criteria = StopCriteria([])
    with backend("torch"):
        steps = decoding.decode(model, [[7, 3]], [40], SamplingOptions(max_new_tokens=40), criteria)
        before = [next(steps).tokens for _ in range(3)]
        model.load_state_dict(small_model(2).state_dict(), assign=True)
        model.generate(PROMPTS[:1], max_new_tokens=30)
        before += [step.tokens for step in steps]
        expected = model.load_state_dict(small_model(1).state_dict()) and model.generate(
            torch.tensor([[7, 3]]), max_new_tokens=40, eos_token_id=None
        )
    assert [token for [token] in before] == expected[0, 2:].tolist()
    assert ahead.captured == [1, 1]
    assert len(graph_pool.pool_of(model)) == 1


def test_two_calls_at_once_have_a_graph_each(model, ahead, plainly):
    with backend("torch"):
        expected = [plainly(model, prompts(3)[0] + i, max_new_tokens=40) for i in range(2)]
        pool = graph_pool.pool_of(model)
        gate, found = threading.Barrier(2, timeout=patience()), {}

        def call(index: int) -> None:
            tokens = (prompts(3)[0] + index).tolist()
            rows: list[list[int]] = [[] for _ in tokens]
            criteria = StopCriteria([])
            options = SamplingOptions(max_new_tokens=40)
            for step in decoding.decode(model, tokens, [40] * 3, options, criteria):
                gate.wait()  # both are on their way
                for row, token in zip(step.rows, step.tokens, strict=True):
                    rows[row].append(token)
            found[index] = torch.tensor(rows)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(2):
            assert torch.equal(found[index], expected[index][:, 4:])
        assert ahead.captured == [4, 4] and len(pool) == 2
        model.generate(PROMPTS, max_new_tokens=30)
    assert ahead.captured == [4, 4]


@pytest.mark.parametrize("way", ["error", "closed", "dropped", "in a step", "in the start"])
def test_a_call_that_breaks_off_leaves_a_clean_graph(way, model, ahead, plainly, monkeypatch):
    criteria = StopCriteria([])
    options = SamplingOptions(max_new_tokens=60)
    pool = graph_pool.pool_of(model)

    class Broken(Exception):
        pass

    def fail(*args, **kwargs):
        raise Broken

    with backend("torch"):
        model.generate(PROMPTS, max_new_tokens=30)
        steps = decoding.decode(model, [[1], [2, 3], [4]], [60] * 3, options, criteria)
        first = next(steps)
        assert len(first.tokens) == 3 and len(pool) == 1
        with monkeypatch.context() as patch:
            if way == "in the start":
                patch.setattr(graphs, "_weights", fail)
                with pytest.raises(Broken):
                    next(steps)
            else:
                next(steps)
                assert len(pool) == 0, "lent"
            if way == "error":
                with pytest.raises(Broken):
                    steps.throw(Broken())
            elif way == "closed":
                steps.close()
            elif way == "dropped":
                del steps
                gc.collect()
            elif way == "in a step":
                patch.setattr(Graph, "replay", fail)
                with pytest.raises(Broken):
                    list(steps)
        assert len(pool) == 1
        found = model.generate(PROMPTS, MASK, max_new_tokens=40)
        assert torch.equal(found, plainly(model, PROMPTS, MASK, max_new_tokens=40))
    assert ahead.captured == [4]


def test_a_graph_whose_device_has_failed_is_not_kept(model, ahead, monkeypatch):
    def fail(self):
        # What a device says that has failed.
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(graphs.CapturedStep, "stop", fail)
    with (
        backend("torch"),
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        model.generate(PROMPTS, max_new_tokens=30)
    assert len(graph_pool.pool_of(model)) == 0


def test_only_so_many_graphs_are_kept(model, ahead, monkeypatch):
    pool = graph_pool.pool_of(model)
    with backend("torch"):
        for top_k in (1, 2, 3, 1, 4):  # 1 is used again before the room is full
            monkeypatch.setattr(graph_pool, "KEPT", 3)  # to fill it soon
            model.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_k=top_k)
        assert len(pool) == 3 and len(ahead.captured) == 4
        model.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_k=1)
        assert len(ahead.captured) == 4
        model.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_k=2)
        assert len(ahead.captured) == 5, "the one not used for longest went"

        size = pool._idle[0].nbytes
        assert size == 2 * 2 * 4 * 64 * 32 * 4
        for room, kept in ((2 * size, 2), (size - 1, 0)):
            monkeypatch.setattr(graph_pool, "kept_bytes", lambda device, room=room: room)
            model.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_k=9)
            assert len(pool) == kept


def test_graphs_that_wait_make_room_where_memory_is_short(model, ahead, monkeypatch):
    with backend("torch"):
        model.generate(PROMPTS, max_new_tokens=20)
        pool = graph_pool.pool_of(model)
        create = GPT2.new_cache

        def short_of_memory(self, batch_size, *args):
            if len(pool) and batch_size == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return create(self, batch_size, *args)

        monkeypatch.setattr(GPT2, "new_cache", short_of_memory)
        model.generate(prompts(5)[0], max_new_tokens=20)
    assert ahead.captured == [4, 8]
    assert [steps.rows for steps in pool._idle] == [8]


def test_without_memory_for_a_second_cache_steps_are_taken_one_by_one(
    model, ahead, plainly, monkeypatch, caplog
):
    create = GPT2.new_cache

    def short_of_memory(self, batch_size, *args):
        if batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return create(self, batch_size, *args)

    monkeypatch.setattr(GPT2, "new_cache", short_of_memory)
    with backend("torch"):
        found = model.generate(PROMPTS, MASK, max_new_tokens=20, do_sample=True, seed=1)
        assert ahead.started == [] and "CUDA out of memory" in caplog.text
        expected = plainly(model, PROMPTS, MASK, max_new_tokens=20, do_sample=True, seed=1)
    assert torch.equal(found, expected)


def test_graphs_go_with_their_model(ahead):
    model = small_model()
    with backend("torch"):
        model.generate(PROMPTS, max_new_tokens=20)
    [steps] = graph_pool.pool_of(model)._idle
    assert steps._weights == [], "a graph that waits holds no weights"
    gone = weakref.ref(steps)
    del model, steps
    gc.collect()
    assert gone() is None


HISTORY = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "top_k": 9,
        "do_sample": True,
        "seed": 2,
    },
]


@pytest.mark.parametrize("options", HISTORY, ids=["penalty", "ngrams", "sampled"])
@pytest.mark.parametrize("name", ["torch", pytest.param("simulator", marks=needs_simulator)])
def test_choices_that_read_the_history_run_ahead(name, options, model, ahead, plainly):
    arguments = {"max_new_tokens": 55, "eos_token_id": None, **options}
    with backend("torch"):
        expected = plainly(model, PROMPTS, MASK, **arguments)
        free = {name: value for name, value in options.items() if name in ("do_sample", "seed")}
        without = plainly(model, PROMPTS, MASK, max_new_tokens=55, eos_token_id=None, **free)
    assert not torch.equal(expected, without), "the history decides"
    for _ in range(2):  # the second call's graph holds the first one's history
        with backend(name):
            found = model.generate(PROMPTS, MASK, **arguments)
        assert torch.equal(found, expected)
    assert ahead.captured == [4]


def test_the_history_goes_along_with_rows_that_stay(model, ahead, plainly):
    options = {"no_repeat_ngram_size": 1, "max_new_tokens": 50, "eos_token_id": None}
    with backend("torch"):
        plain = plainly(model, PROMPTS, MASK, **options)
        stops = [plain[0, 4:8].tolist(), plain[1, 4:9].tolist()]
        found = model.generate(PROMPTS, MASK, stop=stops, pad_token_id=0, **options)
        expected = plainly(model, PROMPTS, MASK, stop=stops, pad_token_id=0, **options)
    assert ahead.started == [3, 1]
    assert torch.equal(found, expected)


def test_rows_that_would_slide_are_taken_one_by_one(model, ahead):
    criteria = StopCriteria([])
    with backend("torch"):
        steps = list(
            decoding.decode(
                model, [[7, 3]], [70], SamplingOptions(do_sample=False), criteria, slides=True
            )
        )
    assert len(steps) == 70 and ahead.started == []


def test_a_step_is_one_call_of_each_op(model):
    cache = model.new_cache(2)
    with backend("torch"), torch.inference_mode():
        model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
        steps = graphs.CapturedStep(model, 2, 8, samples=False, temperature=1.0)
        steps.start(model, cache, 2, torch.tensor([5, 6]))
        with record_calls() as calls:
            steps.run(3, None)
    assert [call.op for call in calls if call.op in ("decode_step", "sample")] == [
        "decode_step", "sample"
    ] * 3  # fmt: skip
    assert steps.cache.lengths.tolist() == steps.cache.positions.tolist() == [5, 5]
    with pytest.raises(GenerationError, match="5 tokens has no room for 4 more"):
        steps.run(4, None)
    steps.replay_at(2)  # outside of inference mode
    assert steps.cache.lengths.tolist() == [2, 2]
