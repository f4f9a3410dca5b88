"""The client against a server that somebody else wrote: `transformers serve` with a tiny model (it needs `openai`)."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from stages.curation.client import Client
from stages.curation.endpoint import Endpoint
from stages.curation.ledger import Ledger
from stages.store.stage import StopRequest
from tests.requirements import require

pytestmark = pytest.mark.slow

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@contextmanager
def serving(model: Path, log: Path):
    """The port on loopback where a model is served."""
    require("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tiny model's folder, and where it is served."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("serve")
    model = folder / "model"
    shutil.copytree(model_folder, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    with serving(model, folder / "log.txt") as port:
        yield str(model), f"http://127.0.0.1:{port}/v1"


@pytest.mark.parametrize("stream", [False, True])
def test_transformers_serve_answers(served, tmp_path, stream):
    model, url = served
    endpoint = Endpoint(url=url, model=model, max_tokens=8, temperature=1.0, stream=stream, timeout_s=120, concurrency=2)
    with Ledger(tmp_path / "replies.jsonl") as ledger:
        client = Client(endpoint, ledger, StopRequest())
        keys = client.ask([client.body([{"role": "user", "content": text}]) for text in ("abc", "hello", "zoo")])
        answers = [ledger[key] for key in keys]
    for answer in answers:
        assert answer["finish"] in ("stop", "length")
        # A random model writes letters at random; seldom it ends at once.
        assert set(answer["text"].replace(" ", "")) <= set("abcdefghijklmnopqrstuvwxyz0123")
        assert 0 < answer["tokens"] <= 3 * 8 + 5
    assert any(answer["text"] for answer in answers)
