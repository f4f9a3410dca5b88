"""Secrets planted wherever they come from, real runs that do their best to give them away, and none of them anywhere after."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from flows.processes import ProcessTree
from flows.servers.server_process import free_port
from stages.tracking.journal import read
from tests.commands import environment
from tests.conftest import ROOT
from tests.deployments.test_schedule import wait_for
from tests.doubles.endpoint_server import EndpointServer


def planted(name: str) -> str:
    """A secret that says where it was put; with characters that addresses and JSON write in other ways."""
    return f"planted-{name}-é+7/q"


# In variables whose names say it, in ones that do not but hold an address, in one that only the recipe knows.
VARIABLES = {
    "HF_TOKEN": planted("hub"),
    "OPENAI_API_KEY": planted("openai"),
    "WANDB_API_KEY": planted("wandb"),
    "GITHUB_TOKEN": planted("github"),
    "AWS_SECRET_ACCESS_KEY": planted("aws"),
    "PGPASSWORD": planted("postgres"),
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": planted("mlflow").replace("é", "e"),
    "PREFECT_API_AUTH_STRING": "admin:" + planted("prefect").replace("é", "e"),
    "PREFECT_SERVER_API_AUTH_STRING": "admin:" + planted("prefect").replace("é", "e"),
    "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"X-Gate": planted("header").replace("é", "e")}),
    "HTTPS_PROXY": f"http://me:{quote(planted('proxy'), safe='')}@127.0.0.1:9",
    "DATABASE_URL": f"postgresql://app:{quote(planted('database'), safe='')}@db/app",
    "RAISED_SECRET": planted("raised"),
    "PRINTED_SECRET": planted("printed"),
    "SHELL_SECRET": planted("shell"),
    "LOGGED_SECRET": planted("logged"),
    "NOT_TELLING": planted("endpoint").replace("é", "e"),
}
FILES = {
    ".netrc": f"machine mlflow.example login me password {planted('netrc')}\n",
    ".pgpass": f"db:5432:app:me:{planted('pgpass')}\n",
    "hf/token": planted("hub-file") + "\n",
}
WRITTEN = {"address": planted("address"), "field": planted("field"), "shape": "hf_" + "plantedShape0123456789abc"}
PLACES = ["hub", "openai", "wandb", "github", "aws", "postgres", "mlflow", "prefect", "header", "proxy", "database", "raised"]
PLACES += ["printed", "shell", "logged", "endpoint", "netrc", "pgpass", "hub-file", "address", "field", "api-url"]

RECIPE = """
name: planted
runs: {runs}
shared:
  problems: {{source: toy, count: 60, split: train, operations_min: 1, operations_max: 1}}
  held_out: {{source: toy, count: 6, split: held_out, operations_min: 1, operations_max: 1}}
  sampling: {{temperature: 1.0, max_tokens: 16}}
  template: {{name: question}}
  rewards: {{verifier: exact, require_thinking: false, language_target: digits}}
stages:
  base:
    {{kind: toy_base, hidden: 32, intermediate: 64, layers: 2, heads: 2, steps: 150, batch: 32,
      documents: {{operations_min: 1, operations_max: 1}}}}
  zero:
    {{kind: rl, policy: base, steps: 1, questions: 2, samples: 2, minibatches: 1, compute: {{processes: 2}},
      rewards: {{functions: {{planted: {{function: "planted_reward:reward"}}}}}}}}
  data:
    {{kind: curate, sampler: base, count: 20, filters: {{min_language: 0}},
      rewrite: {{endpoint: {{url: "{url}", model: m, key_variable: NOT_TELLING}}}}}}
  evaluation: {{kind: evaluate, models: [base], samples: 1, task_files: [{code}/mine.yaml]}}
"""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.json}}}}
test_split: test
output_type: generate_until
doc_to_text: !function mine.text
doc_to_target: a
generation_kwargs: {{until: ["x"], max_gen_toks: 2, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CODE = """
import logging, os, sys
from pathlib import Path
print("printed", os.environ["PRINTED_SECRET"], file=sys.stderr)
print(dict(os.environ))
logging.getLogger("mine").error("logged %s", os.environ["LOGGED_SECRET"])
os.system("echo from a shell $SHELL_SECRET; env")

