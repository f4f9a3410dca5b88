"""Asking an OpenAI-compatible endpoint, against a server on loopback."""

import json
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest
from pydantic import ValidationError

from stages.contract.config import semantic
from stages.contract.errors import Interrupted, StageFailed, UserError
from stages.curation.client import Client
from stages.curation.endpoint import Endpoint
from stages.curation.ledger import Ledger
from stages.recipe.resolve import load_recipe
from stages.store.stage import StopRequest
from tests.conftest import ROOT
from tests.doubles.endpoint_server import EndpointServer

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server():
    with EndpointServer() as running:
        yield running


def endpoint(server, **fields):
    given = {"url": server.url, "model": "m", "wait_s": 0.02, "timeout_s": 30, "attempts": 3, "max_tokens": 50}
    return Endpoint.model_validate(given | fields)


def ask(server, folder, questions, stop=None, **fields):
    """Ask in a fresh client over the folder's ledger; the documents, in order."""
    with Ledger(folder / "replies.jsonl") as ledger:
        client = Client(endpoint(server, **fields), ledger, stop or StopRequest())
        keys = client.ask([client.body([{"role": "user", "content": q}]) for q in questions])
        return [ledger[key] for key in keys]


def contents(bodies):
    return sorted(body["messages"][0]["content"] for body in bodies)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        "silent",
        "dropped",
        "not json",
        "no choice",
        "cut",
        (500, {}, ""),
        (503, {}, "<html>"),
        (429, {"Retry-After": "0.05"}, ""),
    ],
)
def test_after_a_fault_the_answer_comes(server, tmp_path, fault, stream):
    server.faults = [fault]
    (answer,) = ask(server, tmp_path, ["one"], stream=stream, timeout_s=0.5 if fault == "silent" else 30)
    assert answer == {"text": "echo one", "finish": "stop", "model": "m-2026", "tokens": 15}
    assert len(server.bodies) == 2
    assert ask(server, tmp_path, ["one"], stream=not stream) == [answer]
    assert len(server.bodies) == 2, "what is in the ledger was asked again"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_sent(server, tmp_path, stream):
    ask(server, tmp_path, ["one"], stream=stream, temperature=0.25, body={"seed": 3})
    (body,) = server.bodies
    wanted = {"model": "m", "messages": [{"role": "user", "content": "one"}], "temperature": 0.25, "max_tokens": 50, "seed": 3}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert body == (wanted | streamed if stream else wanted)
    assert server.keys == [None]


def test_waiting_doubles_and_a_server_that_names_a_time_is_heard_by_all(server, tmp_path):
    server.faults = [(500, {}, "")] * 3
    ask(server, tmp_path, ["one"], wait_s=0.1, attempts=4)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    # At least half of the wait; how much more, a busy machine decides.
    for gap, wait in zip(gaps, [0.1, 0.2, 0.4], strict=True):
        assert gap >= wait / 2
    server.times.clear()
    server.faults = [(429, {"Retry-After": "0.6"}, "")]
    ask(server, tmp_path, [f"{n}" for n in range(6)], concurrency=1)
    assert server.times[1] - server.times[0] >= 0.6
    server.times.clear()
    server.faults = [(429, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}, "")]
    ask(server, tmp_path, ["dated"])
    assert server.times[1] - server.times[0] >= 0.9  # dates have whole seconds


def test_a_wait_of_an_hour_ends_the_stage(server, tmp_path):
    server.faults = [(429, {"Retry-After": "3600"}, "slow down")]
    with pytest.raises(StageFailed, match="asks to wait 3600 s"):
        ask(server, tmp_path, ["one"])
    assert len(server.bodies) == 1


def test_a_server_that_stays_away_ends_the_stage_and_only_what_is_missing_is_asked_then(server, tmp_path):
    questions = [f"question {n}" for n in range(6)]
    ask(server, tmp_path, questions[:4])
    server.bodies.clear()
    server.faults = [(503, {}, "overloaded")] * 3
    with pytest.raises(StageFailed, match=r"no answer in 3 attempts \(503: overloaded\); the 4 answers that came are kept"):
        ask(server, tmp_path, questions, concurrency=1)
    assert len(server.bodies) == 3
    server.bodies.clear()
    answers = ask(server, tmp_path, questions)
    assert [a["text"] for a in answers] == [f"echo {q}" for q in questions]
    assert contents(server.bodies) == questions[4:]


