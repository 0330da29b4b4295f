"""The server's page in a real Chromium: typed at, looked at, interrupted, and given errors."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.tokenizer import Tokenizer
from server_process import serving

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this computer"),
    pytest.mark.timeout(120),
]
LAYERS, HEADS, LENGTH = 3, 4, 2048
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a small random model, which has long texts."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained("adventures")
    config = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=64, vocab_size=tokenizer.vocab_size,
        n_positions=LENGTH, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2(config).save_pretrained(folder / "model", tokenizer)
    with serving(folder / "model", folder) as server:
        yield f"{server.url}/"


def answer(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers to this process."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        # Without its own sandbox, which containers and the superuser do not have.
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """A window on the page, and what went wrong in it.

    Args:
        browser: Chromium.
        address: of the server.
        options: of the browser's context.
    """

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._note_console)
        self.page.on("request", self._note_request)

    def _note_console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(self.address):
            self.faults.append(f"a request to {request.url}")
        if request.url.endswith("/v1/completions"):
            self.bodies.append(request.post_data_json)

    def open(self, fragment: str = "") -> Any:
        self.page.goto(self.address + fragment)
        self.page.locator("#option-temperature").wait_for(state="attached")
        return self.page

    def answer_with(self, path: str, **answer: Any) -> None:
        """Answer the page's requests to a path in the server's place."""
        self.page.route(self.address + path, lambda route: route.fulfill(**answer))

    def stream(self, *chunks: dict[str, Any], end: str = "data: [DONE]\n\n") -> None:
        """Answer completions with these chunks."""
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
        self.answer_with("v1/completions", body=body, content_type="text/event-stream")

    def refuse(self, status: int, headers: dict[str, str] | None = None, **error: Any) -> None:
        """Answer completions with an error."""
        body = json.dumps({"error": {"type": "some_error", "param": None, "code": None, **error}})
        self.answer_with(
            "v1/completions", status=status, body=body,
            headers={"Content-Type": "application/json", **(headers or {})},
        )  # fmt: skip

    def run(self, prompt: str, **options: object) -> Any:
        """Run a prompt to its end."""
        fill(self.page, prompt, **options)
        # A key is acknowledged before the page has seen it: wait for what the run leaves behind.
        self.page.evaluate(
            """() => {
                document.getElementById("status").textContent = "";
                document.getElementById("error").hidden = true;
            }"""
        )
        self.page.keyboard.press("Control+Enter")
        ended = "#status:text-matches('^(Reached|Ended|Stopped|Failed)'), #error:visible"
        self.page.locator(ended).first.wait_for()
        expect(self.page.locator("#run")).to_be_enabled()
        return self.page


def fill(page: Any, prompt: str, **options: object) -> None:
    page.locator("#prompt").fill(prompt)
    for name, value in options.items():
        page.locator(f"#option-{name}").fill(str(value))


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    guest = Visitor(browser, address, viewport={"width": 1280, "height": 900})
    yield guest
    guest.context.close()
    assert not guest.faults


def chunk(text: str, *tokens: str, offset: int = 0, **others: Any) -> dict[str, Any]:
    """A piece of a streamed completion whose tokens all have the likelihood 1/2."""
    offsets = [offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    choice = {
        "index": 0, "text": text, "finish_reason": None, "token_ids": [5] * len(tokens),
        "logprobs": {
            "tokens": list(tokens), "token_logprobs": [-0.6931] * len(tokens),
            "top_logprobs": [{token: -0.6931, " other": -1.3863} for token in tokens],
            "text_offset": offsets[:-1],
        },
    }  # fmt: skip
    return {"choices": [{**choice, **others}]}


def location(page: Any) -> str:
    """The address, which the driver hears of later than the page."""
    return page.evaluate("location.href")


def shown(page: Any) -> str:
    return page.locator("#text").text_content()


# ---- Runs


def test_a_prompt_is_continued_as_the_server_continues_it(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.run("The river", temperature=0, max_tokens=40)
    wanted = answer(
        visitor.address,
        "v1/completions",
        {"prompt": "The river", "max_tokens": 40, "temperature": 0},
    )["choices"][0]["text"]
    assert shown(page) == "The river" + wanted
    assert page.locator("#text .token").count() == 40
    assert (
        page.locator("#status").text_content().startswith("Reached the length limit, 40 tokens in")
    )
    assert re.fullmatch(r"\d+ ms", page.locator("#first").text_content())
    assert re.fullmatch(r"[\d.]+ tok/s", page.locator("#speed").text_content())
    assert page.locator("#count").text_content() == "40"
    tokens = answer(visitor.address, "tokenize", {"prompt": "The river"})["count"]
    assert page.locator("#read").text_content().startswith(str(tokens))


@pytest.mark.parametrize("how", ["key", "button"])
def test_a_run_streams_until_it_is_stopped(visitor: Visitor, how: str) -> None:
    page = visitor.open()
    fill(page, "The river", max_tokens=LENGTH - 20, seed=1)
    page.locator("#option-ignore_eos").check()
    page.locator("#run").click()
    page.locator("#text .token").first.wait_for(state="attached")  # while the others are to come
    page.keyboard.press("Escape") if how == "key" else page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert 0 < page.locator("#text .token").count() < LENGTH - 20
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#error")).to_be_hidden()
    wait_until_idle(visitor.address)


def test_a_long_text_is_followed_until_one_scrolls_up(visitor: Visitor) -> None:
    page = visitor.open()
    page.locator("#option-ignore_eos").check()
    visitor.run("The river", max_tokens=1500, seed=1)
    distance = "it => it.scrollHeight - it.scrollTop - it.clientHeight"
    page.wait_for_timeout(100)
    text = page.locator("#text")
    assert text.evaluate("it => it.scrollTop") > 1000
    assert text.evaluate(distance) < 2
    fill(page, "The river", max_tokens=1500, seed=1)
    page.locator("#run").click()
    page.locator("#text .token").nth(400).wait_for(state="attached")
    text.evaluate("it => it.scrollTop -= 300")
    expect(page.locator("#run")).to_be_enabled()
    assert text.evaluate(distance) >= 300


def wait_until_idle(address: str) -> None:
    """Until no request runs: the server has noticed that its client is gone."""
    for _ in range(100):
        with urllib.request.urlopen(address + "metrics") as response:
            text = response.read().decode()
        running = re.search(r"^\w*running(?:\{[^}]*\})? (\S+)$", text, re.M)
        assert running, text
        if float(running[1]) == 0:
            return
        time.sleep(0.1)
    raise AssertionError("a request that was stopped goes on")


def test_the_text_can_be_copied_and_continued(visitor: Visitor) -> None:
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visitor.open()
    visitor.stream(chunk(" flows", " flows"))
    visitor.run("The river")
    page.locator("#copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == " flows"
    with page.expect_request(visitor.address + "v1/completions"):
        page.locator("#continue").click()
    assert [body["prompt"] for body in visitor.bodies] == ["The river", "The river flows"]


def test_characters_of_several_tokens_and_texts_that_come_late(visitor: Visitor) -> None:
    """A token has the characters from its offset to the next one's, whenever they come."""
    page = visitor.open()
    offsets = {
        "tokens": ["bytes:\\xe7", "bytes:\\x8c\\xab", "😀", "!"], "text_offset": [0, 0, 1, 2],
        "token_logprobs": [-1.0] * 4, "top_logprobs": [{}] * 4,
    }  # fmt: skip
    first = {"index": 0, "text": "", "logprobs": None, "token_ids": [1, 2]}
    last = {"index": 0, "text": "!", "logprobs": None, "finish_reason": "stop", "token_ids": [9]}
    visitor.stream(
        {"choices": [{**first, "prompt_token_ids": [7]}]},
        {"choices": [{"index": 0, "text": "猫😀", "token_ids": [3, 4], "logprobs": offsets}]},
        {"choices": [last]},
    )
    visitor.run("")
    assert page.locator("#text .token").all_text_contents() == ["", "猫", "😀", "!"]
    assert page.locator("#status").text_content().startswith("Ended by itself")
    with page.expect_request(visitor.address + "attention") as asked:
        page.locator("[name=coloring][value=attention]").check()
    assert asked.value.post_data_json["tokens"] == [7, 1, 2, 3, 4]  # 9 ended it, and has no text


