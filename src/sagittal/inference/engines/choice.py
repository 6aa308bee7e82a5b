"""Which engine computes: OpenVINO on a CPU where it is installed and knows the network, else PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sagittal.bundle import Bundle
from sagittal.errors import PlanError, ResourceError, did_you_mean
from sagittal.inference.engines.engine import Engine, KernelMode, Precision
from sagittal.inference.engines.sharing import SharedEngine, threads_each

EngineName = Literal["auto", "torch", "openvino"]
ENGINES: tuple[EngineName, ...] = ("auto", "torch", "openvino")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_INSTALL = "pip install 'sagittal[openvino]' (CPU) or 'sagittal[torch]' (CPU, CUDA, MPS)"


def load_engine(
    bundle: Bundle,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "fp32",
    *,
    cache_folder: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> Engine:
    """Return what computes a bundle's networks; `name` and `device` of it tell what was chosen.

    Args:
        bundle: verified.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; several of them with commas share each scan.
        engine: `torch`, `openvino`, or `auto`: OpenVINO on a CPU where it is installed and knows the network.
        precision: `fp32`, `bf16` or `int8`; PyTorch computes in fp32 only.
        cache_folder: where OpenVINO keeps compiled networks for the next process, or None.
        threads: of a CPU; PyTorch has one number for its whole process. None is one per core. Several
            devices share them.

    Raises:
        BundleError: the weights do not fit the plan.
        PlanError: an unknown engine or precision.
        ResourceError: no such device, or an engine that is not installed or can't do what is asked.
    """
    require_sensible(engine, precision)
    devices = [part.strip() for part in str(device).split(",") if part.strip()]
    if len(devices) > 1:
        share = threads_each(len(devices), threads)
        return SharedEngine(
            [load_engine(bundle, each, engine, precision, cache_folder=cache_folder, threads=share) for each in devices]
        )
    why_not = _why_not_openvino(bundle, _is_on_cpu(device))
    if engine == "openvino" and why_not is not None:
        raise ResourceError(f"engine 'openvino' can't be used: {why_not}.", code="engine")
    if engine != "torch" and why_not is None:
        if precision == "int8":
            from sagittal.inference.engines import openvino_int8

            return openvino_int8.load(bundle, threads=threads)
        from sagittal.inference.engines import openvino_engine

        return openvino_engine.load(bundle, precision=_precision(precision), cache_folder=cache_folder, threads=threads)
    return _load_torch(bundle, device, precision, why_not, threads)


def engine_named(bundle: Bundle, device: str = "auto", engine: str = "auto") -> Literal["torch", "openvino"]:
    """Return which engine `load_engine` takes, or refuses to, where it is asked for the same."""
    if engine == "openvino":
        return "openvino"
    return "torch" if engine == "torch" or _why_not_openvino(bundle, _is_on_cpu(device)) is not None else "openvino"


def _is_on_cpu(device: str) -> bool:
    return str(device).lower() == "cpu" or (str(device).lower() == "auto" and not _torch_finds_accelerator())


def require_sensible(engine: str, precision: str) -> None:
    """Refuse names that nobody knows, and a precision that the engine never has.

    Raises:
        PlanError: the one or the other.
    """
    if engine not in ENGINES:
        raise PlanError(f"engine '{engine}' is unknown.{did_you_mean(engine, ENGINES)}", code="engine")
    if precision not in PRECISIONS:
        raise PlanError(f"precision '{precision}' is unknown.{did_you_mean(precision, PRECISIONS)}", code="precision")
    if engine == "torch" and precision != "fp32":
        raise PlanError(
            f"engine 'torch' computes in fp32 only; precision {precision} is OpenVINO's. Leave one of the two out.",
            code="precision",
        )


def _load_torch(
    bundle: Bundle, device: str, precision: str, why_not_openvino: str | None, threads: int | None
) -> Engine:
    if not _is_installed("torch"):
        reason = "" if why_not_openvino is None else f" OpenVINO can't be used: {why_not_openvino}."
        raise ResourceError(f"PyTorch is not installed, and it has to compute here.{reason} {_INSTALL}", code="engine")
    if precision != "fp32":
        reason = "" if why_not_openvino is None else f" OpenVINO can't be used: {why_not_openvino}."
        raise ResourceError(
            f"precision {precision} is computed by OpenVINO on a CPU only.{reason} Use --precision fp32.",
            code="precision",
        )
    from sagittal.inference.engines import torch_engine

    return torch_engine.load(bundle, device, threads=threads)


def _why_not_openvino(bundle: Bundle, on_cpu: bool) -> str | None:
    """Return why OpenVINO can't compute here, or None where it can."""
    if not on_cpu:
        return "it is for CPUs, and another device is used"
    if not _is_installed("openvino"):
        return f"it is not installed; {_INSTALL}"
    try:
        from sagittal.inference.engines import openvino_engine
    except ImportError as error:
        return f"it can't be imported ({error})"
    return openvino_engine.supports(bundle.plan)


def _torch_finds_accelerator() -> bool:
    """Return whether PyTorch is there and sees a GPU; a build without CUDA is not imported to be asked."""
    if not _is_installed("torch"):
        return False
    try:
        if metadata.version("torch").endswith("+cpu"):
            return False
    except metadata.PackageNotFoundError:
        return False
    from sagittal.inference.device import resolve_device

    return resolve_device("auto").type != "cpu"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        # Hidden by `sys.modules[package] = None`, as tests do.
        return False


def _precision(name: str) -> Precision:
    return next(known for known in PRECISIONS if known == name)


@contextmanager
def kernels_switched(mode: KernelMode | None, known: Path | None) -> Iterator[None]:
    """Set the kernels' switch while the block runs; None where PyTorch computes nothing, and is not loaded for it.

    Args:
        mode: the position, or None.
        known: file that keeps what was timed on this machine, or None.
    """
    if mode is None:
        yield
        return
    from sagittal.kernels.choice import use_kernels

    with use_kernels(mode, known):
        yield
