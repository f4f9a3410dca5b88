"""An address of the wrong server: the user's mistake in one line, where an outage is waited for."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.servers.prefect_client import demand_access
from stages.contract.errors import UserError
from stages.tracking.mlflow.client import AWAY, Connection

PAGE = b"<!doctype html><title>some page</title>"


@contextlib.contextmanager
def server(status: int, body: bytes = PAGE, kind: str = "text/html") -> Iterator[str]:
    """A server that gives this answer to everything; its address holds a password."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - the names of the methods in the base class

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://me:geheim@127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize("status", [200, 404, 403], ids=["a page", "not found", "forbidden"])
def test_address_of_no_prefect_server_is_a_mistake(status: int) -> None:
    with (
        server(status) as address,
        temporary_settings(updates={PREFECT_API_URL: f"{address}/"}),
        pytest.raises(UserError, match="is no Prefect server") as caught,
    ):
        demand_access()
    assert caught.value.where == "PREFECT_API_URL"
    assert "/api" in caught.value.mend
    assert "geheim" not in str(caught.value)


def test_prefect_server_that_is_away_or_well_is_no_mistake() -> None:
    for status, body in ((503, PAGE), (200, b'"0.8.4"')):
        with (
            server(status, body, "application/json") as address,
            temporary_settings(updates={PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}),
        ):
            demand_access()


@pytest.mark.parametrize("status", [200, 404, 403, 405, 501])
def test_address_of_no_mlflow_server_is_a_mistake(status: int) -> None:
    with server(status) as address, pytest.raises(UserError, match="is no MLflow server") as caught:
        Connection(address, "t").client()
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_mlflow_server_that_is_away_is_no_mistake(status: int) -> None:
    with server(status) as address, pytest.raises(AWAY):
        Connection(address, "t").client()


def test_page_in_the_middle_of_a_run_is_an_outage() -> None:
    """A proxy's page while the server behind it restarts: only the first answer decides."""
    with server(404) as address:
        connection = Connection(address, "t")
        connection.experiment_id = "1"
        with pytest.raises(AWAY):
            connection.knock()
