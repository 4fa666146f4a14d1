"""The Python versions that the package names are those that docs/versions.md has runs for."""

import re
from pathlib import Path

import pytest

from benchmarks.gpu.pack import read_pins
from tests.support import matrix

ROOT = Path(__file__).resolve().parents[2]
CLASSIFIERS = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()))


def rows() -> dict[str, dict[str, str]]:
    lines = matrix.PAGE.read_text().split(matrix.BEGIN)[1].split(matrix.END)[0].splitlines()
    names, _, *table = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(names, row)) for row in table}


@pytest.mark.parametrize("python", sorted(CLASSIFIERS))
def test_a_python_version_that_is_claimed_has_been_run(python):
    reference = f"torch {matrix.REFERENCE['torch']}"
    row = rows()[reference if python == matrix.REFERENCE["python"] else f"Python {python}"]
    for case in matrix.SHORT:
        assert re.fullmatch(r"cpu|0|\de-07|loss 0\.\d\d", row[matrix.CASES[case]]), case


def test_ci_runs_the_python_versions_that_are_claimed():
    (line,) = re.findall(r"^ +python: \[(.*)\]$", (ROOT / ".github/workflows/test.yml").read_text(), re.M)
    assert set(re.findall(r"[\d.]+", line)) == CLASSIFIERS


@pytest.mark.parametrize("python", sorted(CLASSIFIERS))
def test_every_python_version_has_a_pin_for_each_package(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0] for line in lines if not line.startswith("#")}
    assert set(read_pins(python)) == names


def test_the_matrix_passes_by_a_launcher_that_starts_no_python(tmp_path, monkeypatch):
    for folder, status in (("launchers", 127), ("real", 0)):
        (tmp_path / folder).mkdir()
        launcher = tmp_path / folder / "python3.99"
        launcher.write_text(f"#!/bin/sh\nexit {status}\n")
        launcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'launchers'}:{tmp_path / 'real'}")
    assert matrix.find_python("3.99") == str(tmp_path / "real" / "python3.99")
    with pytest.raises(SystemExit, match=r"^PATH: expected python3\.98, got none that runs; install it"):
        matrix.find_python("3.98")
