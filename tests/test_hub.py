"""Names of models: paths, run folders, the bundled model, and the Hugging Face hub."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import gpt2fast
from gpt2fast import GPT2
from gpt2fast.checkpoints.hub import BUNDLED
from gpt2fast.checkpoints.tensor_files import write_safetensors
from gpt2fast.errors import WeightsError
from small_checkpoints import assert_same_parameters, random_model
from time_limits import CLOCK

# Where models are


def test_a_run_directory_gives_its_final_model_or_its_newest_checkpoint(tmp_path):
    for step in (500, 1500, 1000):
        model = random_model()
        with torch.no_grad():
            model.wte.weight.fill_(step)
        model.save_pretrained(tmp_path / "checkpoints" / f"step-{step:08d}")
    random_model().save_pretrained(tmp_path / "checkpoints" / "best")
    unfinished = tmp_path / "checkpoints" / "step-00002000"
    unfinished.mkdir()
    write_safetensors(unfinished / "model.safetensors", random_model().state_dict())
    assert GPT2.from_pretrained(tmp_path).wte.weight[0, 0] == 1500
    with torch.no_grad():
        model.wte.weight.fill_(7)
    model.save_pretrained(tmp_path)
    assert GPT2.from_pretrained(tmp_path).wte.weight[0, 0] == 7


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(
        WeightsError, match=r"has no weights: none of model\.safetensors.*notes\.md"
    ):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["./missing", "missing.pt", "../missing/model.safetensors", "a/b/c", "out/", "~/missing"],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path, hub):
    with pytest.raises(WeightsError, match=rf"no such file or directory: {re.escape(path)}"):
        GPT2.from_pretrained(path)
    assert hub.requested == []


@pytest.mark.parametrize("name", ["two words", "a--b", "x" * 97, "x" * 5000, "-x", "nul\0"])
def test_a_name_that_no_model_can_have_is_refused(name):
    with pytest.raises(WeightsError, match="neither") as caught:
        GPT2.from_pretrained(name)
    assert len(str(caught.value)) < 700


def test_home_directories_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    random_model().save_pretrained(tmp_path / "model")
    assert_same_parameters(GPT2.from_pretrained("~/model"), random_model())


def test_the_bundled_models_name_means_the_one_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    inside, outside = random_model(), random_model(dtype=torch.bfloat16)
    outside.save_pretrained(BUNDLED)
    with pytest.raises(WeightsError, match="is not in this installation"):
        GPT2.from_pretrained(BUNDLED)
    inside.save_pretrained(tmp_path / "package" / "assets" / BUNDLED)
    assert_same_parameters(GPT2.from_pretrained(BUNDLED), inside)
    assert_same_parameters(GPT2.from_pretrained(f"./{BUNDLED}"), outside)


@pytest.mark.skipif(
    not Path(gpt2fast.__file__).with_name("assets").joinpath(BUNDLED).is_dir(),
    reason="the bundled model is not in this checkout",
)
def test_the_bundled_model_loads():
    model = GPT2.from_pretrained(BUNDLED)
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    files: dict[str, bytes] = {}
    requested: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requested.append(path)
        if "/secret" in path:
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if "/tiny" not in path:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/someone/tiny/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
                for index, (name, data) in enumerate(self.files.items())
            ]
            return self.reply(200, json.dumps(listing).encode())
        if path.startswith("/api/models/someone/tiny"):
            if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", self.commit):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "someone/tiny", "sha": self.commit, "siblings": siblings}
            return self.reply(200, json.dumps(info).encode())
        name = path.rsplit("/", 1)[1]
        headers = {"ETag": f'"{list(self.files).index(name):040x}"', "X-Repo-Commit": self.commit}
        return self.reply(200, self.files[name], headers, body)

    def reply(self, status, data, headers=None, body=True):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds "someone/tiny", and an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    random_model().save_pretrained(tmp_path / "source")
    Hub.files = {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    Hub.requested = []
    point_at(monkeypatch, server.server_address[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, port: int) -> None:
    from huggingface_hub import constants

    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_model_on_the_hub_is_downloaded_once_and_then_found_without_a_network(hub, monkeypatch):
    Hub.files["pytorch_model.bin"] = b"not wanted where safetensors is there"
    Hub.files["README.md"] = b"not wanted"
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())
    fetched = {path.rsplit("/", 1)[1] for path in Hub.requested if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}

    Hub.requested.clear()
    cached = GPT2.from_pretrained("someone/tiny", local_files_only=True)
    assert_same_parameters(cached, random_model())
    assert not Hub.requested

    point_at(monkeypatch, free_port())
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())


def test_pickled_weights_on_the_hub_load_where_there_is_nothing_better(hub, tmp_path):
    torch.save(random_model().state_dict(), tmp_path / "weights.bin")
    del Hub.files["model.safetensors"]
    Hub.files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    assert_same_parameters(GPT2.from_pretrained("someone/tiny"), random_model())


@pytest.mark.parametrize(
    ("name", "options", "reason", "way_out"),
    [
        ("someone/absent", {}, "there is no model 'someone/absent'", "check the spelling"),
        ("someone/secret", {}, "is gated", "hf auth login"),
        ("someone/tiny", {"revision": "v9"}, "no revision 'v9'", "leave the revision out"),
        ("someone/tiny", {"local_files_only": True}, "local_files_only", "download it once"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, name, options, reason, way_out):
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained(name, **options)
    assert name in str(caught.value)
    assert reason in str(caught.value)
    assert way_out in str(caught.value)


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_cannot_be_reached_fails_soon_and_names_the_way_out(hub, monkeypatch, silent):
    # No setting; a test does not wait for ten seconds.
    monkeypatch.setattr("gpt2fast.checkpoints.hub.CONNECT_SECONDS", 0.5)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if silent:
        listener.listen()  # accepts, and never answers
    else:
        listener.close()
    point_at(monkeypatch, port)
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        GPT2.from_pretrained("someone/tiny")
    assert time.monotonic() - start < 5 * CLOCK.slowness()
    listener.close()
    message = str(caught.value)
    assert "'someone/tiny'" in message and "cannot be reached" in message and BUNDLED in message
