"""Slots: a stage takes as many of a Prefect global concurrency limit as it has processes, before its processes start, and
gives them back after.

Slots are held by a lease that is renewed in the background. Prefect's own `concurrency()` gives a lease up for good when the
server is away for half a minute, after which somebody else gets slots whose GPUs are still busy, and raises at its end when
the server is away then. Training goes on through an outage here, so a lease is renewed until it holds again, and slots that
were given away meanwhile are taken again as soon as they are free.
"""

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run

from flows.servers import prefect_client
from flows.servers.prefect_client import impatient_client, server_address
from stages.contract.errors import StageFailed, UserError

LEASE_SECONDS = 300.0
"""After so long without renewal the server gives the slots to others: this is what a killed run costs them."""
RENEW_SECONDS = 60.0
"""Pause between two renewals."""
RETRY_SECONDS = 5.0
"""Pause between two attempts to get slots, or to reach a server that is away."""
END_SECONDS = 2.0
"""How long the end of a stage waits until its slots are given back."""

Note = Callable[[str], None]


@contextlib.contextmanager
def hold_slots(limit: str | None, count: int, note: Note, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold `count` slots of the global concurrency limit `limit`; without one, nothing is taken.

    `note` is told of waits; `pause` sleeps that many seconds and may raise to end the wait. Raises UserError when there is no
    such limit or it is too small, StageFailed when the server stays away while they are to be taken.
    """
    if limit is None:
        yield
        return
    lease = _take(limit, count, note, pause)
    if lease is None:  # the limit is switched off
        yield
        return
    keeper = _Keeper(limit, count, lease, note)
    try:
        yield
    finally:
        keeper.end()


def _take(limit: str, count: int, note: Note, pause: Callable[[float], None]) -> UUID | None:
    told, away_since = False, None
    while True:
        try:
            with impatient_client() as client:
                if not _demand(client, limit, count):
                    return None
                if (lease := _ask(client, limit, count)) is not None:
                    return lease
            away_since = None
            if not told:
                note(f"waiting for {count} of the slots of `{limit}`")
                told = True
        except httpx.HTTPError as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > prefect_client.AWAY_SECONDS:
                what = f"no slots of `{limit}`: the Prefect server at {server_address()} does not answer"
                raise StageFailed(what) from error
        pause(RETRY_SECONDS)


def _demand(client: SyncPrefectClient, limit: str, count: int) -> bool:
    """Whether the limit is in force. Raises UserError when it isn't there or can never give so many."""
    try:
        known = client.read_global_concurrency_limit_by_name(limit)
    except ObjectNotFound as error:
        mend = f"make it: `prefect gcl create {limit} --limit 8`, or `r1 deploy --slots {limit}=8` (as many as there are GPUs)"
        raise UserError(f"the Prefect server has no limit `{limit}`", where="compute.slots", mend=mend) from error
    if known.active and known.limit < count:
        what = f"the stage needs {count} slots of `{limit}`, which has {known.limit}"
        raise UserError(what, where="compute.processes", mend=f"`r1 deploy --slots {limit}={count}`, or fewer processes")
    return known.active


def _ask(client: SyncPrefectClient, limit: str, count: int) -> UUID | None:
    """One attempt; None when not enough slots are free."""
    holder = ConcurrencyLeaseHolder(type="task_run", id=UUID(str(task_run.id))) if task_run.id else None
    try:
        answer = client.increment_concurrency_slots_with_lease([limit], count, "concurrency", LEASE_SECONDS, holder)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == HTTPStatus.LOCKED:
            return None
        raise
    return ConcurrencyLimitWithLeaseResponse.model_validate(answer.json()).lease_id


class _Keeper:
    """Renews a lease until it is ended, and then gives it back."""

    def __init__(self, limit: str, count: int, lease: UUID, note: Note) -> None:
        self._limit, self._count, self._note = limit, count, note
        self._lease: UUID | None = lease
        self._ended = threading.Event()
        context = contextvars.copy_context()  # Prefect's settings live there
        self._thread = threading.Thread(target=context.run, args=(self._keep,), daemon=True, name="slots")
        self._thread.start()

    def end(self) -> None:
        """Give the slots back: at once, or in the background as soon as the server answers."""
        self._ended.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            minutes = f"{LEASE_SECONDS / 60:.0f} minutes"
            self._note(f"the slots of `{self._limit}` are given back when the Prefect server answers, or in {minutes}")

    def _keep(self) -> None:
        due = RENEW_SECONDS
        while not self._ended.wait(due):
            try:
                due = RENEW_SECONDS if self._renew() else RETRY_SECONDS
            except httpx.HTTPError:  # away; it is asked again
                due = RETRY_SECONDS
        until = time.monotonic() + LEASE_SECONDS
        while self._lease is not None and time.monotonic() < until:
            try:
                with impatient_client() as client:
                    client.release_concurrency_slots_with_lease(self._lease)
                self._lease = None
            except httpx.HTTPError:
                time.sleep(RETRY_SECONDS)

    def _renew(self) -> bool:
        """Whether the slots are ours after this attempt."""
        with impatient_client() as client:
            if self._lease is not None:
                try:
                    client.renew_concurrency_lease(self._lease, LEASE_SECONDS)
                    return True
                except httpx.HTTPStatusError as error:
                    if error.response.status_code not in (HTTPStatus.GONE, HTTPStatus.NOT_FOUND):
                        raise
                self._lease = None
                self._note(f"the Prefect server has given the slots of `{self._limit}` away; the stage goes on and asks again")
            self._lease = _ask(client, self._limit, self._count)
            if self._lease is not None:
                self._note(f"the slots of `{self._limit}` are held again")
            return self._lease is not None