def text(doc):
    if Path(__file__).with_name("raise").exists():
        raise RuntimeError("raised " + os.environ["RAISED_SECRET"] + " at postgresql://u:" + "unknown-password@h/d")
    return doc["q"]
"""
REWARD = """
import os
print("a reward saw", dict(os.environ))

def reward(answer):
    return float(len(os.environ.get("RAISED_SECRET", "")))
"""
"""Code in the verifiers' processes, which have no secrets to give away."""


def echo(body: dict[str, Any]) -> str:
    """The solution as it was, with the key in its midst."""
    solution: str = body["messages"][1]["content"].split("Solution:\n")[1]
    return solution.replace("</think>", f" {VARIABLES['NOT_TELLING']}</think>")


class Command:
    """Runs `r1` in the planted environment and keeps what it says, and every command line that its processes had."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said, self.lines = folder, list[str](), set[str]()
        home = folder / "home"
        for name, text in FILES.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o600)
        cache = Path.home() / ".cache"
        places = {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(cache)),
        }
        places["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR", str(cache / "torch_extensions"))
        away = {
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "code")]),
        }
        self.variables = {**environment(), **places, **VARIABLES, **away}

    def __call__(self, *arguments: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.variables, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(process.pid, over))
        watch.start()
        try:
            out, err = process.communicate(timeout=900)
        finally:
            over.set()
            watch.join()
        self.said += [out, err]
        assert process.returncode == status, err[-3000:]
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _watch(self, pid: int, over: threading.Event) -> None:
        while not over.wait(0.1):
            for process in tree(pid)[1:]:  # what the user types himself is in his hands
                try:
                    self.lines.add(" ".join(process.cmdline()))
                    listening(process)
                except psutil.Error:
                    continue


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


OPEN: list[str] = []
"""Addresses beyond loopback that something listened on."""


def listening(process: psutil.Process) -> None:
    """Note what the process listens on beyond loopback."""
    ears = (each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN)
    beyond = [each.laddr for each in ears if not each.laddr.ip.startswith(("127.", "::1"))]
    OPEN.extend(f"{address} {' '.join(process.cmdline())[:200]}" for address in beyond)


def spellings(secret: str) -> Iterator[bytes]:
    """How a secret may be written."""
    for text in {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1]}:
        yield text.encode()
    for user in ("", "me:", "admin:"):
        yield base64.b64encode(f"{user}{secret}".encode()).rstrip(b"=")


def given_away(place: str, content: bytes) -> list[str]:
    """The secrets that are in there: any whole one, and any that says `planted-` at all."""
    secrets = {name: planted(name) for name in PLACES} | {"shape": WRITTEN["shape"]}
    plain = {f"{name} without its accent": secret.replace("é", "e") for name, secret in secrets.items()}
    every = (secrets | plain).items()
    return [f"{name} in {place}" for name, secret in every if any(form in content for form in spellings(secret))]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_planted_secrets_appear_nowhere(tmp_path: Path) -> None:
    runs, code = tmp_path / "runs", tmp_path / "code"
    code.mkdir()
    (code / "mine.py").write_text(CODE)
    (code / "planted_reward.py").write_text(REWARD)
    (code / "mine.yaml").write_text(TASK.format(folder=code))
    (code / "data.json").write_text('{"q": "one", "a": "1"}\n')
    assert len({planted(name) for name in PLACES}) >= 20
    r1 = Command(tmp_path)
    with EndpointServer(echo) as endpoint:
        config = tmp_path / "config.yaml"
        config.write_text(RECIPE.format(runs=runs, code=code, url=endpoint.url))
        refusals(r1, config)
        done = r1("run", config, "--json")
        assert json.loads(done.stdout)["status"] == "done"
        assert set(endpoint.keys) == {f"Bearer {VARIABLES['NOT_TELLING']}"}
        endpoint.faults = [(401, {}, f"no such key: {VARIABLES['NOT_TELLING']}")] * 50
        r1("run", config, "--until", "data", "--set", "stages.data.seed=1", status=2)
    (code / "raise").touch()
    failed = r1("run", config, "--fresh", "evaluation", status=3)
    assert "RuntimeError: raised [RAISED_SECRET] at postgresql://[secret]@h/d" in failed.stderr
    r1("status", "latest", "--runs", runs, "--json")
    r1("doctor", "--runs", runs, "--json")
    scheduled(r1, config, runs, tmp_path)
    look(r1, runs, tmp_path)


def refusals(r1: Command, config: Path) -> None:
    """A secret in a recipe is refused before anything is written, and not repeated."""
    address = f"https://me:{quote(WRITTEN['address'], safe='')}@mlflow.example"
    body = {"data": {"rewrite": {"endpoint": {"body": {"api_key": WRITTEN["field"]}}}}}
    spoiled = config.with_name("spoiled.yaml")
    spoiled.write_text(json.dumps({"extends": str(config), "stages": body}))
    for arguments in (
        (config, "--set", f"tracking.uri={address}"),
        (config, "--set", f"stages.data.rewrite.endpoint.url={address}"),
        (config, "--set", f"name={WRITTEN['shape']}"),
        (config, "--set", f"stages.base.seed={VARIABLES['HF_TOKEN']}"),
        (config, "--set", VARIABLES["OPENAI_API_KEY"]),
        (spoiled,),
    ):
        r1("run", *arguments, status=2)
    r1("deploy", config, "--cron", "0 3 * * *", "--set", f"tracking.uri={address}", status=2)


def scheduled(r1: Command, config: Path, runs: Path, folder: Path) -> None:
    """A deployment at a server that asks for a password, which is in the address too (and counts there)."""
    password = planted("api-url").replace("é", "e")
    login = dict.fromkeys(("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"), f"admin:{password}")
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", "--runs", str(runs), *ports],
            cwd=ROOT,
            env={**r1.variables, **login},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for("servers", 300, (runs / "servers.json").exists, folder / "up.log")
        for process in tree(up.pid):
            listening(process)
            r1.lines.add(" ".join(process.cmdline()))
        api = f"http://admin:{quote(password, safe='')}@127.0.0.1:{ports[1]}/api"
        deployed = r1("deploy", config, "--cron", "0 3 * * *", "--json", PREFECT_API_URL=api, **login)
        assert json.loads(deployed.stdout)["deployment"] == "r1-config/planted"
    finally:
        ProcessTree(up.pid).end(15.0)
        up.wait()
    r1.said.append((folder / "up.log").read_text())


def look(r1: Command, runs: Path, folder: Path) -> None:
    """Every byte of the runs folder (journals, logs, manifests, databases, artifacts), what was said, every command line."""
    files = [path for path in runs.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"mlflow.db", "prefect.db", "pipeline.json", "manifest.json", "outcome.json", "log.txt", "server.log"} <= names
    logs = "".join(path.read_text(errors="replace") for path in files if path.name == "log.txt")
    (journal,) = runs.glob("stages/rl-*/journal.jsonl")
    assert [line.metrics["reward/planted"] for line in read(journal)] == [0.0], "a reward function has read a secret"
    for word in ("printed [PRINTED_SECRET]", "logged [LOGGED_SECRET]", "from a shell [SHELL_SECRET]", "raised [RAISED_SECRET]"):
        assert word in logs, f"{word}: nobody tried to give it away"
    assert "OPENAI_API_KEY=[OPENAI_API_KEY]" in logs
    found = [leak for path in files for leak in given_away(str(path.relative_to(runs)), path.read_bytes())]
    found += [leak for text in r1.said for leak in given_away("what was said", text.encode())]
    found += [leak for line in r1.lines for leak in given_away(f"the command line {line[:200]}", line.encode())]
    assert not found, "\n".join(sorted(set(found)))
    assert len(r1.lines) > 5
    assert not OPEN, "\n".join(sorted(set(OPEN)))


def test_the_search_finds_what_it_looks_for() -> None:
    for name in PLACES:
        secret: Any = planted(name)
        assert given_away("x", f"a {secret} b".encode())
        assert given_away("x", f"a {quote(secret)} b".encode())
        assert given_away("x", base64.b64encode(secret.encode()) + b" b")
    assert given_away("x", base64.b64encode(b"me:" + VARIABLES["MLFLOW_TRACKING_PASSWORD"].encode()))
    assert not given_away("x", b"planted-nothing")
