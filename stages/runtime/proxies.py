"""HTTP proxies of the user's: never for this machine's own servers, and refused in one line where no client could use them."""

import importlib.util
import os
from collections.abc import MutableMapping
from urllib.parse import urlsplit

from stages.contract.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KINDS = ("HTTP", "HTTPS", "ALL")
_SOCKS_PACKAGES = ("socksio", "socks")
"""What httpx (Prefect, the hub, endpoints) and requests (MLflow) need for a SOCKS proxy."""


def proxy_variables(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Name -> address of the proxies that the environment names, in upper and lower case."""
    variables = os.environ if environment is None else environment
    names = (spelled for kind in _KINDS for spelled in (f"{kind}_PROXY", f"{kind.lower()}_proxy"))
    return {name: variables[name].strip() for name in names if variables.get(name, "").strip()}


def keep_loopback_direct(environment: MutableMapping[str, str] | None = None) -> None:
    """Except loopback from the proxies, for this process and its children; without a proxy nothing changes.

    Libraries read NO_PROXY or no_proxy, and some only the one that they find first, so both name the same hosts.
    """
    variables = os.environ if environment is None else environment
    if not proxy_variables(variables):
        return
    hosts = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in variables.get(name, "").split(",")]
    text = ",".join(dict.fromkeys([*filter(None, hosts), *LOOPBACK]))
    variables["NO_PROXY"] = variables["no_proxy"] = "*" if "*" in hosts else text


def check_proxies(environment: MutableMapping[str, str] | None = None) -> None:
    """Raise UserError for a proxy that the HTTP clients here cannot use: they would fail in the middle, with a traceback."""
    for name, address in proxy_variables(environment).items():
        scheme = address.partition("://")[0].lower() if "://" in address else "http"
        if scheme in ("socks5", "socks5h"):
            if any(importlib.util.find_spec(package) is None for package in _SOCKS_PACKAGES):
                mend = f"pip install 'r1-pipeline[socks]', or unset {name}"
                raise UserError(f"a proxy of kind {scheme} needs packages that are not installed", where=name, mend=mend)
        elif scheme not in ("http", "https"):
            mend = f"use http://, https:// or socks5://, or unset {name}"
            raise UserError(f"proxies of kind `{scheme}` cannot be used", where=name, mend=mend)
        if not _is_address(address if "://" in address else f"http://{address}"):
            raise UserError("not the address of a proxy", where=name, mend="for example http://proxy.example:3128, or unset it")


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
