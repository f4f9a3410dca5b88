import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from pydantic import ValidationError

from stages.contract.errors import UserError
from stages.curation.filters import Filters, first_failure, most_repeats
from stages.problems.episode import Episode, Problem
from stages.rewards.answers.judges import verdicts
from stages.rewards.answers.numbers import last_number, parse_number
from stages.rewards.format import well_formed
from stages.rewards.language import language_share, readable
from stages.rewards.score import Rewards, same_answer, score
from stages.rewards.tags import final_answer, thinking
from stages.rewards.verifier_pool.pool import Limits, Worker
from tests.conftest import ROOT

# text, final answer, well formed, well formed when thinking may be empty
ANSWERS = [
    ("<think>a</think><answer>5</answer>", "5", True, True),
    ("  <think>a</think>\n\n<answer> 5 </answer>\n", "5", True, True),
    # hacks of the field: skipped thinking
    ("<think></think><answer>5</answer>", "5", False, True),
    ("<think> \n </think><answer>5</answer>", "5", False, True),
    ("<answer>5</answer>", "5", False, False),
    ("5", None, False, False),
    # several answers
    ("<think>a</think><answer>4</answer><answer>5</answer>", None, False, False),
    ("<think>a</think><answer>4<answer>5</answer>", None, False, False),
    ("<think>a</think><answer>5</answer></answer>", None, False, False),
    ("</answer><think>a</think><answer>5</answer>", None, False, False),
    # the answer inside the thinking, before it, or around it
    ("<think>a<answer>5</answer></think>", None, False, False),
    ("<answer>5</answer><think>a</think>", None, False, False),
    ("<think>a<answer>5</think></answer>", None, False, False),
    ("<think>a</think><answer><think>5</answer>", None, False, False),
    # a second think block
    ("<think>a</think><think>b</think><answer>5</answer>", "5", False, False),
    ("<think><think>a</think><answer>5</answer>", "5", False, False),
    ("<think>a</think><answer>5</answer><think>b</think>", None, False, False),
    # thinking never closed, never opened
    ("<think>a<answer>5</answer>", None, False, False),
    ("a</think><answer>5</answer>", "5", False, False),
    ("</think>a<think><answer>5</answer>", None, False, False),
    # the question repeated, text before, between and after
    ("<think>a</think><answer>5</answer>\nUser: 2+2=?", "5", False, False),
    ("Sure! <think>a</think><answer>5</answer>", "5", False, False),
    ("<think>a</think> so <answer>5</answer>", "5", False, False),
    # nothing in the answer; tags not quite
    ("<think>a</think><answer> </answer>", None, False, False),
    ("<think>a</think><answer>5", None, False, False),
    ("<Think>a</Think><Answer>5</Answer>", None, False, False),
]


def test_a_long_answer_is_wrong_unless_the_reference_cannot_be_read():
    long = "1" * 1001
    pairs = [("5", long), (r"\frac{1}{2}", long), ("", long), ("", "5"), ("", ""), (long, long)]
    assert verdicts(pairs, "math") == ["wrong", "wrong", "none", "none", "none", "right"]


@pytest.mark.parametrize(("text", "answer", "strict", "lenient"), ANSWERS)
def test_tags(text, answer, strict, lenient):
    assert final_answer(text) == answer
    assert well_formed(text) is strict
    assert well_formed(text, require_thinking=False) is lenient


