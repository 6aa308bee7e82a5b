from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution
from pathlib import Path

import numpy as np
import pytest

import sagittal
from sagittal.bundle import read_bundle, write_bundle
from sagittal.bundle.package import pack
from sagittal.cli import offline_folder, own_wheel, run, wheels
from sagittal.cli.offline_folder import make_offline_folder
from sagittal.cli.own_wheel import write_own_wheel
from sagittal.cli.wheels import collect, installed_versions, machine, missing_requirements
from sagittal.errors import BundleError, PlanError, ResourceError
from sagittal.testing.plans import untrained_plan, untrained_spec

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
WINDOWS = machine("windows", "3.12")


def metadata(project: Path = PROJECT) -> str:
    """What an installer makes of pyproject.toml."""
    declared = tomllib.loads(project.read_text())["project"]
    lines = ["Metadata-Version: 2.4", "Name: sagittal", f"Version: {declared['version']}"]
    lines += [f"Requires-Dist: {line}" for line in declared["dependencies"]]
    for extra, requirements in declared["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {_for(extra, line)}" for line in requirements)]
    return "\n".join(lines) + "\n"


def _for(extra: str, requirement: str) -> str:
    """Return a requirement that counts with an extra only; it may have a condition of its own."""
    joined = " and" if ";" in requirement else ";"
    return f'{requirement}{joined} extra == "{extra}"'


def install(folder: Path, text: str) -> PathDistribution:
    """Return the metadata of a package as it stands in an environment."""
    info = folder / "sagittal-0.1.0.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text("[console_scripts]\nsagittal = sagittal.cli:main\n")
    (info / "licenses" / "LICENSE").write_text("the licence")
    (info / "RECORD").write_text("sagittal-0.1.0.dist-info/METADATA,,\nsagittal-0.1.0.dist-info/licenses/LICENSE,,\n")
    return PathDistribution(info)


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this checkout had just been installed: the developer's environment may be older."""
    found = install(tmp_path / "site-packages", metadata())
    monkeypatch.setattr(own_wheel, "distribution", lambda name: found)


def fake_wheel(folder: Path, name: str, *requires: str, version: str = "1") -> Path:
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [
        f"Provides-Extra: {line.rpartition('extra == ')[2].strip(chr(34))}" for line in requires if "extra" in line
    ]
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)])
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", text + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_the_wheel_holds_what_is_installed_and_its_record_is_right(tmp_path: Path) -> None:
    path = write_own_wheel(tmp_path, compiled=False)
    assert path.name == "sagittal-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        content = {name: archive.read(name) for name in names}
    own = Path(sagittal.__file__).parent
    modules = {path.relative_to(own.parent).as_posix() for path in own.rglob("*.py")}
    assert modules <= set(names) and "sagittal/py.typed" in names
    assert any(name.startswith("sagittal/report/templates/") for name in names)
    assert not [name for name in names if name.endswith((".c", ".h", ".so", ".pyc"))]
    assert content["sagittal-0.1.0.dist-info/METADATA"].decode() == metadata()
    assert b"Root-Is-Purelib: true\nTag: py3-none-any\n" in content["sagittal-0.1.0.dist-info/WHEEL"]
    assert content["sagittal-0.1.0.dist-info/licenses/LICENSE"] == b"the licence"
    record = [line.split(",") for line in content["sagittal-0.1.0.dist-info/RECORD"].decode().splitlines()]
    assert sorted(line[0] for line in record) == sorted(names)
    for name, digest, size in record[:-1]:
        expected = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(content[name]))


def test_compiled_kernels_go_only_to_a_machine_like_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "sagittal"
    root.mkdir()
    suffix = own_wheel.EXTENSION_SUFFIXES[0]
    for name in ("__init__.py", f"_cpu{suffix}", "_cpu.c", "_cpu.cpython-39-other.so"):
        (root / name).write_bytes(b"")
    monkeypatch.setattr(sagittal, "__file__", str(root / "__init__.py"))
    path = write_own_wheel(tmp_path, compiled=True)
    assert path.name.startswith(f"sagittal-0.1.0-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-")
    with zipfile.ZipFile(path) as archive:
        assert [name for name in archive.namelist() if "_cpu" in name] == [f"sagittal/_cpu{suffix}"]
        assert b"Root-Is-Purelib: false" in archive.read("sagittal-0.1.0.dist-info/WHEEL")
    (root / f"_cpu{suffix}").unlink()
    assert write_own_wheel(tmp_path, compiled=True).name.endswith("py3-none-any.whl")


