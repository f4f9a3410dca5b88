"""Workers that print, exit, fork, close their pipes or reply with anything: no verdict in time, and the next is judged."""

import time

import pytest

from stages.rewards.functions import function_parts, number_of
from stages.rewards.score import score
from stages.rewards.settings import Rewards
from stages.rewards.verifier_pool.pool import Limits, Pool, Reply, Worker, read_reply
from tests.untrusted.calls import episode
from tests.untrusted.hostile_functions import DEEDS

FUNCTION = "tests.untrusted.hostile_functions:reward"
WALL_S = 3.0
HARMLESS = {
    "kill the parent",
    "close the input",
    "read the input",
    "print",
    "print to stdout's descriptor",
    "fork",
    "fork and wait",
    "write a number",
    "write null",
    "write an object",
    "write brackets",
    "write a reply to another request",
    "write ready",
    "write bytes",
}
"""After these the function's own value comes through: 1.0."""
PATIENCE_S = 45.0
"""Seconds by the clock for a deed, the start of new processes on a busy machine included."""


@pytest.fixture(scope="module")
def pool():
    found = Pool(FUNCTION, Limits(2.0, WALL_S, 1 << 30), processes=1)
    assert found.ask([["warm"]])[0].value == 1.0
    yield found
    found.end()


@pytest.mark.parametrize("deed", DEEDS)
def test_worker_gives_a_number_or_none_whatever_a_function_does(deed, pool):
    begun = time.monotonic()
    reply = pool.ask([[deed]])[0]
    value, fault = number_of(reply)
    if deed in HARMLESS:
        assert (value, fault) == (1.0, "")
    else:
        assert value is None
        assert fault, "the fault is named"
    assert time.monotonic() - begun < PATIENCE_S
    assert [r.value for r in pool.ask([["next"], ["next"]])] == [1.0, 1.0], "the next requests are judged"


def test_score_gives_no_verdict_where_a_function_fails_and_a_verdict_beside_it():
    texts = ["surrogates", "exit", "huge integer", "fine"]
    rewards = Rewards(verifier="exact", functions={"own": {"function": FUNCTION}}, verify_wall_s=WALL_S, verify_processes=1)
    episodes = [episode(text) for text in texts]
    score(rewards, episodes, max_tokens=8, key="k")
    assert [e.scored.verdict for e in episodes] == ["none", "none", "none", "wrong"]
    assert episodes[3].scored.parts["own"] == 1.0
    assert function_parts(rewards, episodes) == [None, None, None, {"own": 1.0}]


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ('[3, 1.5, ""]', Reply(1.5, "")),
        ('[3, null, "ValueError"]', Reply(None, "ValueError")),
        ('[2, 1.5, ""]', None),
        ("[3, 1.5]", None),
        ("[3, 1.5, 0]", None),
        ("3", None),
        ("null", None),
        ('{"3": 1}', None),
        ('"abc"', None),
        ("", None),
        ("[" * 100_000, None),
        ("9" * 5000, None),
        ("\ud800", None),
    ],
)
def test_read_reply_takes_only_a_reply_to_that_request(line, reply):
    assert read_reply(line, 3) == reply


def test_worker_reads_no_more_than_the_longest_reply():
    worker = Worker(FUNCTION, Limits(5.0, 30.0, 0), ())
    try:
        begun = time.monotonic()
        reply = worker.ask(["100 MB"])
        assert reply == Reply(fault=f"a reply of more than {1 << 20} bytes")
        assert time.monotonic() - begun < 30.0
        assert worker.ask(["next"]).value == 1.0
    finally:
        worker.end()