def test_thinking_is_what_stands_in_the_one_pair():
    assert thinking("<think> a b </think><answer>5</answer>") == " a b "
    assert thinking("<think>a</think><think>b</think>") is None
    assert thinking("</think>a<think>") is None
    assert thinking("<think>a") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("$18", 18), ("-$5", -5), ("−3", -3), ("1,234.50", 1234.5), ("3/4", 0.75), ("1 1/2", 1.5),
        (r"\frac{3}{4}", 0.75), (".5", 0.5), ("18.", 18), ("50%", 50), (r"50\%", 50), ("1e3", 1000), ("**18**", 18),
        (r"\boxed{7}", 7), ("18 eggs per day.", 18), ("$18/hour", 18), ("5 m", 5), ("18.0", 18),
        ("1,2", None), ("1,23", None), ("5 or 6", None), ("5 6", None), ("5; 6", None), ("4 or five", None),
        ("18 thousand", None), ("1 and a half", None), ("2 x", None), ("2xy", None), ("2**3", None), ("5!", None),
        ("1/0", None), ("٥", None), ("", None), ("five", None), ("9" * 101, None), ("1e999", None), ("5 = 5", None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think> 15 - 6 = 9 </think>\n<answer> 9 </answer>", 9),
        ("12-5", 5),  # a minus after a digit or a bracket subtracts
        ("(5)-6", 6),
        ("x=-4", -4),
        ("the answer is −6", -6),
        ("-$5", -5),
        ("$1,200.", 1200),
        ("1,2", 2),  # no comma that parts thousands: two numbers
        ("it is 1 1/2 hours", 1.5),
        ("3/4 of it", 0.75),
        ("so 50 / 5", 5),  # two numbers: nobody has said what they make
        (r"\frac{3}{4}", 0.75),
        ("about .5", 0.5),
        ("1.5e3", 1500),
        ("10/0", None),
        ("none at all", None),
    ],
)
def test_the_last_number_anywhere(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("5", "5", "right"), ("5", "5.0", "right"), ("1200", "$1,200", "right"), ("5", "5 apples", "right"),
        ("5", "6", "wrong"), ("5", "5 or 6", "wrong"), ("5", "5, 6", "wrong"), ("5", "2 3", "wrong"),
        ("5", r"\boxed{5} \boxed{6}", "wrong"), ("5", "5x", "wrong"), ("5", "x=5", "right"), ("5", "10/2", "right"),
        ("5", "1 2 3 4 5 6 7", "wrong"), ("5", "$5$ or $6$", "wrong"), ("5", "5\n6", "wrong"), ("15", "5 10", "wrong"),
        (r"\frac{1}{2}", "0.5", "right"), (r"\frac{1}{2}", r"\dfrac12", "right"), ("x+1", "1 + x", "right"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", "right"), (r"3\sqrt{13}", r"\sqrt{117}", "right"),
        (r"3\sqrt{13}", r"3\sqrt{12}", "wrong"), (r"\text{Evelyn}", r"\text{Carla}", "wrong"),
        (r"\frac{1}{2}", "1/" + " " * 1000 + "2", "wrong"),
        ("", "5", "none"),
    ],
)  # fmt: skip
def test_math(reference, answer, verdict):
    assert verdicts([(reference, answer)], "math") == [verdict]


def test_numeric_and_exact():
    numeric = [("5", "5.0"), ("5", "five"), ("1/3", "2/6"), ("0.33", "1/3"), ("n/a", "5")]
    assert verdicts(numeric, "numeric") == ["right", "wrong", "right", "wrong", "none"]
    exact = [("5", " 5\n"), ("5", "5.0"), ("a b", "a  b")]
    assert verdicts(exact, "exact") == ["right", "wrong", "right"]


SPIN = "tests.rewards.reward_functions:spin"


def test_a_hanging_answer_has_no_verdict_and_the_next_one_is_still_judged():
    tower = r"10^{10^{10^{10}}}"
    pairs = [(r"\pi", tower), ("x+1", "1+x"), ("x+1", tower), ("x+1", "1+x"), ("x+1", "x+2")]
    found: list[list[str]] = []
    # Off the main thread, where SIGALRM, math-verify's own guard, does not work.
    thread = threading.Thread(target=lambda: found.append(verdicts(pairs, "math")))
    thread.start()
    thread.join(60)
    assert found == [["none", "right", "none", "right", "wrong"]]


@pytest.fixture
def worker():
    found = Worker(SPIN, Limits(cpu_s=0.6, wall_s=60.0))
    yield found
    found.end()


def test_a_process_that_computes_is_ended_by_the_kernel_at_its_processor_time(worker):
    assert worker.ask([0]).value == "done"
    first, parent = worker.copy, worker._process.pid
    assert worker.ask([0.35]).value == "done"
    assert worker.ask([0.35]).value == "done"  # each request has its own limit
    assert worker.ask([1e9]).fault == "ended"
    times = psutil.Process(parent).cpu_times()
    assert 0.5 < times.children_user + times.children_system < 2.5  # of which 0.7 by request; the kernel counts in ticks
    assert worker.ask([0]).value == "done"  # a new copy of the same first process
    assert worker.copy != first
    assert worker._process.pid == parent


