"""`sagittal export` and `sagittal package` as a user types them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from sagittal.cli import run
from sagittal.export.description import ExportedModel
from sagittal.testing.bundle import write_untrained_bundle

TINY = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "patch.size": [16, 20, 24],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_untrained_bundle(tmp_path / "bundle", "segformer3d", 3, settings=TINY)


def test_a_package_is_made_shown_used_and_unpacked(
    bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "model.sagittal"
    assert run(["package", str(bundle), "--out", str(package)]) == 0
    assert f"package: {package} (" in capsys.readouterr().out
    assert run(["info", str(package)]) == 0
    assert "verified against manifest.json" in capsys.readouterr().out
    scan = next(iter(sorted((tiny_dataset / "imagesTs").iterdir())))
    for model, out in ((bundle, "a"), (package, "b")):
        assert run(["predict", str(model), str(scan), "--out", str(tmp_path / out), "--device", "cpu"]) == 0
    labels = [next((tmp_path / out).glob("*.nii.gz")).read_bytes() for out in "ab"]
    assert labels[0] == labels[1]
    assert run(["package", str(package), "--unpack", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in bundle.iterdir()}


def test_damaged_packages_and_wrong_use_are_explained(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "model.sagittal"
    assert run(["package", str(bundle), "--out", str(package)]) == 0
    package.write_bytes(package.read_bytes().replace(b"untrained", b"untrainEd"))
    for command in (["info", str(package)], ["package", str(package), "--unpack", str(tmp_path / "again")]):
        assert run(command) == 1
        assert "changed since it was written" in capsys.readouterr().err
    assert run(["package", str(bundle)]) == 2
    assert "either --out FILE.sagittal or --unpack FOLDER" in capsys.readouterr().err


def test_a_bundle_is_exported(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(bundle), "--format", "openvino", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("all.xml: any D, H, W, ") and f"exported: {tmp_path / 'out'}" in told
    assert run(["export", str(bundle), "--format", "onx", "--out", str(tmp_path / "b")]) == 1
    assert "Did you mean 'onnx'?" in capsys.readouterr().err


def fields_of(model: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    for name, field in model.model_fields.items():
        names.add(name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names |= fields_of(kind)
    return names


def test_the_docs_explain_every_field_of_model_json() -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text))))
    expected = fields_of(ExportedModel) | {"lower", "upper", "mean", "std", "nonzero_only"}
    assert expected - {"size_bytes", "sha256"} <= words | {"name"}


def test_8_bit_networks_are_not_made_beside_a_package(
    bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "model.sagittal"
    assert run(["package", str(bundle), "--out", str(package)]) == 0
    assert run(["quantize", str(package), str(tiny_dataset)]) == 1
    assert "--unpack FOLDER" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.int8")] == []
