"""What surrounds a process: proxies, the encoding of its streams."""

import io
import json
import sys
from typing import Any

import httpx
import pytest
import requests.utils
from hypothesis import given
from hypothesis import strategies as st

from flows.output import print_json
from stages.contract.errors import UserError
from stages.runtime import proxies
from stages.runtime.plain_text import HANDLER, plain, survive_any_encoding
from stages.runtime.proxies import check_proxies, keep_loopback_direct
from stages.runtime.streams import without_secrets

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    "before", [{}, {"NO_PROXY": "a.example, b.example"}, {"no_proxy": "a.example", "NO_PROXY": "b.example"}]
)
def test_loopback_is_excepted_from_every_proxy_for_every_library(
    monkeypatch: pytest.MonkeyPatch, name: str, before: dict[str, str]
) -> None:
    for variable in (*proxies.proxy_variables(), "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {name: PROXY, **before}.items():
        monkeypatch.setenv(variable, value)
    keep_loopback_direct()
    for host in ("127.0.0.1", "localhost", "[::1]"):
        url = httpx.URL(f"http://{host}:4200/api")
        with httpx.Client() as client:
            assert client._transport_for_url(url) is client._transport, host
        assert requests.utils.get_environ_proxies(str(url)) == {}, host
    excepted = {text for text in ("a.example", "b.example") if text in ",".join(before.values())}
    for host in excepted:
        assert requests.utils.get_environ_proxies(f"http://{host}") == {}
    if name.lower() in ("http_proxy", "all_proxy"):  # which stand for themselves elsewhere
        assert requests.utils.get_environ_proxies("http://c.example")
        with httpx.Client() as client:
            assert client._transport_for_url(httpx.URL("http://c.example")) is not client._transport


def test_without_a_proxy_the_environment_stays_as_it_is() -> None:
    variables = {"NO_PROXY": "a.example"}
    keep_loopback_direct(variables)
    assert variables == {"NO_PROXY": "a.example"}
    everything = {"ALL_PROXY": PROXY, "no_proxy": "*"}
    keep_loopback_direct(everything)
    assert everything["NO_PROXY"] == everything["no_proxy"] == "*"


@pytest.mark.parametrize("address", [PROXY, "proxy.example:3128", "https://me:pw@proxy.example", "http://[::1]:8080", ""])
def test_proxy_that_clients_can_use_is_taken(address: str) -> None:
    check_proxies({"ALL_PROXY": address})


@pytest.mark.parametrize("packages", [(), ("socksio",), ("socksio", "socks")])
def test_socks_is_taken_with_its_packages_only(monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...]) -> None:
    monkeypatch.setattr(proxies.importlib.util, "find_spec", lambda name: name if name in packages else None)
    for scheme in ("socks5", "socks5h"):
        variables = {"all_proxy": f"{scheme}://me:secret@127.0.0.1:1080"}
        if len(packages) == 2:
            check_proxies(variables)
            continue
        with pytest.raises(UserError) as caught:
            check_proxies(variables)
        assert str(caught.value) == (
            f"all_proxy: a proxy of kind {scheme} needs packages that are not installed; "
            "pip install 'r1-pipeline[socks]', or unset all_proxy"
        )


@pytest.mark.parametrize("address", ["ftp://x", "socks4://x:1", "http://", "http://[::1", "http://x:port", "://"])
def test_address_that_is_no_proxy_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"^HTTPS_PROXY: "):
        check_proxies({"HTTPS_PROXY": address})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@given(text=st.text())
def test_any_text_can_be_written_in_any_encoding(encoding: str, text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=HANDLER, newline="")
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) is not None  # type: ignore[attr-defined]
    assert plain(text).isascii()


def test_text_in_ascii_says_the_same_as_far_as_it_can() -> None:
    assert plain("1–2 × café … → ≤ ½ ²") == "1-2 x cafe ... -> <= 1/2 2"
    assert plain("中\ud800\U0001f600") == r"中".encode("unicode_escape").decode() + r"\ud800\U0001f600"


def test_streams_of_a_process_survive_what_they_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with without_secrets():
        for stream in (sys.stdout, sys.stderr):
            print("zéro → ½", file=stream, flush=True)
    assert {stream.buffer.getvalue() for stream in streams.values()} == {b"zero -> 1/2\n"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_document_survives_the_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    document: dict[str, Any] = {"path": "/läuft/中/\U0001f600", "said": "½ → 2"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    survive_any_encoding()
    print_json(document)
    assert json.loads(stream.buffer.getvalue().decode(encoding)) == document  # type: ignore[attr-defined]