# ---- Tokens


def test_pointing_at_a_token_shows_what_might_have_stood_there(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.stream(chunk(" one two", " one", " two"))
    visitor.run("Zero")
    tip = page.locator("#tip")
    expect(tip).to_be_hidden()
    page.locator("#text .token").nth(1).hover()
    expect(tip).to_be_visible()
    assert tip.locator(".alternative").all_text_contents() == ["␣two50.0 %", "␣other25.0 %"]
    expect(tip.locator(".taken")).to_have_text("␣two50.0 %")
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_colors_follow_the_probability(visitor: Visitor) -> None:
    page = visitor.open()
    certain, rare = chunk("a", "a"), chunk("b", "b", offset=1)
    certain["choices"][0]["logprobs"]["token_logprobs"] = [-0.0001]
    rare["choices"][0]["logprobs"]["token_logprobs"] = [-9.0]
    visitor.stream(certain, rare)
    visitor.run("")
    assert depths(page) == [0, 1]
    certain_color, rare_color = (color_of(token) for token in page.locator("#text .token").all())
    assert certain_color != rare_color
    page.locator("[name=coloring][value=nothing]").check()
    assert [color_of(token) for token in page.locator("#text .token").all()] == [
        "rgba(0, 0, 0, 0)"
    ] * 2


def color_of(token: Any) -> str:
    return token.evaluate("it => getComputedStyle(it).backgroundColor")


def depths(page: Any) -> list[float]:
    return [
        float(token.evaluate("it => it.style.getPropertyValue('--depth')"))
        for token in page.locator("#text [role=option]").all()
    ]


def test_everything_can_be_done_with_keys_alone(visitor: Visitor) -> None:
    page, press = visitor.open(), visitor.page.keyboard.press
    visitor.stream(chunk(" one two three", " one", " two", " three"))
    press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    link = location(page)
    press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    assert location(page) == link
    page.keyboard.type("Zero")
    press("Tab")
    expect(page.locator("#run")).to_be_focused()
    press("Enter")
    tokens = page.locator("#text .token")
    expect(tokens).to_have_count(3)
    expect(page.locator("#run")).to_be_enabled()
    reach(page, "#text .token")
    expect(tokens.nth(0)).to_be_focused()
    press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#tip .taken")).to_have_text("␣two50.0 %")
    press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    press("End")
    expect(tokens.nth(2)).to_be_focused()
    press("ArrowRight")  # there is nothing further
    expect(tokens.nth(2)).to_be_focused()
    press("ArrowLeft")
    press("Enter")
    expect(tokens.nth(1)).to_have_attribute("aria-selected", "true")
    press("Tab")
    press("Tab")
    expect(page.locator("#token button").nth(1)).to_be_focused()
    with page.expect_request(visitor.address + "v1/completions"):
        press("Enter")
    expect(page.locator("#prompt")).to_have_value("Zero one other")
    assert visitor.bodies[-1]["prompt"] == "Zero one other"


def reach(page: Any, selector: str) -> None:
    """Press Tab until an element has the focus, which is visible wherever it is."""
    for _ in range(60):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def test_attention_is_the_servers(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.run("The river runs", max_tokens=8, temperature=0)
    with page.expect_request(visitor.address + "attention") as asked:
        page.locator("[name=coloring][value=attention]").check()
    tokens = asked.value.post_data_json["tokens"]
    expect(page.locator("#text .prompt[role=option]")).not_to_have_count(0)
    assert page.locator("#text [role=option]").count() == len(tokens)
    assert page.locator("#layer").get_attribute("max") == str(LAYERS - 1)
    assert page.locator("#head").get_attribute("max") == str(HEADS - 1)
    for layer, head, query in [(0, 0, len(tokens) - 1), (2, 3, len(tokens) - 3), (2, 3, 2)]:
        page.locator("#layer").fill(str(layer))
        page.locator("#head").fill(str(head))
        page.locator("#text [role=option]").nth(query).click()
        where = {"tokens": tokens, "layer": layer, "head": head}
        row = answer(visitor.address, "attention", where)["weights"][query]
        most = max(row[1:])
        wanted = [min(1, weight / most) for weight in row] + [0] * (len(tokens) - len(row))
        expect(page.locator("#attention-note")).to_contain_text("The first token takes")
        page.wait_for_timeout(100)
        assert depths(page) == pytest.approx(wanted, abs=1e-3)
    page.locator("#text [role=option]").nth(1).hover()
    expect(page.locator("#tip")).to_contain_text(f"looked at with {100 * row[1]:.0f}"[:-1])


def test_attention_of_long_texts_is_that_of_the_newest_tokens(visitor: Visitor) -> None:
    page = visitor.open()
    page.locator("#option-ignore_eos").check()
    visitor.run("The river runs", max_tokens=280, seed=1)
    with page.expect_request(visitor.address + "attention") as asked:
        page.locator("[name=coloring][value=attention]").check()
    tokens = asked.value.post_data_json["tokens"]
    note = page.locator("#attention-note")
    expect(note).to_contain_text("The first token takes")
    rows = answer(visitor.address, "attention", {"tokens": tokens})["weights"]
    assert len(rows) < len(tokens)
    wanted = [min(1, weight / max(rows[-1][1:])) for weight in rows[-1]]
    assert depths(page) == pytest.approx(wanted, abs=1e-3)
    page.locator("#text [role=option]").nth(1).click()
    expect(note).to_contain_text(f"Only the newest {len(rows)} tokens have weights")
    assert set(depths(page)) == {0}


# ---- Settings


def test_every_option_of_the_server_has_a_labeled_control(visitor: Visitor) -> None:
    page = visitor.open()
    api = answer(visitor.address, "openapi.json")
    body = api["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    wanted = {"temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop", "logit_bias"}
    controls = page.locator("#controls [name]")
    names = {control.get_attribute("name") for control in controls.all()}
    assert wanted <= names
    for control in controls.all():
        name = control.get_attribute("name")
        described = page.locator("#" + control.get_attribute("aria-describedby"))
        assert page.get_by_label(re.compile(name.replace("_", " "), re.I)).count()
        facts = schema["properties"][name]
        assert facts.get("description", "") in described.text_content()
        for limit in ("minimum", "maximum"):
            if abs(facts.get(limit, 1e10)) < 1e9:
                assert str(facts[limit]) in described.text_content()
        if control.get_attribute("type") == "number" and name != "max_tokens":
            default = facts.get("default")
            assert control.input_value() == ("" if default is None else f"{default:g}")


def test_only_what_was_changed_is_sent(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.stream(chunk("", ""))
    visitor.run("a")
    plain = visitor.bodies[-1]
    assert plain == {
        "model": plain["model"], "prompt": "a", "max_tokens": 100, "logprobs": 5,
        "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    page.locator("#option-ignore_eos").check()
    page.locator("#constraint").select_option("regular expression")
    page.locator("#constraint-text").fill("[ab]+")
    visitor.run(
        "a", temperature=0.5, top_k=7, seed=3, stop="\\n\nEND", stop_token_ids="1, 2",
        logit_bias='{"3": -1}', max_tokens=9,
    )  # fmt: skip
    assert visitor.bodies[-1] == {
        **plain, "temperature": 0.5, "top_k": 7, "seed": 3, "stop": ["\n", "END"],
        "stop_token_ids": [1, 2], "logit_bias": {"3": -1}, "max_tokens": 9, "ignore_eos": True,
        "response_format": {"type": "regex", "regex": "[ab]+"},
    }  # fmt: skip
    page.locator("#reset").click()
    visitor.run("a")
    assert visitor.bodies[-1] == plain


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("JSON schema", '{"enum": ["red", "blue"]}', '"(red|blue)"'),
        ("regular expression", "(tik|tok)!", "(tik|tok)!"),
        ("one of these lines", "yes\nno", "yes|no"),
        ("Lark grammar", 'start: "left" | "right"', "left|right"),
    ],
)
def test_a_constraint_constrains(visitor: Visitor, kind: str, text: str, pattern: str) -> None:
    page = visitor.open()
    page.locator("#constraint").select_option(kind)
    page.locator("#constraint-text").fill(text)
    visitor.run("The river")
    expect(page.locator("#error")).to_be_hidden()
    assert re.fullmatch(pattern, shown(page).removeprefix("The river").strip())


def test_a_link_restores_everything_but_the_key(visitor: Visitor, browser: Any) -> None:
    page = visitor.open()
    page.locator("#key").fill("secret-key")
    page.locator("#option-ignore_eos").check()
    page.locator("#constraint").select_option("one of these lines")
    page.locator("#constraint-text").fill("yes\nno")
    page.locator("[name=coloring][value=attention]").check()
    page.locator("#layer").fill("2")
    page.locator("#head").fill("1")
    prompt = "A #prompt & 100 % <b>of</b> 猫\nand a second line"
    visitor.stream(chunk("", ""))
    visitor.run(prompt, temperature=0.25, stop="\\n", seed=12)
    link = location(page)
    assert "secret" not in link
    other = Visitor(browser, visitor.address)
    other.open(link.removeprefix(visitor.address))
    other.stream(chunk("", ""))
    expect(other.page.locator("#prompt")).to_have_value(prompt)
    expect(other.page.locator("#constraint-text")).to_be_visible()
    assert other.page.locator("#layer").input_value() == "2"
    assert other.page.locator("#head").input_value() == "1"
    assert other.page.locator("[value=attention]").is_checked()
    assert other.page.locator("#key").input_value() == ""
    assert not other.bodies  # nothing runs before it is asked for
    with other.page.expect_request(visitor.address + "v1/completions"):
        other.page.locator("#run").click()
    assert other.bodies == visitor.bodies
    other.context.close()
    assert not other.faults


def test_what_is_typed_while_the_page_loads_is_kept(visitor: Visitor) -> None:
    page = visitor.page
    held: list[Any] = []
    page.route(visitor.address + "openapi.json", lambda route: held.append(route))
    page.goto(visitor.address + "#prompt=old&top_k=5")
    page.locator("#prompt").fill("new")
    page.wait_for_timeout(300)
    held[0].continue_()
    expect(page.locator("#option-top_k")).to_have_value("5")
    expect(page.locator("#prompt")).to_have_value("new")
    page.locator("#link").click()
    assert location(page).endswith("#prompt=new&top_k=5")


def test_the_key_is_sent_and_kept_for_the_tab(visitor: Visitor) -> None:
    page = visitor.open()
    page.locator("#key").fill("a-key")
    page.locator("#key").press("Enter")
    page.reload()
    expect(page.locator("#key")).to_have_value("a-key")
    with page.expect_request(visitor.address + "v1/completions") as asked:
        visitor.run("a", max_tokens=1)
    assert asked.value.headers["authorization"] == "Bearer a-key"
    assert page.evaluate("JSON.stringify(localStorage)").find("a-key") < 0


# ---- Errors


def test_the_servers_errors_are_shown_beside_what_they_are_about(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.run("The river", logit_bias="no JSON")
    error = page.locator("#error")
    expect(error).to_contain_text("logit_bias")
    expect(error).to_contain_text("400 · invalid_request_error")
    expect(page.locator("#option-logit_bias")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Go to logit_bias").click()
    expect(page.locator("#option-logit_bias")).to_be_focused()
    page.locator("#option-logit_bias").fill("")
    visitor.run("The river", max_tokens=2)
    expect(error).to_be_hidden()


def test_a_number_out_of_range_is_not_sent(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.run("The river", top_p=3)
    expect(page.locator("#error")).to_contain_text("top_p")
    expect(page.locator("#option-top_p")).to_have_attribute("aria-invalid", "true")
    page.locator("#option-top_p").press_sequentially("e")  # no number at all
    page.keyboard.press("Control+Enter")
    expect(page.locator("#error")).to_contain_text("top_p")
    assert not visitor.bodies


def test_a_full_server_says_when_to_come_back(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.refuse(429, {"Retry-After": "7"}, message="too many wait")
    visitor.run("a")
    expect(page.locator("#error")).to_contain_text("too many wait")
    expect(page.locator("#error")).to_contain_text("Try again in 7 s.")


def test_a_missing_key_is_asked_for(visitor: Visitor) -> None:
    page = visitor.open()
    visitor.refuse(401, message="no key was sent")
    visitor.run("a")
    expect(page.locator("#error")).to_contain_text("no key was sent")
    expect(page.locator("#key")).to_be_focused()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "The connection broke before the text was finished."),
        ('data: {"error": {"message": "the model failed"}}\n\n', "the model failed"),
    ],
)
def test_a_stream_that_breaks_off_keeps_its_text(visitor: Visitor, end: str, message: str) -> None:
    page = visitor.open()
    visitor.stream(chunk(" one", " one"), end=end)
    visitor.run("Zero")
    expect(page.locator("#error")).to_contain_text(message)
    expect(page.locator("#status")).to_contain_text("Failed, 1 tokens")
    assert shown(page) == "Zero one"


def test_a_server_that_is_gone_is_said_to_be(visitor: Visitor) -> None:
    page = visitor.open()
    page.route(visitor.address + "v1/completions", lambda route: route.abort())
    visitor.run("a")
    expect(page.locator("#error")).to_contain_text("The server does not answer")


def test_markup_is_never_executed(visitor: Visitor) -> None:
    page = visitor.open("#" + urllib.parse.urlencode({"prompt": MARKUP, "stop": MARKUP}))
    visitor.stream(chunk(MARKUP, MARKUP))
    visitor.run(MARKUP)
    page.locator("#text .token").first.click()
    expect(page.locator("#token")).to_contain_text("onerror")
    expect(page.locator("#tip")).to_contain_text("onerror")
    page.locator("[name=coloring][value=attention]").check()
    page.unroute_all()
    visitor.refuse(400, message=MARKUP, type=MARKUP, param="seed")
    visitor.run(MARKUP)
    expect(page.locator("#error")).to_contain_text("onerror")
    page.wait_for_timeout(200)
    assert page.title() == "gpt2fast"
    assert page.locator("main :is(img, script)").count() == 0


# ---- Looks


def test_colors_follow_the_system_and_the_switch(browser: Any, address: str) -> None:
    dark = Visitor(browser, address, color_scheme="dark")
    page = dark.open()
    assert lightness(page) < 60
    page.locator("#theme").select_option("light")
    assert lightness(page) > 200
    page.reload()
    assert lightness(page) > 200
    page.locator("#theme").select_option("")
    assert lightness(page) < 60
    page.emulate_media(color_scheme="light")
    assert lightness(page) > 200
    dark.context.close()
    assert not dark.faults


def lightness(page: Any) -> float:
    """Of the page's background, 0 to 255."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, address: str, width: int) -> None:
    narrow = Visitor(browser, address, viewport={"width": width, "height": 740})
    page = narrow.open()
    long = "x" * 300
    narrow.stream(chunk(long + " end", long, " end"))
    narrow.run(long)
    page.evaluate("document.getElementById('settings').open = true")
    page.locator("#constraint").select_option("Lark grammar")
    for token in page.locator("#text .token").all():
        token.hover()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    narrow.page.unroute_all()
    narrow.refuse(400, message=long, param="seed")
    narrow.run(long)
    expect(page.locator("#error")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    narrow.context.close()
    assert not narrow.faults


def test_every_control_has_a_name(visitor: Visitor) -> None:
    page = visitor.open()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter((it) => !it.ariaHidden && !it.textContent.trim() && !it.labels?.length
            && !it.ariaLabel).map((it) => it.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#status").get_attribute("role") == "status"
    assert page.locator("#error").get_attribute("role") == "alert"


def test_the_page_takes_nothing_from_elsewhere(visitor: Visitor) -> None:
    """Its policy forbids it, and it does not try: the visitor notes requests to other hosts."""
    response = visitor.page.goto(visitor.address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    page = visitor.open()
    visitor.run("The river", max_tokens=2)
    folder = Path(__file__).parents[2] / "gpt2fast" / "serving" / "page"
    for file in folder.iterdir():
        assert "innerHTML" not in file.read_text()
        addresses = re.findall(r"https?://[^\s\"']+", file.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert page.locator("style, [style*=url]").count() == 0
