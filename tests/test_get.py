"""Downloads against a server on localhost that serves a tiny checkpoint, cuts connections, redirects and lies."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import BASE, tiny_weights, write_checkpoint, write_tokenizer

from minisap.checkpoint import load_model
from weights import get
from weights.gguf import F32, Q4_1, Q8_0, dequantise, unpermute

NAME, REPOSITORY = "tinyllama-1.1b-chat", get.HUB["tinyllama-1.1b-chat"][0]


class Hub(ThreadingHTTPServer):
    """files: {repository: {name: bytes}}; what goes wrong is set by the attributes."""

    daemon_threads = True
    cut_after = None  # bytes sent before the connection breaks, while cuts > 0
    cuts = 0
    resumes = True
    redirect_to = None  # another server that has the files
    token = None  # required
    stalls = 0  # so many times it sends cut_after bytes and then nothing
    lie = None  # replaces the content of files that it has a name for

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = files, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server
        hub.requests.append(
            (self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.send_error(401, "Unauthorized")
        repository = "/".join(self.path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
        files = hub.files.get(repository)
        if files is None:
            return self.send_error(404, "Not Found")
        if self.path.startswith("/api/models/"):
            return self.reply(
                200, json.dumps([entry(name, data) for name, data in files.items()]).encode()
            )
        if hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", hub.redirect_to + self.path)
            return self.end_headers()
        name = self.path.split("/")[-1]
        data = (hub.lie or {}).get(name, files[name])
        if self.headers["Range"] == f"bytes={len(data)}-":
            return self.send_error(416, "Range Not Satisfiable")
        start = (
            int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if self.headers["Range"] and hub.resumes
            else 0
        )
        self.reply(206 if start else 200, data[start:])

    def reply(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.stalls and not self.path.startswith("/api"):
            self.server.stalls -= 1
            self.wfile.write(data[: self.server.cut_after])
            time.sleep(1.0)
            return
        if (
            self.server.cuts
            and len(data) > (self.server.cut_after or 0)
            and not self.path.startswith("/api")
        ):
            self.server.cuts -= 1
            data = data[: self.server.cut_after]
        self.wfile.write(data)


def entry(name, data):
    if name.endswith((".safetensors", ".bin")):
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": "0" * 40,
            "lfs": {"oid": hashlib.sha256(data).hexdigest()},
        }
    return {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    source = write_tokenizer(write_checkpoint(tmp_path / "source"), "zephyr")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub = Hub({REPOSITORY: files | {"README.md": b"not needed", "../evil.json": b"{}"}})
    yield hub
    hub.shutdown()


def fetch(hub, tmp_path, name=NAME):
    get.main([name, "--endpoint", hub.url, "--out_dir", str(tmp_path / "out")])
    return tmp_path / "out"


def test_a_checkpoint_arrives_whole_and_loads(hub, tmp_path):
    out = fetch(hub, tmp_path)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert torch.equal(
        load_model(out).lm_head.weight, load_model(tmp_path / "source").lm_head.weight
    )
    before = len(hub.requests)
    fetch(hub, tmp_path)  # again: only the list of files is asked for
    assert len(hub.requests) == before + 1


def test_a_cut_connection_is_resumed_where_it_broke(hub, tmp_path):
    hub.cuts, hub.cut_after = 3, 10_000
    out = fetch(hub, tmp_path)
    ranges = [r for path, r, _ in hub.requests if path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=10000-", "bytes=20000-", "bytes=30000-"]
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()


def test_a_server_that_falls_silent_is_left_and_asked_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(get, "TIMEOUT", 0.2)
    hub.stalls, hub.cut_after = 2, 100
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()
    assert hub.stalls == 0


def test_a_list_without_end_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(get, "MAX_LIST", 100)
    with pytest.raises(ValueError, match="not a list of files"):
        fetch(hub, tmp_path)


def test_a_server_that_cannot_resume_is_read_from_the_start(hub, tmp_path):
    hub.cuts, hub.cut_after, hub.resumes = 1, 10_000, False
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()


def test_after_too_many_cuts_the_next_call_goes_on(hub, tmp_path):
    hub.cuts, hub.cut_after = get.ATTEMPTS, 5_000
    with pytest.raises(
        ValueError, match=f"{get.ATTEMPTS} times; run the command again to go on from 25000 of"
    ):
        fetch(hub, tmp_path)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    fetch(hub, tmp_path)
    assert hub.requests[-3][1] == "bytes=25000-"


def test_a_download_that_was_stopped_before_it_got_its_name_is_taken_up(hub, tmp_path):
    (tmp_path / "out").mkdir()
    whole = hub.files[REPOSITORY]["model.safetensors"]
    (tmp_path / "out" / "model.safetensors.part").write_bytes(whole)
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == whole


def test_a_repository_without_weights_is_no_success(hub, tmp_path):
    del hub.files[REPOSITORY]["model.safetensors"]
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    "change", [{"size": "9"}, {"size": None}, {"path": 5}, {"lfs": "x"}, {"lfs": {}}, {"oid": None}]
)
def test_a_list_that_is_none_is_refused_and_nothing_written(change, hub, tmp_path, monkeypatch):
    monkeypatch.setitem(
        globals(),
        "entry",
        lambda name, data: {"type": "file", "path": name, "size": 1, "oid": "0"} | change,
    )
    with pytest.raises(ValueError, match="not a list of files"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_pytorch_file_that_is_none_is_named(hub, tmp_path):
    del hub.files[REPOSITORY]["model.safetensors"]
    hub.files[REPOSITORY]["pytorch_model.bin"] = b"junk"
    with pytest.raises(ValueError, match="pytorch_model.bin: not a file of tensors"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data + b"more",
        lambda data: b"<html>login</html>",
    ],
)
def test_a_file_that_is_not_the_announced_one_gets_no_name(lie, hub, tmp_path):
    hub.lie = {"model.safetensors": lie(hub.files[REPOSITORY]["model.safetensors"])}
    with pytest.raises(ValueError, match="not the announced file|run the command again"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_small_file_is_checked_too(hub, tmp_path):
    hub.lie = {"config.json": hub.files[REPOSITORY]["config.json"].replace(b"32", b"33")}
    with pytest.raises(ValueError, match="config.json: not the announced file"):
        fetch(hub, tmp_path)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    cdn = Hub(hub.files)
    hub.token, hub.redirect_to = "hf_secret", cdn.url
    fetch(hub, tmp_path)
    assert {auth for _, _, auth in hub.requests} == {"Bearer hf_secret"} and {
        auth for _, _, auth in cdn.requests
    } == {None}
    assert "hf_secret" not in "".join(capsys.readouterr())
    cdn.shutdown()
    monkeypatch.setenv("HF_TOKEN", "hf_\x07secret")
    with pytest.raises(ValueError, match="^HF_TOKEN holds characters that no token has$"):
        fetch(hub, tmp_path / "other")


def test_a_gated_model_without_a_token_says_what_to_do(hub, tmp_path):
    hub.token = "hf_secret"
    with pytest.raises(
        ValueError,
        match="401 Unauthorized; a gated model: accept its licence on its page and set HF_TOKEN",
    ):
        fetch(hub, tmp_path)


def test_pytorch_files_become_safetensors(hub, tmp_path):
    """Vicuna: .bin shards, no tokenizer.json, no template."""
    weights = tiny_weights(BASE)
    names, files = (
        sorted(weights),
        {"config.json": json.dumps(BASE).encode(), "tokenizer_config.json": b"{}"},
    )
    for i in range(2):
        torch.save({name: weights[name] for name in names[i::2]}, tmp_path / "part")
        files[f"pytorch_model-0000{i + 1}-of-00002.bin"] = (tmp_path / "part").read_bytes()
    hub.files[get.HUB["vicuna-7b"][0]] = files
    out = fetch(hub, tmp_path, "vicuna-7b")
    assert torch.equal(load_model(out).lm_head.weight, weights["lm_head.weight"])
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_format"] == "vicuna"
    assert not list(out.glob("*.bin"))
    before = len(hub.requests)
    fetch(hub, tmp_path, "vicuna-7b")
    assert len(hub.requests) == before + 2  # two lists, no file
    (out / "pytorch_model-00002-of-00002.bin").write_bytes(
        b"left by an interruption between two deletions"
    )
    fetch(hub, tmp_path, "vicuna-7b")
    assert torch.equal(load_model(out).lm_head.weight, weights["lm_head.weight"]) and not list(
        out.glob("*.bin")
    )


def test_the_table_names_at_least_what_the_readme_promises(capsys):
    get.main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    table = (Path(get.__file__).parent / "README.md").read_text()
    promised = [
        name
        for line in table.splitlines()
        if line.startswith("| ")
        for name in line.split("|")[1].strip().split(", ")
    ]
    assert sorted(listed) == sorted(promised[1:]) and len(listed) == 17


def test_dequantised_blocks_follow_the_formula():
    random = np.random.RandomState(0)
    d, m = np.float16(0.013), np.float16(-0.1)
    q = random.randint(0, 16, 32)
    block = d.tobytes() + m.tobytes() + (q[:16] | q[16:] << 4).astype(np.uint8).tobytes()
    np.testing.assert_allclose(
        dequantise(np.frombuffer(block, np.uint8), Q4_1)[0],
        np.float32(d) * q + np.float32(m),
        rtol=1e-6,
    )
    q = random.randint(-128, 128, 32).astype(np.int8)
    found = dequantise(np.frombuffer(d.tobytes() + q.tobytes(), np.uint8), Q8_0)[0]
    np.testing.assert_allclose(found, np.float32(d) * q, rtol=1e-6)
    x = random.standard_normal(4).astype(np.float32)
    np.testing.assert_array_equal(dequantise(np.frombuffer(x.tobytes(), np.uint8), F32), x)


def test_unpermute_turns_interleaved_pairs_into_split_halves():
    """Row 2i + s of a head in GGUF is row i + s·Dh/2 in Hugging Face's layout."""
    n_heads, Dh = 2, 6
    gguf = np.arange(n_heads * Dh)[:, None] * np.ones((1, 3))
    found = unpermute(gguf, n_heads)[:, 0]
    for head in range(n_heads):
        for i in range(Dh // 2):
            for s in range(2):
                assert found[head * Dh + i + s * Dh // 2] == head * Dh + 2 * i + s


def test_what_goes_wrong_is_one_line_and_status_2(hub, tmp_path):
    command = [
        sys.executable,
        "weights/get.py",
        NAME,
        "--endpoint",
        "http://127.0.0.1:1",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, cwd=Path(get.__file__).parents[1], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and done.stderr.startswith("error: http://127.0.0.1:1/")
    )