def test_nobody_listens(tmp_path):
    with EndpointServer() as gone:
        pass
    with pytest.raises(StageFailed, match=r"no answer in 3 attempts \(.*connect"):
        ask(gone, tmp_path, ["one"])


def test_the_same_question_twice_is_asked_once(server, tmp_path):
    first, second = ask(server, tmp_path, ["one", "one"])
    assert first == second
    assert len(server.bodies) == 1


def test_no_more_requests_at_once_than_allowed(server, tmp_path):
    server.delay_s = 0.1
    ask(server, tmp_path, [f"{n}" for n in range(12)], concurrency=4)
    assert server.most_open == 4
    assert len(server.served) == 12


def test_one_refusal_is_an_answer_and_nothing_but_refusals_is_a_mistake(server, tmp_path):
    refusal = (400, {}, '{"error": {"message": "too long"}}')
    server.faults = [None, refusal]
    answers = ask(server, tmp_path, ["fine", "too long", "good"], concurrency=1)
    assert [a.get("refused") for a in answers] == [None, '400: {"error": {"message": "too long"}}', None]
    ask(server, tmp_path, ["too long"])
    assert len(server.bodies) == 3
    server.bodies.clear()
    server.faults = [refusal] * 50
    with pytest.raises(UserError, match="refused every request so far"):
        ask(server, tmp_path / "other", [f"{n}" for n in range(50)], concurrency=1)
    assert len(server.bodies) == 5
    with pytest.raises(UserError, match="refused every request so far"):
        ask(server, tmp_path / "third", ["alone"])
    server.faults = []
    assert "text" in ask(server, tmp_path / "third", ["alone"])[0], "a refusal that may be the settings' fault was kept"


def test_the_budget_of_requests_holds_over_attempts(server, tmp_path):
    questions = [f"{n}" for n in range(5)]
    for _ in range(2):
        with pytest.raises(UserError, match=r"budget is spent \(3 answers, 39 tokens\), 2 answers of this chunk are missing"):
            ask(server, tmp_path, questions, most_requests=3)
        assert len(server.bodies) == 3
    answers = ask(server, tmp_path, questions, most_requests=5)
    assert len(server.bodies) == 5
    assert [a["text"] for a in answers] == [f"echo {q}" for q in questions]


@pytest.mark.parametrize("budget", [50, 51, 52, 63, 64, 65, 100, 130, 1000])
def test_the_budget_of_tokens_is_never_exceeded(server, tmp_path, budget):
    """Each answer costs 13 tokens; before it is asked, one byte and 50 tokens (plus the role, of 4) must be left."""
    wanted, spent = 0, 0
    while wanted < 10 and spent + 4 + 1 + 50 <= budget:
        wanted, spent = wanted + 1, spent + 13
    if wanted == 10:
        ask(server, tmp_path, [f"{n}" for n in range(10)], most_tokens=budget)
    else:
        with pytest.raises(UserError, match="budget is spent"):
            ask(server, tmp_path, [f"{n}" for n in range(10)], most_tokens=budget)
    assert len(server.served) == wanted
    assert 13 * wanted <= budget


def test_a_server_that_tells_no_usage_is_charged_the_most_it_can_have_cost(server, tmp_path):
    server.usage = False
    assert ask(server, tmp_path, ["one"])[0]["tokens"] == len("user") + len("one") + 50


def test_a_stop_is_heard_at_once(server, tmp_path):
    server.delay_s, stop = 30.0, StopRequest()
    threading.Timer(0.3, lambda: setattr(stop, "requested", True)).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        ask(server, tmp_path, ["one", "two"], stop, timeout_s=60)
    assert time.monotonic() - begun < 5


ASKER = """
import sys
from pathlib import Path
from stages.curation.client import Client
from stages.curation.endpoint import Endpoint
from stages.curation.ledger import Ledger
from stages.store.stage import StopRequest
url, folder = sys.argv[1:]
ledger = Ledger(Path(folder) / "replies.jsonl")
client = Client(Endpoint(url=url, model="m", max_tokens=50, concurrency=2), ledger, StopRequest())
client.ask([client.body([{"role": "user", "content": f"{n:02}"}]) for n in range(40)])
"""


