"""Read a weights file from elsewhere, and nothing but its tensors: no code in it is ever run."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sagittal.errors import PlanError

ENDINGS = (".pth", ".pt", ".model", ".safetensors")
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_weights_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what a file holds: tensors by name, or a checkpoint (a dict) with such a dict in it.

    PyTorch's files are pickles, which can run any code when they are read. Here they are read with
    `weights_only=True`: tensors, numbers, texts and containers pass, and numpy's numbers and arrays, which nnU-Net's
    `.model` files hold beside the weights; anything else ends the reading before it is made.

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
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _read_pickle(path: Path) -> Any:
    try:
        # PyTorch warns of what it then refuses, or reads all the same; the errors below say it.
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_globals()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _GLOBAL.search(str(error))
        if refused is None:
            raise _damaged(path, error) from None
        raise PlanError(
            f"{path}: refused, for it holds {refused[1]}. Expected tensors, numbers and texts: any other Python object "
            "can run code when it is read, and none was. In the program that wrote the file, save the weights alone by "
            "torch.save(network.state_dict(), FILE), or as .safetensors.",
            code="unsafe_weights",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _numpy_globals() -> list[Any]:
    """Return what numbers and arrays of numpy are made with, under the names of numpy 1 and 2; none runs code."""
    # Asked of numpy itself, for it has moved these two functions from one private module to another.
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    homes = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(maker, f"{home}.{name}") for home in homes for name, maker in makers.items()]
    return [np.dtype, np.ndarray, *named, *(type(np.dtype(number)) for number in _NUMBERS)]


def _damaged(path: Path, error: Exception) -> PlanError:
    # PyTorch goes on to advise reading the file without its guard, which nobody should do with one from elsewhere.
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition(" In PyTorch 2.6")[0].strip()
    reason = next(iter(text.splitlines()), "") or type(error).__name__
    return PlanError(
        f"{path}: can't be read as weights ({reason[:200].rstrip('.')}). Expected a whole file of the kind that its "
        "ending says; TorchScript archives hold code and are not read. Get it from its maker again.",
        code="weights_unreadable",
    )
