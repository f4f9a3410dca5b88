"""Secrets: what counts as one, in which spellings it is found, and the borders at which it is taken out."""

import base64
import json
import logging
import subprocess
import sys
from urllib.parse import quote

import pytest

from stages.contract import secrets
from stages.contract.errors import StageFailed, UserError
from stages.contract.secrets import Secrets
from stages.curation.endpoint import Endpoint
from stages.recipe.resolve import load_recipe
from stages.runtime.log_filter import KEPT, LONGEST, filtered_log
from stages.runtime.streams import without_secrets
from tests.conftest import ROOT
from tests.requirements import require

QUICK = ROOT / "configs" / "quickstart.yaml"
VALUE = 'p/ä"s+s wörd'


@pytest.fixture
def secret(monkeypatch):
    """A secret in this process's environment."""
    monkeypatch.setenv("MY_API_KEY", "planted-7f3a")
    secrets.known.cache_clear()
    yield "planted-7f3a"
    secrets.known.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "PREFECT_API_AUTH_STRING",
        "my_passwd",
        "GCP_CREDENTIALS",
    ],
)
def test_names_that_say_it(name):
    assert Secrets({name: "value123"}).redact("a value123 b") == f"a [{name}] b"


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "MONKEY_ISLAND"])
def test_names_that_do_not(name):
    assert Secrets({name: "value123"}).redact("a value123 b") == "a value123 b"


def test_short_values_and_paths_are_none(tmp_path):
    assert Secrets({"A_KEY": "12345", "B_KEY": str(tmp_path)}).redact(f"12345 {tmp_path}") == f"12345 {tmp_path}"


@pytest.mark.parametrize(
    "spelling",
    [
        VALUE,
        quote(VALUE, safe=""),
        json.dumps(VALUE)[1:-1],
        repr(VALUE)[1:-1],
        base64.b64encode(VALUE.encode()).decode(),
        base64.urlsafe_b64encode(VALUE.encode()).decode().rstrip("="),
    ],
)
def test_spellings(spelling):
    assert Secrets({"X_TOKEN": VALUE}).redact(f"<{spelling}>") in ("<[X_TOKEN]>", "<[X_TOKEN]=>")


def test_parts_of_a_value():
    headers = json.dumps({"Authorization": "Bearer abc-def-1", "X": "y"})
    environment = {
        "PREFECT_CLIENT_CUSTOM_HEADERS": headers,
        "PREFECT_API_AUTH_STRING": "admin:open-sesame",
        "SSH_KEY": "-----BEGIN KEY-----\nline-of-the-key-1\n-----END KEY-----",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "flow-flow",
    }
    found = Secrets(environment)
    for text in ("abc-def-1", "open-sesame", "line-of-the-key-1", base64.b64encode(b"me:flow-flow").decode()):
        assert text not in found.redact(f"x {text} y")
    assert "open-sesame" not in found.redact("Authorization: Basic " + base64.b64encode(b"admin:open-sesame").decode())


def test_addresses_known_or_not():
    found = Secrets({"HTTPS_PROXY": "http://me:wall-%26-door@proxy:3128"})
    assert found.redact("via wall-%26-door or wall-&-door") == "via [HTTPS_PROXY] or [HTTPS_PROXY]"
    assert found.redact("postgresql://u:pass1@db/x, http://a:b@c/") == "postgresql://[secret]@db/x, http://[secret]@c/"
    assert found.redact("http://127.0.0.1:4200/api at 10:30, me@host") == "http://127.0.0.1:4200/api at 10:30, me@host"
    assert found.redact("Authorization: Bearer abcdefghijklmnop") == "Authorization: Bearer [secret]"


