"""What is left of a bench: bench.json, two figures, a run in MLflow's experiment `bench`."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.measure import Bench
from tests.bench.sides import cores

EXPERIMENT = "bench"
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "lm-eval")


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    found: dict[str, Any] = {"cores": cores(), "processor": processor(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(bench: Bench, results: Sequence[Mapping[str, Any]], load: tuple[float, float]) -> dict[str, Any]:
    """Write bench.json and the figures; returns the document. `load`: the machine's load average before and after."""
    options = {"pairs": bench.pairs, "quick": bench.quick, "model": bench.model.name}
    document = {"machine": machine(), "options": options, "load": list(load), "comparisons": list(results)}
    (bench.out / "bench.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    figures(bench.out, results)
    return document


def figures(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """ratios.png and growth.png, as far as there is something to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    bars = [
        (f"{result['name']} / {peer}", found["ratio"], found["memory_ratio"])
        for result in results
        for peer, found in result.get("against", {}).items()
    ]
    if bars:
        _ratios(folder / "ratios.png", bars)
    for result in results:
        if "points" in result:
            _growth(folder / "growth.png", result)


def _ratios(file: Path, bars: Sequence[tuple[str, Mapping[str, float], float]]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.42 * len(bars)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    places = range(len(bars))
    medians = [ratio["median"] for _, ratio, _ in bars]
    spread = [
        [ratio["median"] - ratio["least"] for _, ratio, _ in bars],
        [ratio["most"] - ratio["median"] for _, ratio, _ in bars],
    ]
    left.barh(places, medians, xerr=spread, color="#4878a8", ecolor="#222222", capsize=3, height=0.6)
    right.barh(places, [memory for _, _, memory in bars], color="#a87848", height=0.6)
    left.set_yticks(places, [name for name, _, _ in bars])
    left.invert_yaxis()
    for axis, title, values, ends in (
        (left, "time, ours / peer (median, least to most)", medians, [ratio["most"] for _, ratio, _ in bars]),
        (right, "peak memory, ours / peer", [m for _, _, m in bars], [m for _, _, m in bars]),
    ):
        axis.axvline(1.0, color="#222222", linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.18 * max(1.0, *ends))
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for place, value, end in zip(places, values, ends, strict=True):
            where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(
                f"{value:.2f}", (end, place), fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **where
            )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _growth(file: Path, result: Mapping[str, Any]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    points, found = result["points"], result["found"]
    tokens = [point["tokens"] for point in points]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for axis, key, name, exponent in (
        (axes[0], "seconds", "seconds", found["exponent of time"]),
        (axes[1], "above_mib", "peak memory above the loaded model, MiB", found["exponent of memory"]),
    ):
        values = [point[key] for point in points]
        axis.plot(tokens, values, "o-", color="#4878a8", label=f"measured, exponent {exponent:.2f}")
        linear = [values[0] * t / tokens[0] for t in tokens]
        axis.plot(tokens, linear, "--", color="#888888", linewidth=1, label="linear growth")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xticks(tokens, [f"{t:,}" for t in tokens])
        axis.set_ylim(min(values + linear) / 1.5, max(values + linear) * 1.5)
        axis.set_xlabel("packed tokens of an update")
        axis.set_ylabel(name)
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend(fontsize=9)
    vocabulary = points[0]["vocabulary"]
    figure.suptitle(f"growth of an update, vocabulary {vocabulary:,}", fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every number of the results, named `comparison/side/what`."""
    found: dict[str, float] = {}
    for result in results:
        name = result["name"]
        for side, told in result.get("sides", {}).items():
            found[f"{name}/{side}/seconds"] = told["seconds"]["median"]
            found[f"{name}/{side}/peak_mib"] = told["peak_mib"]
            if "tokens_per_second" in told:
                found[f"{name}/{side}/tokens_per_second"] = told["tokens_per_second"]["median"]
        for peer, ratio in result.get("against", {}).items():
            found |= {f"{name}/{peer}/ratio_{key}": value for key, value in ratio["ratio"].items()}
            found[f"{name}/{peer}/memory_ratio"] = ratio["memory_ratio"]
        found |= {f"{name}/{key}": float(v) for key, v in result.get("found", {}).items() if isinstance(v, int | float)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def track(uri: str, bench: Bench, document: Mapping[str, Any]) -> str:
    """Log the document as one run; returns its id."""
    from stages.tracking.mlflow.client import Connection, metric_name, now

    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow.entities import Metric, Param

    connection = Connection(uri, EXPERIMENT)
    client = connection.client()
    run = client.create_run(connection.experiment_id, now(), {"quick": str(bench.quick).lower()}, bench.out.name)
    params = document["machine"] | document["options"]
    moment = now()
    values = [Metric(metric_name(n.replace(",", "")), v, moment, 0) for n, v in metrics(document["comparisons"]).items()]
    client.log_batch(run.info.run_id, params=[Param(metric_name(k), str(v)[:500]) for k, v in params.items()], metrics=values)
    for file in (bench.out / "bench.json", *sorted(bench.out.glob("*.png"))):
        client.log_artifact(run.info.run_id, str(file))
    failed = any("failed" in result for result in document["comparisons"])
    client.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED", now())
    return str(run.info.run_id)
