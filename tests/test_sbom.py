"""The bill of materials: what the service needs at run time, nothing for development, no path of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "sbom.py"

pytestmark = pytest.mark.slow


def test_the_bill_names_what_the_service_needs_and_no_path(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx_py", reason="the bill is made by cyclonedx-bom")
    out = tmp_path / "sbom.json"
    subprocess.run([sys.executable, SCRIPT, "--extras", "serve", "--out", out], check=True, capture_output=True)
    text = out.read_text()
    found = json.loads(text)
    assert found["bomFormat"] == "CycloneDX"
    names = [component["name"].lower() for component in found["components"]]
    assert {"sagittal", "fastapi", "uvicorn", "pydicom", "numpy", "niivue"} <= set(names)
    assert not {"pytest", "mypy", "torch", "openvino", "schemathesis"} & set(names) and len(set(names)) == len(names)
    assert all(component.get("version") for component in found["components"])
    assert str(Path.home()) not in text and str(SCRIPT.parents[1]) not in text
    assert {each["ref"] for each in found["dependencies"]} <= {each["bom-ref"] for each in found["components"]}
