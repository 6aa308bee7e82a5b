"""Write a bundle for other people's software: one graph per set of weights, model.json, a reader, the model card.

The folder appears whole or not at all, and only after every graph gave, on a window of noise, what the bundle's own
network gives; a graph of open sizes also on two images of another size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, resources
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from sagittal.bundle import Bundle, read_bundle
from sagittal.bundle.manifest import MODEL_CARD, FileEntry
from sagittal.errors import PlanError, ResourceError, did_you_mean
from sagittal.export.description import FILE, ExportedModel, Format, Network, describe, require_volumes
from sagittal.export.torch_graph import Run, export_program, network_of, runner
from sagittal.plan import Plan
from sagittal.plan.base import Triple, cannot_write

Sizes = Literal["open", "fixed"]
Say = Callable[[str], None]

READER, POST_PROCESS = "read_model.py", "post_process.py"
TOLERANCE = 1e-4
"""Largest difference of a graph's logits from the network's, as a share of the largest logit."""
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch": ()}
_ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
_OTHER_SIZE = (41, 57, 35)
_PART = ".part"
_ONNX_PARTS = (
    "import nibabel, numpy as np, onnxruntime, scipy.ndimage as ndimage\n",
    "onnxruntime.InferenceSession(file)",
    'network.run(["logits"], {"image": np.flip(padded[place], axes)[None].copy()})[0][0]',
)
_READER_PARTS = {
    "onnx": _ONNX_PARTS,
    "openvino": (
        # OpenVINO tells its maker of every import, and what reads scans tells nobody anything.
        'sys.modules["openvino_telemetry"] = None  # or every import is told to the maker of OpenVINO\n'
        "import nibabel, numpy as np, openvino, scipy.ndimage as ndimage\n",
        'openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        "network(np.flip(padded[place], axes)[None].copy())[0][0]",
    ),
    "torch": (
        "import nibabel, numpy as np, scipy.ndimage as ndimage, torch\n",
        "torch.export.load(file).module()",
        "network(torch.from_numpy(np.flip(padded[place], axes)[None].copy())).detach().numpy()[0]",
    ),
}
"""What of the reader depends on the runtime: an import, how a graph is loaded, and how it is run on one window."""
_LAST_LINE = "    return type(scans[0])("
_POST_PROCESSING = """    from post_process import post_process
    labels = post_process(labels, MODEL["post_processing"], float(np.prod(spacing)) / 1000)
"""


def export_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    runtime: str,
    out: str | os.PathLike[str],
    *,
    say: Say | None = None,
) -> ExportedModel:
    """Write the networks of a bundle as graphs of `runtime` to the folder `out`, with model.json and a reader.

    Sizes are left open where the network allows it, else fixed to one window of the plan.

    Args:
        bundle: the folder that `sagittal train` wrote, or a package.
        runtime: `onnx`, `openvino` or `torch`.
        out: a folder that does not exist yet, or an empty one.
        say: told what was made, in one line per network.

    Returns:
        What model.json says.

    Raises:
        BundleError: the bundle is damaged.
        PlanError: an unknown runtime, a network of slices, one that can't be exported, or one whose graph gives
            something else.
        ResourceError: the folder holds something or can't be written, or a package is missing.
    """
    checked = _checked_format(runtime)
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    require_volumes(bundle.plan)
    target = Path(out)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ResourceError(
            f"{target}: exists and is no empty folder. Choose another one; nothing was overwritten.", code="exists"
        )
    room: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_PART))
        model = _fill(room, bundle, checked, say or (lambda line: None))
        room.chmod(0o755)
        if target.exists():
            target.rmdir()
        room.rename(target)
    except OSError as error:
        full = "disk_full" if error.errno == errno.ENOSPC else None
        raise cannot_write(target, error, code=full) from None
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
    return model


def reader_text(runtime: Format, *, post_processing: bool) -> str:
    """Return the program that predicts with an exported model, for one runtime, with or without rules afterwards."""
    changes = dict(zip(_ONNX_PARTS, _READER_PARTS[runtime], strict=True))
    if post_processing:
        changes[_LAST_LINE] = _POST_PROCESSING + _LAST_LINE
    text = _template(READER)
    for line, instead in changes.items():
        assert text.count(line) == 1, f"{READER} lacks {line!r}"
        text = text.replace(line, instead)
    return text


def _fill(folder: Path, bundle: Bundle, runtime: Format, say: Say) -> ExportedModel:
    networks: list[Network] = []
    for name in bundle.weight_names:
        # All have the same graph: what the first could not leave open, the others need not try.
        tried: tuple[Sizes, ...] = (networks[0].sizes,) if networks else ("open", "fixed")
        networks.append(_write_network(folder, bundle, name, runtime, tried))
        say(_told(networks[-1], bundle.plan.patch.size))
    text = reader_text(runtime, post_processing=bool(bundle.plan.postprocessing))
    (folder / READER).write_text(text, encoding="utf-8")
    if bundle.plan.postprocessing:
        (folder / POST_PROCESS).write_text(_template(POST_PROCESS), encoding="utf-8")
    shutil.copyfile(bundle.path / MODEL_CARD, folder / MODEL_CARD)
    model = describe(
        bundle.plan,
        runtime=runtime,
        networks=tuple(networks),
        files={path.name: _entry(path) for path in sorted(folder.iterdir())},
        bundle_sha256=bundle.manifest.manifest_sha256,
        sagittal_version=_own_version(),
    )
    model.write(folder / FILE)
    return model


def _told(network: Network, window: Triple) -> str:
    at, difference = sized(window), f"{network.largest_difference:.1e} from the bundle's network"
    if network.sizes == "open":
        return f"{network.file}: any D, H, W, {difference} at {at} and at 2 images of {sized(other_size(window))}"
    return f"{network.file}: D, H, W {at} alone, {difference}"


def _write_network(folder: Path, bundle: Bundle, name: str, runtime: Format, tried: tuple[Sizes, ...]) -> Network:
    """Write one network, in the first of the forms `tried` that gives what the bundle's network gives."""
    network, path = network_of(bundle, name), folder / f"{name}{_ENDINGS[runtime]}"
    for sizes in tried:
        try:
            run = _written(path, bundle, name, network, runtime, sizes)
            difference = max(_difference(run, network, shape, name) for shape in _shapes(bundle.plan, sizes))
        except (PlanError, RuntimeError, AssertionError):
            # A size that torch.export could not leave open shows when it is traced or when it is run.
            if sizes == tried[-1]:
                raise
            continue
        return Network(name=name, file=path.name, sizes=sizes, largest_difference=difference)
    raise AssertionError("there is a form to try")