def test_a_process_that_waits_is_ended_by_the_clock(worker):
    worker.limits = Limits(cpu_s=60.0, wall_s=0.5)
    started = time.monotonic()
    assert worker.ask([-1]).fault == "ended"
    assert 0.4 < time.monotonic() - started < 30


def test_a_process_that_waits_ends_itself_though_nobody_kills_it():
    command = [sys.executable, "-m", "stages.rewards.verifier_pool.worker", SPIN, "60", "0.2", "0"]
    done = subprocess.run(
        command, input="[1, [-1]]\n", stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False, process_group=0
    )
    assert [line.split()[0] for line in done.stdout.splitlines() if line] == ["ready", "ended", "ready"]
    assert done.returncode == 0  # the input has ended


def test_a_process_that_is_stopped_is_killed(worker):
    worker.limits = Limits(cpu_s=60.0, wall_s=0.5)
    assert worker.ask([0]).value == "done"
    os.kill(worker.copy, signal.SIGSTOP)  # its own timers run, but nothing acts on them; it reads nothing either
    started = time.monotonic()
    assert worker.ask([0, "x" * 1_000_000]).fault == "ended"
    assert 1.4 < time.monotonic() - started < 30
    assert worker.ask([0]).value == "done"


def test_what_a_verifier_raises_costs_no_process_and_a_crash_only_one(worker):
    assert worker.ask(["no number"]).fault.startswith("TypeError")
    copy = worker.copy
    assert worker.ask([0]).value == "done"
    assert worker.copy == copy
    assert worker.ask([-2]).fault == "ended"  # os._exit
    assert worker.ask([0]).value == "done"
    os.killpg(worker._process.pid, signal.SIGKILL)
    assert worker.ask([0]).fault == "ended"
    assert worker.ask([0]).value == "done"


def test_nothing_is_left_of_an_ended_worker(worker):
    assert worker.ask([0]).value == "done"
    copy = worker.copy
    worker.end()
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):  # it is reaped by the process that adopted it
            os.kill(copy, 0)
            time.sleep(0.01)


def test_a_function_that_is_not_there_is_the_users_mistake():
    for name in ("no_such_module:f", "math:no_such", "math:pi"):
        worker = Worker(name, Limits(1.0, 1.0))
        with pytest.raises(UserError, match="cannot be loaded"):
            worker.ask([])
        worker.end()


@pytest.mark.parametrize(
    ("thought", "language", "share"),
    [
        ("so we add them", "english", 1.0), ("so 我们 add", "english", 0.5), ("4*3=12", "english", None),
        ("so 4*3=12", "english", 1.0), ("так мы add", "english", 1 / 3), ("don't", "english", 1.0),
        ("thus π is big", "english", 1.0), ("naïve idea", "english", 0.5), ("", "english", None),
        ("答案是12", "english", 0.0), ("4*3=5", "digits", 1.0), ("e*d=f", "digits", 0.0),
        ("4*3=5,f+c=a", "digits", 0.5), ("+,=", "digits", None),
    ],
)  # fmt: skip
def test_language_share(thought, language, share):
    assert language_share(thought, language) == (share if share is None else pytest.approx(share))


def test_readable():
    assert readable("4*3=5", "digits", 1.0) and readable("4*3=12", "english", 1.0)
    assert not readable("4*3=5,f+c=a", "digits", 0.51)


def episode(text: str, answer: str = "5", finish: str = "stop") -> Episode:
    return Episode(Problem("p:1", "q", answer, "p"), 0, "q", [1], [2, 3], [0.0, 0.0], text, finish)


def test_score_weighs_its_parts():
    rewards = Rewards(accuracy=1.0, format=0.1, language=0.5, verifier="exact", language_target="digits")
    episodes = [
        episode("<think>4*3=5,f+c=a</think><answer>5</answer>"),
        episode("<think>1+1=2</think><answer>6</answer>"),
        episode("<answer>5</answer>"),
        episode("<think>1+1=2</think><answer>5</answer>", finish="length"),
    ]
    score(rewards, episodes, max_tokens=64, key="")
    assert [e.scored.total for e in episodes] == pytest.approx([1.0 + 0.1 + 0.25, 0.1 + 0.5, 1.0, 0.0])
    assert episodes[0].scored.parts == {"accuracy": 1.0, "format": 1.0, "language": 0.5}
    assert "language" not in episodes[2].scored.parts  # nothing to measure is not the same as 0
    assert [e.scored.verdict for e in episodes] == ["right", "wrong", "right", "wrong"]


