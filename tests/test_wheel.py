"""What an installed package has is what the sources have: pages, templates, kernels in C, the mark of types.

Python files come by themselves; others only where pyproject.toml or setup.py names them, and a checkout never misses
them. The packages are gathered as for a wheel, without compiling.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"


def of_the_package() -> set[str]:
    files = (path for path in (SOURCES / "sagittal").rglob("*") if path.is_file())
    made = {".so", ".pyd", ".pyc"}
    return {path.relative_to(SOURCES).as_posix() for path in files if path.suffix not in made}


def test_a_wheel_and_a_source_archive_have_every_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is where packages are built")
    # Beside the checkout, so that what an earlier build left there is neither read nor changed.
    command = [
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gathered = {
        path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*") if path.is_file()
    }
    expected = of_the_package()
    assert {"sagittal/serve/page/page.js", "sagittal/serve/page/NIIVUE_LICENSE.txt", "sagittal/py.typed"} <= expected
    assert gathered == expected
    listed = set((tmp_path / "sagittal.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").split())
    assert {f"src/{name}" for name in expected} | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= listed