def test_files_that_libraries_read(tmp_path):
    (tmp_path / ".netrc").write_text("machine h login me password net-rc-pass\n")
    (tmp_path / ".netrc").chmod(0o600)
    (tmp_path / ".pgpass").write_text("# c\nh:5432:db:me:pg-pass-word\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_from_a_file\n")
    found = Secrets({"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")})
    assert found.redact("net-rc-pass pg-pass-word hf_from_a_file") == "[netrc] [pgpass] [Hugging Face token]"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("tracking.uri=https://me:hidden-1@mlflow.example", "--set: tracking.uri"),
        ("tracking.uri=postgresql://me:hidden-1@db/mlflow", "--set: tracking.uri"),
        ("stages.base.note=hf_hidden1hidden1hidden1hidden1", "--set: stages.base.note"),
        ("stages.base.note=sk-hidden1-hidden1hidden1hidden1", "--set: stages.base.note"),
        ("stages.base.note={api_key: hidden-1}", "--set: stages.base.note.api_key"),
        ("stages.base.note=x planted-7f3a y", "--set: stages.base.note"),
        ("stages.zero.rewards.api-key=hidden-1", "--set: stages.zero.rewards.api-key"),
    ],
)
def test_a_recipe_holds_no_secret(override, where, secret):
    with pytest.raises(UserError) as caught:
        load_recipe(QUICK, [override])
    assert caught.value.where == where
    assert "hidden" not in str(caught.value)
    assert secret not in str(caught.value)
    assert caught.value.mend


def test_every_shipped_config_passes_for_one_without(secret):
    for path in (ROOT / "configs").glob("quickstart*.yaml"):
        load_recipe(path)


def test_errors_hold_none(secret):
    error = UserError(f"a {secret}", where=f"{secret}: b", mend=f"c {secret}")
    assert secret not in "".join([str(error), error.what, error.where, error.mend, *map(str, error.args)])
    assert str(StageFailed(f"no {secret}")) == "no [MY_API_KEY]"


def test_an_endpoint_s_variable_is_one_whatever_its_name(monkeypatch):
    monkeypatch.setenv("PLAINLY_NAMED", "told-to-nobody")
    monkeypatch.setattr(secrets, "_declared", set())
    secrets.known.cache_clear()
    assert secrets.redact("told-to-nobody") == "told-to-nobody"
    Endpoint(url="http://127.0.0.1:1/v1", model="m", key_variable="PLAINLY_NAMED")
    assert secrets.redact("told-to-nobody") == "[PLAINLY_NAMED]"
    assert secrets.declared() == ["PLAINLY_NAMED"]
    secrets.known.cache_clear()


def test_streams_and_logs(secret, capsys):
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test.secrets")
    logger.addHandler(handler)
    with pytest.raises(ValueError, match=r"^no \[MY_API_KEY\]$"), without_secrets():
        print("out", secret)
        json.dump({"x": secret}, sys.stdout)
        print("err", secret, file=sys.stderr)
        logger.error("said %s", secret)
        try:
            {}[secret]
        except KeyError:
            logger.exception("caught")
        raise ValueError(f"no {secret}")
    logger.removeHandler(handler)
    shown = capsys.readouterr()
    assert secret not in shown.out + shown.err
    assert (shown.out + shown.err).count("[MY_API_KEY]") >= 5
    print(secret)
    assert secret in capsys.readouterr().out  # as it was before


def filtered(tmp_path, write):
    log = tmp_path / "log.txt"
    with filtered_log(log) as pipe:
        write(pipe)
    return log.read_bytes()


def test_a_log_is_filtered_whoever_writes(secret, tmp_path):
    def write(pipe):
        subprocess.run("env; echo end", shell=True, stdout=pipe, check=True)
        pipe.write(b"in two pla")
        pipe.flush()
        pipe.write(b"ces: planted-")
        pipe.flush()
        pipe.write(b"7f3a\rand \xff\xfe no text\nno line's end")

    text = filtered(tmp_path, write)
    assert secret.encode() not in text
    assert b"MY_API_KEY=[MY_API_KEY]\n" in text
    assert text.endswith(b"end\nin two places: [MY_API_KEY]\rand \xff\xfe no text\nno line's end")


def test_a_line_without_end_is_written_and_filtered(secret, tmp_path):
    filler = b"x" * (LONGEST - 6)
    text = filtered(tmp_path, lambda pipe: [pipe.write(part) for part in (filler, secret.encode(), filler * 2)])
    assert text == filler + b"[MY_API_KEY]" + filler * 2
    assert len(secret) < KEPT


def test_a_full_disk_holds_nobody_up(tmp_path):
    require("/dev/full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with filtered_log(tmp_path / "log.txt") as pipe:
        for _ in range(40):
            pipe.write(b"line\n" * 4096)  # more than a pipe holds