def _shapes(plan: Plan, sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """Yield the shapes (N, C, D, H, W) that a graph is checked at."""
    channels = len(plan.dataset.channel_names)
    yield (1, channels, *plan.patch.size)
    if sizes == "open":
        yield (2, channels, *other_size(plan.patch.size))


def other_size(window: Triple) -> Triple:
    """Return the second size that a graph of open sizes is checked at: no axis is as long as the window's.

    All are odd, so that every stage of a network rounds, and longer than a graph's least (`export_program`).
    """
    d, h, w = (size + 2 if size == own else size for size, own in zip(_OTHER_SIZE, window, strict=True))
    return d, h, w


def _difference(run: Run, network: nn.Module, shape: tuple[int, ...], name: str) -> float:
    """Return how far a graph's logits are from the network's on noise, as a share of the largest logit.

    Raises:
        PlanError: it is too far.
    """
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    logits, expected = run(image), runner(network)(image)
    same_shape = logits.shape == expected.shape
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max()) if same_shape else float("inf")
    if not difference < TOLERANCE:
        raise PlanError(
            f"{name}: the exported graph differs from the bundle's network by {difference:.2g} of the largest logit, "
            f"tolerance {TOLERANCE:g}, on an image of {sized(shape[2:])} voxels. Nothing was written. Try another "
            "--format.",
            code="not_exportable",
        )
    return difference


def sized(shape: Sequence[int]) -> str:
    """Return sizes as people read them: `96 x 128 x 64`."""
    return " x ".join(map(str, shape))


def _written(path: Path, bundle: Bundle, name: str, network: nn.Module, runtime: Format, sizes: Sizes) -> Run:
    """Write the graph to `path` and return what runs that file."""
    plan, is_open = bundle.plan, sizes == "open"
    channels = len(plan.dataset.channel_names)
    if runtime == "openvino":
        # Only here: each runtime is an extra of its own.
        graphs = import_module("sagittal.export.openvino_graph")
        model = graphs.built(bundle, name) if is_open else None
        if model is None:
            model = graphs.converted(export_program(network, channels, plan.patch.size, open_sizes=is_open))
        graphs.write_openvino(model, path)
        run: Run = graphs.openvino_runner(path)
        return run
    program = export_program(network, channels, plan.patch.size, open_sizes=is_open)
    if runtime == "torch":
        torch.export.save(program, path)
        return runner(torch.export.load(path).module())
    graphs = import_module("sagittal.export.onnx_graph")
    graphs.write_onnx(program, path)
    run = graphs.onnx_runner(path)
    return run  # noqa: RET504 - its name carries the type, which a module by name has not


def _checked_format(runtime: str) -> Format:
    if runtime not in get_args(Format):
        raise PlanError(f"format '{runtime}' is unknown.{did_you_mean(runtime, get_args(Format))}", code="format")
    found: Format = next(name for name in get_args(Format) if name == runtime)
    for package in _NEEDS[found]:
        if find_spec(package) is None:
            raise ResourceError(
                f"--format {found} needs the package {package}, which is not installed. Run: "
                f"pip install 'sagittal[{found}]'.",
                code="missing_package",
            )
    return found


def _template(name: str) -> str:
    return (resources.files("sagittal.export") / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(size_bytes=path.stat().st_size, sha256=digest)


def _own_version() -> str:
    try:
        return version("sagittal")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
