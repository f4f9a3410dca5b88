"""infra/ of containers: each file is checked by its own tool (`make check-infra` brings them)."""

import configparser
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.infra.conftest import check, tool

INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose.yaml"
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))


def filled(folder: Path) -> Path:
    """A copy of .env.example with every line filled in."""
    lines = (INFRA / ".env.example").read_text().splitlines()
    file = folder / ".env"
    file.write_text("\n".join(f"{line}secret-{i}" if line.endswith("=") else line for i, line in enumerate(lines)))
    return file


def compose(env_file: Path, *command: str) -> subprocess.CompletedProcess[str]:
    program = [tool("docker-compose"), "--file", str(COMPOSE), "--env-file", str(env_file), *command]
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(program, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    check(tool("hadolint"), "--failure-threshold", "style", file)


def test_shellcheck_finds_nothing() -> None:
    check(tool("shellcheck"), "--enable=all", "--severity=style", INFRA / "docker" / "databases.sh")


def test_compose_takes_its_file(tmp_path: Path) -> None:
    """Docker Compose reads it, against its own schema, and makes of it what is meant."""
    done = compose(filled(tmp_path), "--profile", "cuda", "config")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == {"postgres", "prefect", "mlflow", "worker", "worker-cuda"}
    for name, service in services.items():
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert "no-new-privileges:true" in service["security_opt"], name
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists(), name
            assert Path(service["build"]["context"]).samefile(ROOT), name
    assert "ports" not in services["postgres"]
    assert services["worker"]["depends_on"]["mlflow"]["condition"] == "service_healthy"


@pytest.mark.parametrize(
    "variable", [line[:-1] for line in (INFRA / ".env.example").read_text().splitlines() if line[-1:] == "="]
)
def test_compose_refuses_to_start_without_a_secret(tmp_path: Path, variable: str) -> None:
    file = filled(tmp_path)
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(f"{variable}=")))
    done = compose(file, "config", "--quiet")
    assert done.returncode != 0
    assert f"{variable}" in done.stderr
    assert "fill in infra/.env" in done.stderr


def test_what_is_copied_into_an_image_is_let_through() -> None:
    """.dockerignore lets through what the Dockerfiles copy, and the package's own list of files is whole."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_through)
    for file in DOCKERFILES:
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == ["COPY"] and not words[1].startswith("--from") and words[1] != ".":
                assert set(words[1:-1]) <= let_through, line
    assert ".env" not in " ".join(let_through)
    assert subprocess.run(["git", "check-ignore", "--quiet", "infra/.env"], cwd=ROOT, check=False).returncode in (0, 128)


def test_both_files_hold_to_the_tested_versions() -> None:
    for file in DOCKERFILES:
        text = file.read_text()
        installs = [line for line in text.replace("\\\n", " ").splitlines() if "pip install" in line]
        assert installs
        for line in installs:
            for command in line.split("&&"):
                if "pip install" in command:
                    assert "constraints" in command, command
        users = [line for line in text.splitlines() if line.startswith("USER ")]
        assert users == ["USER 10001:10001"]


def test_mlflow_s_users_are_kept_where_its_records_are() -> None:
    settings = configparser.ConfigParser()
    settings.read(INFRA / "docker" / "mlflow-auth.ini")
    mlflow = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    assert settings["mlflow"]["database_uri"] == mlflow["environment"]["MLFLOW_BACKEND_STORE_URI"]
