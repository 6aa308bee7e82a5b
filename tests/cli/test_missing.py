from __future__ import annotations

import pytest

from sagittal.cli.missing import lacking_package


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
