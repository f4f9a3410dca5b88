"""What a verifier's process writes is untrusted: a reply that is none costs one verdict, never the trainer."""

import time

import pytest

from stages.rewards.verifier_pool.pool import LONGEST_REPLY_BYTES, Limits, Worker

FUNCTIONS = "tests.rewards.reward_functions:"


@pytest.fixture
def worker_of():
    """Make workers that are ended with the test."""
    workers = []

    def make(name):
        workers.append(Worker(FUNCTIONS + name, Limits(cpu_s=10.0, wall_s=20.0), []))
        return workers[-1]

    yield make
    for worker in workers:
        worker.end()


def test_lines_that_are_no_reply_are_passed_over(worker_of):
    worker = worker_of("write_and_return")
    for line in ("5", "null", "{}", "[]", "[1, 2]", "[1, 2, 3, 4]", '["a", "b", "c"]', "no JSON", "\x00", "[" * 100_000):
        assert worker.ask([line]).value == "done", line[:20]


def test_a_reply_over_the_limit_is_none_at_once_and_the_next_request_is_served(worker_of):
    worker = worker_of("long_value")
    assert worker.ask([LONGEST_REPLY_BYTES // 2]).value == "x" * (LONGEST_REPLY_BYTES // 2)
    started = time.monotonic()
    assert worker.ask([100_000_000]).fault == f"a reply of more than {LONGEST_REPLY_BYTES} bytes"
    assert time.monotonic() - started < 10
    assert worker.ask([3]).value == "xxx"


def test_a_function_that_forks_leaves_one_process_that_reads_requests(worker_of):
    worker = worker_of("fork_and_return")
    started = time.monotonic()
    assert [worker.ask([n]).value for n in range(20)] == list(range(20))
    assert time.monotonic() - started < 15
