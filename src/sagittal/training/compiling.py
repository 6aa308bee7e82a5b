"""torch.compile where it helps; where it fails, the same step goes on without it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sagittal.errors import SagittalError
from sagittal.training.generators import generator_states, restore_generators

CompileMode = Literal["auto", "on", "off"]
Say = Callable[[str], None]
_T = TypeVar("_T")


class CompiledNetwork:
    """A network's forward pass, compiled at its first call; plain from then on where compiling fails.

    The network itself stays as it is, with the names of its state, and may be called beside this.

    Attributes:
        active: whether calls are compiled; not any more after a failure.
    """

    def __init__(self, network: torch.nn.Module, say: Say) -> None:
        self._network, self._say = network, say
        self._compiled: Callable[[Tensor], Tensor | list[Tensor]] | None = None
        self.active = True

    def __call__(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return what the network returns."""
        if self.active and self._compiled is None:
            # Only now: already this imports a compiler, which may fail.
            self._compiled = torch.compile(self._network, dynamic=False)
        # Not "or": the truth of what torch.compile returns is the network's length, and most have none.
        result: Tensor | list[Tensor] = (self._network if self._compiled is None else self._compiled)(images)
        return result

    def attempt(self, work: Callable[[], _T]) -> _T:
        """Return `work()`, which calls this and the backward pass; where that fails, do it again uncompiled.

        Before that, the network's buffers and the random generators are put back as they were; `work` itself begins by
        dropping the gradients. Errors that a user can act on are no failures of compiling and are passed on.
        """
        if not self.active:
            return work()
        device = next(self._network.parameters()).device
        buffers = [buffer.clone() for buffer in self._network.buffers()]
        states = generator_states(device)
        try:
            return work()
        except SagittalError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._say(f"compile: failed, so training goes on without it, with the same results ({reason})")
            self.active, self._compiled = False, None
        for buffer, value in zip(self._network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        restore_generators(states, device)
        return work()


def compiled(network: torch.nn.Module, mode: CompileMode, device: torch.device, say: Say) -> CompiledNetwork | None:
    """Return the network's compiled forward pass for training, None where it is to run as it is.

    Args:
        network: keeps its type and the names of its state.
        mode: `auto` is on for CUDA where Triton and a C compiler are there, else off: on a CPU compiling took two
            minutes and made MedNeXt's step no shorter and SegFormer3D's twice as long.
        device: where the network lies.
        say: receives a line where compiling fails, or is not possible.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return None
    missing = _missing(device)
    if missing:
        say(f"compile: off, because {missing}")
        return None
    return CompiledNetwork(network, say)


def _missing(device: torch.device) -> str | None:
    """Return what torch.compile needs and is not there, None where all is."""
    compilers = (os.environ.get("CXX" if device.type == "cpu" else "CC"), *_compilers(device))
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C compiler (gcc or clang)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _compilers(device: torch.device) -> tuple[str, ...]:
    return ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang")
