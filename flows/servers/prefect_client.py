"""Prefect's server as a run needs it: at the begin, to record that it runs, and at its end, to record how it ended.

Between these two nothing waits for it: the states of tasks travel as events, which Prefect's client keeps and sends again when
it has a new connection. What the client asks itself is tried six times within about a minute (PREFECT_CLIENT_MAX_RETRIES), but
once that fails at a run's end, the engine reports a failure in its place. So we ask before it does.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from stages.contract.errors import UserError

AWAY_SECONDS = 300.0
"""How long a run waits for a server that is away, before its flow begins and when its stages are done."""
ATTEMPT_SECONDS = 5.0
"""How long one attempt waits for an answer."""
EVENTS_SECONDS = 30.0
"""How long the end of a run waits for events that are still to be sent."""


def server_address() -> str:
    """The server's address, empty when Prefect starts one by itself."""
    return PREFECT_API_URL.value() or ""


@contextlib.contextmanager
def impatient_client(seconds: float = ATTEMPT_SECONDS) -> Iterator[SyncPrefectClient]:
    """A client that asks once and waits so many seconds for the answer; Prefect's own tries six times within a minute."""
    with (
        temporary_settings(updates={PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": httpx.Timeout(seconds)}, sync_client=True) as client,
    ):
        yield client


def server_answers(seconds: float = ATTEMPT_SECONDS) -> bool:
    """Whether the server answers within so many seconds; one attempt. One that Prefect starts by itself counts as there."""
    if not server_address():
        return True
    with impatient_client(seconds) as client:
        error = client.api_healthcheck()
    return error is None or (isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500)


def demand_access() -> None:
    """Raise UserError when the server does not take our credentials, or is none of Prefect's. One that is away is no matter
    of this.
    """
    with get_client(httpx_settings={"timeout": httpx.Timeout(ATTEMPT_SECONDS)}, sync_client=True) as client:
        try:
            client.api_version()
        except PrefectHTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                what = f"the Prefect server at {server_address()} does not take these credentials"
                mend = "set it to the user:password that the server was started with"
                raise UserError(what, where="PREFECT_API_AUTH_STRING", mend=mend) from error
            if error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                raise _no_prefect(f"{error.response.status_code} for {error.request.url.path}") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise _no_prefect(str(error)) from error
        except httpx.HTTPError:
            return
        except ValueError as error:  # a page for people in the place of JSON
            raise _no_prefect("not a JSON answer") from error


def _no_prefect(why: str) -> UserError:
    what = f"what answers at {server_address()} is no Prefect server ({why})"
    return UserError(what, where="PREFECT_API_URL", mend="it ends in `/api`, for example http://127.0.0.1:4200/api")


def wait_for_server(seconds: float, note: Callable[[str], None]) -> bool:
    """Wait until the server answers, at most `seconds`; returns whether it does. `note` is told of a wait."""
    until, told = time.monotonic() + seconds, False
    while not server_answers():
        if time.monotonic() >= until:
            return False
        if not told:
            note(f"waiting for the Prefect server at {server_address()}, {seconds:.0f} s at most")
            told = True
        time.sleep(1.0)
    return True


def flush_events(run: str) -> None:
    """Have events that an outage held back sent now: the client sends them before the next one, and forgets them at its end."""
    emit_event("r1.run.ended", {"prefect.resource.id": f"r1.run.{run}"})
    EventsWorker.drain_all(timeout=EVENTS_SECONDS)
