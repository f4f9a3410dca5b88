"""Install packages into a virtual environment, which is created if need be: with uv, or with pip where uv cannot be had.

    python3 infra/install.py [--torch BUILD] VENV ARGUMENTS…    (the arguments of `pip install`)

Both read pip's configuration (indexes, find-links, certificate, constraints). A line of progress appears every 10 seconds, on a
terminal every second. Exit status: 0 installed, 1 the installer failed (its last lines are shown), 2 something is missing here.
Standard library only: this runs before anything is installed.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_INDEX = "https://download.pytorch.org/whl/"
"""PyTorch's own index, with a build for each CUDA version and one for CPUs."""
PROBE_SECONDS = 3.0
"""How long that index may take to answer."""
ROOM_GIB = 2.0
"""What the smallest environment takes, that with the CPU build."""
UNFINISHED = ".unfinished"
"""A file in an environment while packages are installed. A killed installer leaves packages that lack files and look whole to
the next one (uv 0.13: 903 of sympy), so that such an environment is created anew; downloads are cached."""
SHOWN_LINES = 20
"""Of a failed installer's output."""
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
"""Settings of pip, and uv's environment variables for the same."""


def main() -> int:
    """Create the environment, find an installer, install."""
    parser = argparse.ArgumentParser(usage="install.py [--torch BUILD] VENV ARGUMENTS…")
    parser.add_argument("--torch", default="", help="auto, cpu, or a CUDA version such as cu128; empty: what pip's index has")
    parser.add_argument("venv", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    demand_python(sys.version_info[:3], (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if options.torch:
        demand_room(options.venv)
    python = create_environment(options.venv)
    uv = find_uv(python)
    backend = torch_build(options.torch)
    if uv is None:
        command = [str(python), "-m", "pip", "install", "--progress-bar", "off", *options.arguments]
        if backend not in ("", "auto"):
            command += ["--extra-index-url", TORCH_INDEX + backend]
        variables = {}
    else:
        # Compiled as pip does it: the first commands would else spend half a minute on it, and on a read-only disk all do.
        command = [uv, "pip", "install", "--compile-bytecode", "--python", str(python), *options.arguments]
        command += [f"--torch-backend={backend}"] if backend else []
        variables = uv_variables(pip_settings(python))
    unfinished = options.venv / UNFINISHED
    unfinished.touch()
    packages = " ".join(word for word in options.arguments if not word.startswith("-") and not word.endswith(".txt"))
    run_with_progress(command, variables, f"{options.venv}: {'pip' if uv is None else 'uv'} install {packages}".rstrip())
    unfinished.unlink()
    return 0


def stop(line: str, status: int = 2) -> SystemExit:
    """Print one line on standard error; the exception that ends this program."""
    print(f"set-up: {line}", file=sys.stderr, flush=True)
    return SystemExit(status)


def demand_python(version: "tuple[int, ...]", pyproject: str) -> None:
    """Exit unless the interpreter is as new as `requires-python`."""
    needed = re.search(r'^requires-python = ">=([0-9.]+)"', pyproject, re.MULTILINE)
    assert needed is not None
    if version < tuple(map(int, needed.group(1).split("."))):
        here = ".".join(map(str, version))
        hint = f"install it, then `make PYTHON=python{needed.group(1)}`"
        raise stop(f"Python {needed.group(1)} or later is needed, {sys.executable} is {here}; {hint}")


def demand_room(folder: Path) -> None:
    """Exit where a new environment with PyTorch cannot fit on the disk."""
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free / 2**30
    if free < ROOM_GIB and not (folder / "bin" / "python").exists():
        raise stop(f"{free:.1f} GiB are free, {folder} takes {ROOM_GIB} and more; make room, or clone onto another disk")


def create_environment(folder: Path) -> Path:
    """Create the virtual environment unless there is a whole one that works; returns its interpreter."""
    python = folder / "bin" / "python"
    whole = python.exists() and not (folder / UNFINISHED).exists()
    if whole and _quietly([str(python), "-m", "pip", "--version"]) is not None:
        return python
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        lines = (made.stdout + made.stderr).strip().splitlines() or [""]
        raise stop(f"`python -m venv {folder}` failed: {lines[0]}; Debian and Ubuntu: apt-get install python3-venv")
    return python


def find_uv(python: Path) -> "str | None":
    """Uv from PATH or from the environment, where pip installs it; None where that fails, or with R1_INSTALLER=pip."""
    if os.environ.get("R1_INSTALLER") == "pip":
        return None
    inside = python.parent / "uv"
    if (installed := shutil.which("uv")) is not None:
        return installed
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), "uv"]
    if not inside.exists() and _quietly(install) is None:
        print("set-up: uv cannot be installed; pip does the same in some minutes more", file=sys.stderr, flush=True)
        return None
    return str(inside)


def torch_build(build: str) -> str:
    """What to pass on as uv's --torch-backend: nothing for `auto` where PyTorch's index does not answer."""
    if not build or answers(TORCH_INDEX + "cpu/torch/"):
        return build
    if build != "auto":
        raise stop(f"{TORCH_INDEX} does not answer, so there is no `{build}` build of PyTorch; leave out TORCH={build}")
    return ""


def answers(address: str) -> bool:
    """Whether an index can be reached now."""
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - always https
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:  # noqa: S310
            return 200 <= answer.status < 300
    except (OSError, ValueError, urllib.error.URLError):
        return False


def pip_settings(python: Path) -> "dict[str, str]":
    """Pip's configuration: its files, then its environment variables, which win."""
    text = _quietly([str(python), "-m", "pip", "config", "list"]) or ""
    settings = {}
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", text, re.MULTILINE):
            settings[name] = str(ast.literal_eval(value))
    return settings


def uv_variables(settings: "dict[str, str]") -> "dict[str, str]":
    """Uv's environment for the same packages that pip would choose. What the user sets for uv stays."""
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # of all indexes the best version, as pip does
    for name, value in settings.items():
        if name in PIP_TO_UV:
            separator = "," if name == "find-links" else " "
            variables[PIP_TO_UV[name]] = separator.join(value.split())
    return {name: value for name, value in variables.items() if name not in os.environ}


def run_with_progress(command: "list[str]", variables: "dict[str, str]", what: str) -> None:
    """Run an installer; show how long it has taken and what it does now. Exits with status 1 when it fails."""
    started, lines = time.monotonic(), ["…"]
    terminal = sys.stderr.isatty()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **variables, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
    )

    def read() -> None:
        assert process.stdout is not None
        lines.extend(line.strip() for line in process.stdout if line.strip())

    def show(doing: str, end: str = "\n") -> None:
        start = "\r\033[K" if terminal else ""
        line = f"{what}: {time.monotonic() - started:.0f} s {doing[:60]}"
        print(start + line, end=end, file=sys.stderr, flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        show("…", end="" if terminal else "\n")
        while reader.is_alive():
            reader.join(1.0 if terminal else 10.0)
            if reader.is_alive():
                show(lines[-1], end="" if terminal else "\n")
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise stop(f"{what}: interrupted; the same command goes on with what was downloaded", 130) from None
    if status:
        print("\n".join(["", *lines[-SHOWN_LINES:]]), file=sys.stderr)
        raise stop(f"{what}: failed (status {status}); the same command goes on with what was downloaded", 1)
    show("done")


def _quietly(command: "list[str]") -> "str | None":
    """Standard output of a command; None when it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