def test_metadata_of_another_state_of_the_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = install(tmp_path / "old", metadata().replace("Requires-Dist: scipy>=1.11\n", ""))
    monkeypatch.setattr(own_wheel, "distribution", lambda name: old)
    with pytest.raises(ResourceError, match=r"pyproject.toml: names other dependencies.*pip install -e"):
        write_own_wheel(tmp_path, compiled=False)

    def absent(name: str) -> Distribution:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(own_wheel, "distribution", absent)
    with pytest.raises(ResourceError, match="sagittal is not installed here"):
        write_own_wheel(tmp_path, compiled=False)


def test_what_another_machine_needs_is_found_however_indirectly(tmp_path: Path) -> None:
    fake_wheel(tmp_path, "sagittal", "one>=1", 'three[fast]>=3; extra == "more"', 'torch; extra == "torch"')
    assert missing_requirements(tmp_path, [], WINDOWS.environment) == ["one>=1"]
    assert missing_requirements(tmp_path, ["more"], WINDOWS.environment) == ["one>=1", "three[fast]>=3"]
    fake_wheel(tmp_path, "one", 'colour==2; sys_platform == "win32"', 'old-python; python_version < "3.12"')
    fake_wheel(tmp_path, "three", 'quick; extra == "fast"', 'slow; extra == "other"', "one", "sagittal")
    assert missing_requirements(tmp_path, ["more"], WINDOWS.environment) == ["colour==2", "quick"]
    assert missing_requirements(tmp_path, ["more"], machine("macos", "3.11").environment) == ["old-python", "quick"]
    (tmp_path / "broken-1-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(ResourceError, match=r"broken-1-py3-none-any.whl: not a wheel"):
        missing_requirements(tmp_path, [], WINDOWS.environment)


def pip_that_finds(folder: Path, wanted: dict[str, tuple[str, ...]]) -> tuple[Callable[[Sequence[str]], None], list]:
    calls: list[Sequence[str]] = []

    def pip(arguments: Sequence[str]) -> None:
        calls.append(arguments)
        for name, requires in wanted.items():
            if any(argument.startswith(name) for argument in arguments):
                fake_wheel(folder, name, *requires)

    return pip, calls


def test_wheels_for_another_machine_are_fetched_until_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fake_wheel(tmp_path, "sagittal", "one>=1")
    pip, calls = pip_that_finds(tmp_path, {"one": ('colour; sys_platform == "win32"',), "colour": ()})
    monkeypatch.setattr(wheels, "_pip", pip)
    collect(tmp_path, own, [], WINDOWS, ["one==1"])
    assert [call[-1] for call in calls] == ["one>=1", "colour"]
    assert {"download", "win_amd64", "3.12", "--only-binary=:all:"} <= set(calls[0])
    assert sorted(path.name.partition("-")[0] for path in tmp_path.glob("*.whl")) == ["colour", "one", "sagittal"]
    assert not (tmp_path / ".constraints.txt").exists()


def test_a_pip_that_fetches_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake_wheel(tmp_path, "sagittal", "one>=1")
    monkeypatch.setattr(wheels, "_pip", lambda arguments: None)
    with pytest.raises(ResourceError, match=r"pip does not get one>=1"):
        collect(tmp_path, own, [], WINDOWS, [])


def test_pip_itself_is_asked_for_a_machine_like_this_and_what_it_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    own = fake_wheel(links, "sagittal", 'plain; extra == "more"')
    fake_wheel(links, "plain")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    target = tmp_path / "wheels"
    target.mkdir()
    (target / own.name).write_bytes(own.read_bytes())
    with pytest.raises(ResourceError, match=r"pip can't get all wheels.*plain==7.*run this command on a machine"):
        collect(target, target / own.name, ["more"], machine(None, None), ["plain==7"])
    collect(target, target / own.name, ["more"], machine(None, None), ["plain==1"])
    assert sorted(path.name.partition("-")[0] for path in target.iterdir()) == ["plain", "sagittal"]


def test_a_python_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake_wheel(tmp_path, "sagittal")
    done = subprocess.CompletedProcess([], 1, "python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(ResourceError, match=r"has no pip.*ensurepip"):
        collect(tmp_path, own, [], machine(None, None), [])


def test_versions_are_those_installed_without_the_names_of_builds() -> None:
    versions = dict(line.split("==") for line in installed_versions())
    assert versions["numpy"] == np.__version__
    assert "sagittal" not in versions and not any("+" in version for version in versions.values())


@pytest.mark.parametrize("python", ["3.10", "3", "three", "3.12.1"])
def test_versions_of_python_that_make_no_sense_are_refused(python: str) -> None:
    with pytest.raises(PlanError, match=f"--python {python}: expected 3.11 or newer"):
        machine("linux", python)


def test_another_python_means_a_machine_of_this_kind_where_that_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"3.{sys.version_info.minor}"
    assert machine(None, None).tags == machine(None, own).tags == ()
    monkeypatch.setattr(wheels.this, "system", lambda: "Darwin")
    assert machine(None, "3.99") == machine("macos", "3.99")
    monkeypatch.setattr(wheels.this, "system", lambda: "Plan9")
    with pytest.raises(PlanError, match=r"--python 3.99 on Plan9: expected --platform"):
        machine(None, "3.99")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(32, 32, 32))
    weights = {"all": {"head.bias": np.zeros(3, np.float32)}}
    return write_bundle(tmp_path / "models" / "spleen", plan=plan, weights=weights, metrics={})


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that has one wheel for everything."""
    monkeypatch.setattr(offline_folder, "collect", lambda folder, *arguments: fake_wheel(folder, "numpy"))


@pytest.mark.usefixtures("pip")
def test_the_folder_says_what_is_in_it_and_notices_what_changed(bundle: Path, tmp_path: Path) -> None:
    package, folder = pack(bundle, tmp_path / "packed.sagittal"), tmp_path / "usb" / "sagittal"
    options = ["--bundle", str(bundle), "--bundle", str(package), "--platform", "windows", "--python", "3.12"]
    assert run(["offline", str(folder), *options]) == 0
    top = {"README.txt", "SHA256SUMS", "bundles", "install.bat", "install.sh", "verify.py", "wheels"}
    assert {path.name for path in folder.iterdir()} == top and [path.name for path in folder.parent.iterdir()] == [
        "sagittal"
    ]
    assert (
        read_bundle(folder / "bundles" / "spleen").manifest == read_bundle(folder / "bundles" / package.name).manifest
    )
    text = (folder / "README.txt").read_text()
    assert "sagittal[openvino]==0.1.0" in text and "Python 3.12" in text and "bundles/packed.sagittal" in text
    assert "@" not in text.replace("sagittal@", "")
    script = (folder / "install.bat").read_bytes()
    assert b"sagittal[openvino]==0.1.0" in script and script.count(b"\n") == script.count(b"\r\n")
    if shutil.which("sh"):
        subprocess.run(["sh", "-n", str(folder / "install.sh")], check=True)
    assert os.access(folder / "install.sh", os.X_OK)

    verify = [sys.executable, str(folder / "verify.py")]
    assert "every file is as it was made" in subprocess.run(verify, check=True, capture_output=True, text=True).stdout
    (folder / "README.txt").write_text("other")
    next((folder / "wheels").glob("numpy*")).unlink()
    done = subprocess.run(verify, capture_output=True, text=True)
    assert done.returncode == 1
    assert "README.txt: changed; wheels/numpy-1-py3-none-any.whl: missing. Copy the folder again." in done.stderr


@pytest.mark.usefixtures("pip")
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"extras": ["openvni"]}, PlanError, "--extra openvni: no such extra. Did you mean 'openvino'"),
        ({"platform": "linux", "python": "2.7"}, PlanError, "--python 2.7"),
        ({"bundles": ["models/absent"]}, BundleError, "absent: does not exist"),
        ({"bundles": ["models/spleen", "copy/spleen"]}, PlanError, "two bundles have one name"),
        ({"bundles": ["site-packages"]}, BundleError, "site-packages: holds no manifest.json"),
    ],
)
def test_what_cannot_go_along_is_refused_and_nothing_is_left(
    options: dict, kind: type[Exception], message: str, bundle: Path, tmp_path: Path
) -> None:
    given = {"bundles": [], "extras": [], "platform": None, "python": None, **options}
    given["bundles"] = [tmp_path / name for name in given["bundles"]]
    before = set(tmp_path.iterdir())
    with pytest.raises(kind, match=message):
        make_offline_folder(tmp_path / "folder", say=lambda line: None, **given)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("pip")
def test_a_folder_that_holds_something_is_left_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResourceError, match="exists and is not empty"):
        make_offline_folder(bundle, bundles=[], extras=[], platform=None, python=None, say=lambda line: None)
    assert read_bundle(bundle).weight_names == ("all",)
    (tmp_path / "empty").mkdir()
    made = make_offline_folder(
        tmp_path / "empty", bundles=[], extras=[], platform=None, python=None, say=lambda line: None
    )
    assert made.wheels == 2 and made.how == "sh install.sh"
    sums = (tmp_path / "empty" / "SHA256SUMS").read_text().splitlines()
    assert made.size == sum((tmp_path / "empty" / line.split("  ")[1]).stat().st_size for line in sums)
    assert json.dumps(sums).count("wheels/") == 2
