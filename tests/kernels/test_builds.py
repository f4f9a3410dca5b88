"""The kernels as other compilers and processors build them: without OpenMP, without x86's vector instructions, for arm64."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from flows.doctor.environment import _compiler
from stages.kernels import build
from tests.requirements import needs
from tests.rollout.test_compiled import fresh_cache

DRIVER = Path(__file__).parent / "kernel_driver.cpp"
ARM_COMPILER, ARM_RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64"
TOLERANCE = 2e-6
"""Of the largest number of an output: sums are rounded once where a × b + c is fused, twice where it is not."""
pytestmark = needs("compiler")


def outputs(folder: Path, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> tuple[str, dict[str, np.ndarray]]:
    """The features that the driver was built with, and every kernel's output."""
    program = folder / "driver"
    options = ["-std=gnu++17", "-O1", "-w", "-ffp-contract=off", f"-I{build.SOURCES}", *flags]
    subprocess.run([compiler, *options, str(DRIVER), "-o", str(program)], check=True)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        place, value = line.split()
        found.setdefault(place.partition("[")[0], []).append(float(value))
    return done.stderr.strip(), {name: np.array(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """By this machine's processor, as the other tests hold it against float64."""
    return outputs(tmp_path_factory.mktemp("native"), str(build.compiler()), "-march=native", "-fopenmp")[1]


def demand_same(found: dict[str, np.ndarray], native: dict[str, np.ndarray]) -> None:
    assert found.keys() == native.keys()
    assert len(native) == 11
    for name, right in native.items():
        assert np.isfinite(right).all()
        assert right.std() > 0.05 * abs(right).max(), "numbers that say something"
        np.testing.assert_allclose(found[name], right, rtol=0, atol=TOLERANCE * abs(right).max(), err_msg=name)


def test_portable_kernels_without_openmp_give_the_native_numbers(tmp_path, native):
    features, found = outputs(tmp_path, str(build.compiler()), "-DR1_PORTABLE")
    assert features == ""
    demand_same(found, native)


@pytest.mark.slow
@needs("x86-64")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("-march=x86-64",), ""),
        (("-march=x86-64-v2",), ""),
        (("-march=sandybridge", "-fopenmp"), "AVX OpenMP"),
        (("-march=x86-64-v3", "-fopenmp"), "AVX FMA OpenMP"),
    ],
)
def test_kernels_of_x86_levels_give_the_native_numbers(tmp_path, native, flags, expected):
    features, found = outputs(tmp_path, str(build.compiler()), *flags)
    assert features == expected
    demand_same(found, native)


@pytest.mark.slow
@needs("arm64 emulation")
@pytest.mark.parametrize(("flags", "expected"), [((), "NEON OpenMP"), (("-DR1_PORTABLE",), "OpenMP")])
def test_arm64_kernels_under_emulation_give_the_native_numbers(tmp_path, native, flags, expected):
    features, found = outputs(tmp_path, ARM_COMPILER, "-fopenmp", "-static", *flags, runner=(ARM_RUNNER,))
    assert features == expected
    demand_same(found, native)


REFUSING = """for word in "$@"; do
  case "$word" in {refused}) echo "unsupported option '$word'" >&2; exit 1;; esac
done
exec {real} "$@"
"""
SOURCE = """extern "C" const char *kernel_features() {
#ifdef _OPENMP
    return "OpenMP";
#else
    return "";
#endif
}
"""


@pytest.mark.parametrize(
    ("refused", "flags", "features"),
    [
        pytest.param("-none", ["-march=native", "-fopenmp"], ["OpenMP"], id="all"),
        pytest.param("-fopenmp", ["-march=native"], [], id="no OpenMP"),
        pytest.param("-m*=native", ["-fopenmp"], ["OpenMP"], id="no tuning"),
    ],
)
def test_build_leaves_out_flags_that_the_compiler_lacks(tmp_path, monkeypatch, refused, flags, features):
    fresh_cache(monkeypatch, tmp_path, REFUSING.format(refused=refused, real=build.compiler()))
    (tmp_path / "one.cpp").write_text(SOURCE, encoding="ascii")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    try:
        assert build.features() == features
        assert build._accepted_flags(str(build.compiler())) == flags
        finding = _compiler()
    finally:
        build.built.cache_clear()
    assert finding.state == ("ok" if features else "warn")
    assert ("without OpenMP on one thread" in finding.found) == (not features)
