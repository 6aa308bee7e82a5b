from __future__ import annotations

import pytest

import sagittal
from sagittal.cli.missing import lacking_package
from sagittal.errors import ResourceError


@pytest.mark.parametrize(
    ("module", "verb", "message"),
    [
        ("torch", "train", "training needs PyTorch, which is not installed: pip install 'sagittal[torch]'. Prediction"),
        ("torch", "networks", "sagittal networks needs PyTorch"),
        ("openvino", "predict", "this prediction needs OpenVINO, which is not installed: pip install 'sagittal[openv"),
        ("onnxscript", "export", "sagittal export needs ONNX Script, which is not installed"),
    ],
)
def test_a_package_of_an_extra_is_told_with_the_command_that_installs_it(module: str, verb: str, message: str) -> None:
    error = lacking_package(ModuleNotFoundError(name=module), verb)
    assert error is not None and error.code == "missing_package"
    assert error.message.startswith(message)


@pytest.mark.parametrize("module", [None, "torch.nn.novelty", "sagittal.nonsense", "numpy"])
def test_other_failures_of_imports_stay_what_they_are(module: str | None) -> None:
    assert lacking_package(ImportError("no", name=module), "train") is None


def test_public_names_tell_what_to_install_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(module: str) -> object:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.delitem(vars(sagittal), "train", raising=False)
    monkeypatch.setattr(sagittal, "import_module", hide)
    with pytest.raises(
        ResourceError, match=r"sagittal\.train needs PyTorch, .*pip install 'sagittal\[torch\]'"
    ) as caught:
        sagittal.train  # noqa: B018 - looking it up loads it
    assert caught.value.code == "missing_package"

    def fail(module: str) -> object:
        raise ImportError("our own mistake", name="sagittal.training.run")

    monkeypatch.setattr(sagittal, "import_module", fail)
    with pytest.raises(ImportError, match="our own mistake"):
        sagittal.train  # noqa: B018
