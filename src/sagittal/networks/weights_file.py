"""Read a weights file from elsewhere, and nothing but its tensors: no code in it is ever run."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sagittal.errors import PlanError

ENDINGS = (".pth", ".pt", ".model", ".safetensors")
_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
)
"""What numpy's numbers and arrays are pickled as, by numpy 1 and 2."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class Unread:
    """Stands where a file holds a number or array of numpy, of which nothing is read or called."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_weights_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what a file holds: tensors by name, or a checkpoint (a dict) with such a dict in it.

    PyTorch's files are pickles, which can run any code when they are read. Here they are read with
    `weights_only=True`: tensors, numbers, texts and containers pass. Numpy's numbers and arrays, which nnU-Net's
    `.model` files hold beside the weights, are passed over: an `Unread` stands where each was. Anything else ends the
    reading before it is made.

    Args:
        path: .pth, .pt, .model (nnU-Net v1) or .safetensors.

    Raises:
        PlanError: another ending, a file that is missing, damaged or holds other objects, or no dict of tensors.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise PlanError(
            f"{path}: not a weights file by its ending. Expected one of {', '.join(ENDINGS)}.",
            code="weights_ending",
        )
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "does not exist"
        raise PlanError(f"{path}: {what}. Expected a weights file.", code="weights_missing")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        kind = f"a {type(content).__name__}" if not isinstance(content, Mapping) else "an empty or nameless dict"
        raise PlanError(
            f"{path}: holds {kind}. Expected tensors by name, as torch.save(network.state_dict(), FILE) writes.",
            code="weights_not_tensors",
        )
    return content


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except Exception as error:
        raise _damaged(path, error) from None


def _read_pickle(path: Path) -> Any:
    # Not numpy's own makers: a file could hand them states that numpy does not check.
    unread = [(Unread, name) for name in _NUMPY]
    try:
        # PyTorch warns of what it then refuses, or reads all the same; the errors below say it.
        with warnings.catch_warnings(), torch.serialization.safe_globals([Unread, *unread]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Bytes of anyone's making raise anything: assertions, struct.error, LookupError, MemoryError.
        refused = _GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise _damaged(path, error) from None
        raise PlanError(
            f"{path}: refused, for it holds {refused[1]}. Expected tensors, numbers and texts: any other Python object "
            "can run code when it is read, and none was. In the program that wrote the file, save the weights alone by "
            "torch.save(network.state_dict(), FILE), or as .safetensors.",
            code="unsafe_weights",
        ) from None


def _damaged(path: Path, error: Exception) -> PlanError:
    # PyTorch goes on to advise reading the file without its guard, which nobody should do with one from elsewhere.
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition(" In PyTorch 2.6")[0].strip()
    reason = next(iter(text.splitlines()), "") or type(error).__name__
    return PlanError(
        f"{path}: can't be read as weights ({reason[:200].rstrip('.')}). Expected a whole file of the kind that its "
        "ending says; TorchScript archives hold code and are not read. Get it from its maker again.",
        code="weights_unreadable",
    )