def test_no_verdict_is_kept_apart_from_wrong():
    episodes = [episode("<think>a</think><answer>5</answer>", answer="no number")]
    score(Rewards(verifier="numeric"), episodes, max_tokens=64, key="")
    assert (episodes[0].scored.verdict, episodes[0].scored.parts["accuracy"]) == ("none", 0.0)


def test_overlong_answers_lose_softly():
    rewards = Rewards(verifier="exact", overlong=2.0, overlong_buffer=4)
    # Limit 10, buffer 4: up to 6 tokens nothing, 8 tokens half of it, at 10 all.
    for length, part in ((3, 0.0), (6, 0.0), (8, -0.5), (10, -1.0)):
        answer = episode("<think>x</think> <answer>5</answer>")
        answer.completion_ids = [1] * length
        score(rewards, [answer], max_tokens=10, key="")
        assert answer.scored.parts["overlong"] == part
        assert answer.scored.total == 2.0 + 2.0 * part


def test_the_control_arms_coin_knows_nothing_of_the_answer():
    rewards = Rewards(verifier="exact", accuracy=0.0, format=0.0, random=1.0)
    right, wrong = ("<think>x</think> <answer>5</answer>", "no")

    def many(text: str) -> list[Episode]:
        found = [episode(text) for _ in range(400)]
        for number, answer in enumerate(found):
            answer.sample = number
        return found

    tossed = {}
    for text in (right, wrong):
        episodes = many(text)
        score(rewards, episodes, max_tokens=64, key="0-train-3")
        tossed[text] = [e.scored.total for e in episodes]
    assert tossed[right] == tossed[wrong]
    assert set(tossed[right]) == {0.0, 1.0}
    assert 160 < sum(tossed[right]) < 240  # four standard deviations
    again = many(right)
    score(rewards, again, max_tokens=64, key="0-train-4")
    assert [e.scored.total for e in again] != tossed[right]
    assert all(e.scored.parts["accuracy"] == 1.0 for e in again)  # measured all the same


def test_rewards_need_a_weight():
    with pytest.raises(ValidationError, match="nothing is rewarded"):
        Rewards(accuracy=0, format=0)
    with pytest.raises(ValidationError):
        Rewards(accuracy=-1)


def test_same_answer():
    rewards = Rewards(verifier="numeric")
    assert same_answer("5", "5.0", rewards) and not same_answer("5", "6", rewards)
    assert same_answer("no idea", "no  idea", rewards) and not same_answer("no idea", "5", rewards)


def test_filters_name_the_first_that_fails():
    rewards = Rewards(verifier="exact", require_thinking=False, language_target="digits")
    good = "<think>1+1=2</think><answer>5</answer>"
    looping = ",".join(["1+1=2"] * 12)
    cases = [
        (good, "stop", None),
        (good, "length", "finished"),
        ("<think>1+1=2</think><answer>6</answer>", "stop", "correct"),
        (good + "!", "stop", "format"),
        ("<think></think><answer>5</answer>", "stop", "thinking"),
        ("<think>1+b=2</think><answer>5</answer>", "stop", "language"),
        (f"<think>{looping}</think><answer>5</answer>", "stop", "repetition"),
    ]
    episodes = [episode(text, finish=finish) for text, finish, _ in cases]
    score(rewards, episodes, max_tokens=64, key="")
    assert [first_failure(e, Filters(), rewards) for e in episodes] == [failure for _, _, failure in cases]
    assert most_repeats("a b a b", 2) == 2 and most_repeats("a", 2) == 0


def test_a_gym_answer_longer_than_any_right_one_is_refused_unread():
    from stages.rewards.gym_guard import refused

    assert not refused("word\n" * 20_000, "word_ladder")
    assert refused("word\n" * 20_001, "word_ladder")
