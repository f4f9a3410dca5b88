"""Secrets: what they are, how they are kept out of a recipe, and out of everything that is written.

A secret is the value of an environment variable whose name says so (HF_TOKEN, OPENAI_API_KEY, PGPASSWORD, …) or that a recipe
names as one (`key_variable`), a password in an address that a variable holds (a proxy, a database), and what is in the files
from which libraries take theirs (netrc, pgpass, the Hugging Face token). At the borders where text leaves a process (its
streams, its log, outcomes, manifests, errors, Prefect's log) `redact` puts the variable's name in its place, also where it is
written as in a URL, in JSON or in base64. What user code writes into files of its own is its own affair.
"""

import base64
import functools
import json
import netrc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

SHORTEST = 6
"""Characters below which a value is no secret: it would turn up everywhere."""
_WORDS = {"TOKEN", "KEY", "APIKEY", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "BEARER", "COOKIE", "HEADERS"}
_PARTS = ("PASSWORD", "SECRET", "AUTH_STRING")
# The scheme is bounded: without a bound a long text with many dots takes time in the square of its length.
_ADDRESS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,31}://)([^/\s:@'\"`]*):([^\s@/'\"`]+)@")
_BEARER = re.compile(r"\b(Bearer|Basic)(\s+|\\u0020)[A-Za-z0-9+/=_.~-]{12,}")
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
"""Keys of well-known services."""
_FIELDS = {"apikey", "password", "passwd", "passphrase", "secret", "clientsecret", "accesstoken", "authtoken", "authorization"}
_declared: set[str] = set()


class Secrets:
    """The secrets of one environment."""

    def __init__(self, environment: Mapping[str, str], declared: frozenset[str] = frozenset()) -> None:
        """`declared`: variables that are secret whatever their names say."""
        self._names: dict[str, str] = {}
        for name, value in environment.items():
            if name in declared or _says_so(name):
                for part in _parts(value):
                    self._add(part, name)
            for match in _ADDRESS.finditer(value):
                self._add(match[3], name)
                self._add(unquote(match[3]), name)
                self._add(f"{match[2]}:{match[3]}", name)
        user = environment.get("MLFLOW_TRACKING_USERNAME")
        if user and (password := environment.get("MLFLOW_TRACKING_PASSWORD")):
            self._add(f"{user}:{password}", "MLFLOW_TRACKING_PASSWORD")
        for value, name in _kept_in_files(environment):
            self._add(value, name)
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _add(self, value: str, name: str) -> None:
        if len(value) < SHORTEST or (value.startswith("/") and Path(value).exists()):  # a path to a secret is none
            return
        raw = value.encode(errors="surrogateescape")
        coded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
        quoted = {quote(raw, safe=""), quote(raw), quote_plus(raw), json.dumps(value)[1:-1], repr(value)[1:-1]}
        quoted |= {re.sub("%[0-9A-F]{2}", lambda hexadecimal: hexadecimal[0].lower(), text) for text in quoted}
        for form in {value, *quoted, *coded, *(text.rstrip("=") for text in coded)}:
            self._names.setdefault(form, name)

    def redact(self, text: str) -> str:
        """The text with names of variables in the place of secrets.

        >>> Secrets({"MY_TOKEN": "s3cr3t!"}).redact("given s3cr3t! or http://me:unknown@host/")
        'given [MY_TOKEN] or http://[secret]@host/'
        """
        if self._pattern is not None:
            text = self._pattern.sub(lambda match: f"[{self._names[match[0]]}]", text)
        return _BEARER.sub(r"\1 [secret]", _ADDRESS.sub(r"\1[secret]@", text)) if "@" in text or "B" in text else text

    def named_in(self, text: str) -> str | None:
        """The variable whose secret is in the text."""
        match = self._pattern.search(text) if self._pattern is not None else None
        return self._names[match[0]] if match else None


def declare(variable: str) -> None:
    """From now on the value of this environment variable is a secret."""
    if variable not in _declared:
        _declared.add(variable)
        known.cache_clear()


def declared() -> list[str]:
    """The variables that were declared."""
    return sorted(_declared)


@functools.cache
def known() -> Secrets:
    """The secrets of this process's environment as it was at the first call."""
    return Secrets(os.environ, frozenset(_declared))


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables that hold a secret, for processes that run code of others.

    >>> without_keys({"PATH": "/bin", "HF_TOKEN": "s3cr3t", "DATABASE": "postgresql://me:hush@host/", "SSH_AUTH_SOCK": "/s"})
    {'PATH': '/bin'}
    """
    return {
        name: value
        for name, value in environment.items()
        if not (_says_so(name) or name in _declared or name == "SSH_AUTH_SOCK" or _ADDRESS.search(value))
    }


def redact(text: str) -> str:
    """`Secrets.redact` with this process's secrets."""
    return known().redact(text)


def redacted(value: Any) -> Any:
    """A JSON value with all its texts redacted, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def given_away(value: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], str, str] | None:
    """The first secret in a configuration's values: where it is, what it is, and the mend; nothing of the secret itself."""
    if isinstance(value, dict):
        return next(filter(None, (given_away(item, (*path, str(key))) for key, item in value.items())), None)
    if isinstance(value, list | tuple):
        return next(filter(None, (given_away(item, (*path, str(index))) for index, item in enumerate(value))), None)
    if not isinstance(value, str):
        return None
    if (name := known().named_in(value)) is not None:
        return path, f"holds the secret of {name}, and would be written into records", "leave it out: it is taken from there"
    if _ADDRESS.search(value):
        mend = (
            "leave the password out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database PGPASSWORD)"
        )
        return path, "an address with a password in it would be written into records", mend
    field = re.sub("[^a-z]", "", path[-1].lower()) if path else ""
    if _SHAPES.search(value) or (value and field in _FIELDS):
        mend = "put it into an environment variable, and name the variable where a field such as `key_variable` takes one"
        return path, "looks like a secret, and would be written into records", mend
    return None


def _says_so(name: str) -> bool:
    upper = name.upper()
    return bool(_WORDS & set(upper.split("_"))) or any(part in upper for part in _PARTS)


def _parts(value: str) -> Iterator[str]:
    """What of a variable's value may turn up by itself: `user:password`, headers as JSON, the lines of a key."""
    yield value
    yield value.strip()
    if ":" in value:
        yield value.partition(":")[2].strip()
    if "\n" in value:
        yield from (line.strip() for line in value.splitlines())
    if value.startswith("{"):
        try:
            document = json.loads(value)
        except ValueError:
            return
        for item in document.values() if isinstance(document, dict) else ():
            if isinstance(item, str):
                yield item
                yield item.split()[-1] if item.split() else item


def _kept_in_files(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Secrets in the files where libraries look for them, and where they are."""
    home = Path(environment.get("HOME") or "/nonexistent")
    place = Path(environment.get("NETRC") or home / ".netrc")
    try:
        hosts = netrc.netrc(str(place)).hosts if place.is_file() else {}
    except (OSError, ValueError, netrc.NetrcParseError):
        hosts = {}
    for user, _, password in hosts.values():
        if password:
            yield password, "netrc"
            yield f"{user}:{password}", "netrc"
    cache = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface")
    for line in _lines(Path(environment.get("HF_TOKEN_PATH") or cache / "token")):
        yield line.strip(), "Hugging Face token"
    for line in _lines(Path(environment.get("PGPASSFILE") or home / ".pgpass")):
        if line.count(":") >= 4 and not line.startswith("#"):
            yield line.split(":", 4)[4], "pgpass"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else []
    except OSError:
        return []
