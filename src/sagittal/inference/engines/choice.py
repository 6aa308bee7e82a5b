"""Which engine computes: OpenVINO on a CPU where it is installed and knows the network, else PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from sagittal.bundle import Bundle
from sagittal.errors import PlanError, ResourceError, did_you_mean
from sagittal.inference.engines.engine import Engine, KernelMode, Precision
from sagittal.inference.engines.sharing import SharedEngine, threads_each

EngineName = Literal["auto", "torch", "openvino"]
ENGINES: tuple[EngineName, ...] = ("auto", "torch", "openvino")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_HALVES: tuple[Precision, ...] = ("bf16", "fp16")
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
        precision: `fp32`; `bf16` by OpenVINO on a CPU and by PyTorch on CUDA, `fp16` by PyTorch on CUDA, `int8` by
            OpenVINO.
        cache_folder: where OpenVINO keeps compiled networks for the next process, or None.
        threads: of a CPU; PyTorch has one number for its whole process. None is one per core. Several
            devices share them.

    Raises:
        BundleError: the weights do not fit the plan.
        PlanError: an unknown engine or precision, or one that does not go with the other or with the device.
        ResourceError: no such device, or an engine that is not installed or can't do what is asked.
    """
    devices = [part.strip() for part in str(device).split(",") if part.strip()]
    require_sensible(engine, precision, devices)
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


def torch_hint(bundles: Sequence[Bundle], engine: str, precision: str, computes: str) -> str | None:
    """Return what to try where PyTorch is likely to be faster than what was taken by itself; it is not imported.

    With the compiled kernels it was 1.5 times faster for MedNeXt-B in fp32 at 128^3 (k = 3 and 5, two cores).

    Args:
        bundles: what is predicted with.
        engine, precision: as asked for.
        computes: what will compute, see `ensemble.engines_named`.
    """
    left_to_us = engine == "auto" and precision == "fp32" and computes == "openvino fp32"
    if not left_to_us or any(bundle.plan.network.kind != "mednext" for bundle in bundles):
        return None
    if not _is_installed("torch") or not _kernels_are_built():
        return None
    return "hint: for MedNeXt in fp32, --engine torch may be faster (1.5 times where it was measured)"


def _kernels_are_built() -> bool:
    found = find_spec("sagittal.kernels")
    places = found.submodule_search_locations if found is not None else None
    return any((Path(place) / f"_cpu{end}").is_file() for place in places or () for end in EXTENSION_SUFFIXES)


def _is_on_cpu(device: str) -> bool:
    return str(device).lower() == "cpu" or (str(device).lower() == "auto" and not _torch_finds_accelerator())


def require_sensible(engine: str, precision: str, devices: Sequence[str] = ()) -> None:
    """Refuse names that nobody knows, and a precision that the engine never has, or not on one of these devices.

    Raises:
        PlanError: the one or the other.
    """
    if engine not in ENGINES:
        raise PlanError(f"engine '{engine}' is unknown.{did_you_mean(engine, ENGINES)}", code="engine")
    if precision not in PRECISIONS:
        raise PlanError(f"precision '{precision}' is unknown.{did_you_mean(precision, PRECISIONS)}", code="precision")
    if engine == "torch" and precision == "int8":
        raise PlanError(
            "engine 'torch' computes in fp32, and on CUDA devices in bf16 and fp16; precision int8 is OpenVINO's. "
            "Leave one of the two out.",
            code="precision",
        )
    if engine == "openvino" and precision == "fp16":
        raise PlanError(
            "engine 'openvino' computes in fp32, bf16 and int8; precision fp16 is PyTorch's, on CUDA devices. Use "
            "--precision bf16, or leave the engine out.",
            code="precision",
        )
    if precision == "fp16" or (engine == "torch" and precision in _HALVES):
        for device in devices:
            _require_cuda(device, precision)


def _require_cuda(device: str, precision: str) -> None:
    kind = str(device).lower().partition(":")[0]
    if kind == "auto" and _is_on_cpu(device):
        kind = "cpu"
    if kind not in ("cpu", "mps"):
        return  # what is no device at all is told where it is looked for
    instead = "OpenVINO has bf16 on CPUs (--engine openvino --precision bf16); or use" if kind == "cpu" else "Use"
    raise PlanError(
        f"PyTorch computes in {precision} on CUDA devices only, and device '{device}' is none here. {instead} "
        "--precision fp32.",
        code="precision",
    )


def _load_torch(
    bundle: Bundle, device: str, precision: str, why_not_openvino: str | None, threads: int | None
) -> Engine:
    if not _is_installed("torch"):
        reason = "" if why_not_openvino is None else f" OpenVINO can't be used: {why_not_openvino}."
        raise ResourceError(f"PyTorch is not installed, and it has to compute here.{reason} {_INSTALL}", code="engine")
    reason = "" if why_not_openvino is None else f" OpenVINO can't be used: {why_not_openvino}."
    if precision == "int8":
        raise ResourceError(
            f"precision {precision} is computed by OpenVINO on a CPU only.{reason} Use --precision fp32.",
            code="precision",
        )
    if precision in _HALVES and _is_on_cpu(device):
        raise ResourceError(
            f"precision {precision} is computed by OpenVINO on a CPU, and by PyTorch on CUDA devices.{reason} Use "
            "--precision fp32.",
            code="precision",
        )
    from sagittal.inference.engines import torch_engine

    return torch_engine.load(bundle, device, precision=_precision(precision), threads=threads)


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