def test_after_a_kill_only_what_is_missing_is_asked(server, tmp_path):
    server.delay_s = 0.05
    process = subprocess.Popen([sys.executable, "-c", ASKER, server.url, str(tmp_path)], cwd=ROOT)
    until = time.monotonic() + 120
    while len(server.served) < 9:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = (tmp_path / "replies.jsonl").read_bytes()
    kept = [json.loads(line)["document"]["text"] for line in lines.splitlines(keepends=True) if line.endswith(b"\n")]
    assert 6 <= len(kept) < 40
    server.bodies.clear()
    questions = [f"{n:02}" for n in range(40)]
    answers = ask(server, tmp_path, questions)
    assert contents(server.bodies) == sorted(set(questions) - {text.removeprefix("echo ") for text in kept})
    assert [a["text"] for a in answers] == [f"echo {q}" for q in questions]


def test_the_key_is_sent_and_written_nowhere(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    server.answer = lambda body: f"your key is {KEY}"  # a server that says too much
    assert ask(server, tmp_path, ["one"], key_variable="MY_KEY")[0]["text"] == "your key is [key]"
    assert ask(server, tmp_path, ["two"], key_variable="MY_KEY", stream=True)[0]["text"] == "your key is [key]"
    assert server.keys == [f"Bearer {KEY}"] * 2
    server.faults = [(401, {}, f"Incorrect API key provided: {KEY}")]
    with pytest.raises(UserError, match="key_variable: the endpoint answered 401") as caught:
        ask(server, tmp_path, ["three"], key_variable="MY_KEY")
    server.faults = [(500, {}, KEY)] * 3
    with pytest.raises(StageFailed) as failed:
        ask(server, tmp_path, ["four"], key_variable="MY_KEY")
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for said in (str(caught.value), str(failed.value), written, *capfd.readouterr()):
        assert KEY not in said
    monkeypatch.setenv("MY_KEY", " ")
    with pytest.raises(UserError, match="`MY_KEY` is not set"):
        ask(server, tmp_path, ["five"], key_variable="MY_KEY")


@pytest.mark.parametrize("status", [301, 402, 404])
def test_an_address_that_is_wrong_is_told_once(server, tmp_path, status):
    server.faults = [(status, {"Location": server.url}, "no such model")]
    with pytest.raises(UserError, match=rf"url: the endpoint answered {status}: no such model"):
        ask(server, tmp_path, ["one"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_texts_that_are_hard_to_carry(server, tmp_path, stream):
    text = 'a\u2028b\x85c\n\n"d" \\ 是 🎲 data: [DONE]'
    server.answer = lambda body: text
    assert ask(server, tmp_path, ["one"], stream=stream)[0]["text"] == text


def test_half_a_character_becomes_one_that_can_be_written(server, tmp_path):
    server.faults = [(200, {}, '{"choices": [{"message": {"content": "a\\ud83d b\\ud83c\\udfb2"}, "finish_reason": "stop"}]}')]
    assert ask(server, tmp_path, ["one"])[0]["text"] == "a\ufffd b🎲"


@pytest.mark.parametrize(
    "fields",
    [
        {"key_variable": KEY},
        {"url": f"http://me:{KEY}@host/v1"},
        {"url": f"http://host/v1?key={KEY}"},
        {"url": f"{KEY}"},
        {"body": {"model": KEY}},
    ],
)
def test_a_secret_in_the_recipe_is_refused_and_not_shown(fields):
    section = json.dumps({"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"} | fields})
    with pytest.raises(UserError) as caught:
        load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.cold_start_data.rewrite={section}"])
    assert "rewrite.endpoint" in str(caught.value)
    assert KEY not in str(caught.value)
    with pytest.raises(ValidationError):
        Endpoint.model_validate({"url": "http://127.0.0.1:1/v1", "model": "m"} | fields)


def test_where_and_how_it_is_asked_is_no_part_of_the_fingerprint(server):
    one = endpoint(server)
    moved = endpoint(
        server, url="https://elsewhere/v1", key_variable="K", concurrency=1, stream=True, most_tokens=5, attempts=9
    )
    assert semantic(moved) == semantic(one)
    assert all(
        semantic(endpoint(server, **f)) != semantic(one) for f in ({"model": "n"}, {"temperature": 0}, {"body": {"seed": 1}})
    )


def test_a_torn_line_is_cut_off_and_a_damaged_one_told(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for n in range(3):
            ledger.add(f"k{n}", {"n": n, "text": "ü"})
        ledger.add("k1", {"n": 100})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with Ledger(path) as ledger:
        assert ("k2" in ledger, len(ledger), ledger["k1"]["n"]) == (False, 2, 1)
        ledger.add("k2", {"n": 2, "text": "ü"})
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"n": 1', b'"n": 7'))
    with pytest.raises(UserError, match=r"ledger\.jsonl: line 2: the line is damaged"):
        Ledger(path)
