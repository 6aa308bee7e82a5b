"""Networks on a CPU by OpenVINO, without PyTorch: built from plan and weights, compiled for each shape of window.

OpenVINO's conversion tools send telemetry; they are never imported here, and nothing else of OpenVINO sends any.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino
from jaxtyping import Float32
from openvino import opset13 as ops

from sagittal.bundle import Bundle
from sagittal.errors import BundleError, DataError, ResourceError
from sagittal.inference.engines import openvino_mednext, openvino_mednext_rows, openvino_segformer3d
from sagittal.inference.engines.engine import LinearHead, NetworkMemory, Precision
from sagittal.inference.engines.openvino_core import core
from sagittal.inference.engines.openvino_layers import Array, sum_by_planes
from sagittal.inference.engines.openvino_memory import activation_bytes
from sagittal.plan import Plan
from sagittal.plan.base import Triple
from sagittal.plan.lock import alone

Builder = Callable[..., openvino.Model]

BUILDERS: dict[str, Builder] = {"mednext": openvino_mednext.build, "segformer3d": openvino_segformer3d.build}
"""By the kind of network: (config, weights, in_channels, num_outputs, *, with_head) -> graph with open sizes."""

ROW_BUILDERS: dict[str, Builder] = {"mednext": openvino_mednext_rows.build}
"""By the kind of network, where float32 has a faster form for a known size: as `BUILDERS`, and `window`."""

HEADS: dict[str, Callable[..., tuple[Array, Array]]] = {"mednext": openvino_mednext.head}
"""By the kind of network, where its last layer is linear: (config, weights, num_outputs) -> weight, bias."""

COARSE_STRIDES: dict[str, Callable[..., int]] = {"segformer3d": openvino_segformer3d.coarse_stride}
"""By the kind of network, where a graph without head ends before an interpolation: (config, window) -> its factor."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_KEPT = 2
"""Compiled networks that are kept: each holds its weights once more, and its volumes."""
_RUNTIME_BYTES = 80 * 2**20
_WEIGHT_COPIES = 4
"""The arrays, the graph's constants, and the compiled network's, some of them twice."""
_MARGIN = {"fp32": 1.1, "bf16": 0.8}
"""Of the tensors counted in float32: with bfloat16 some stay in float32, and both are held while they are converted."""


def supports(plan: Plan) -> str | None:
    """Return why this engine can't compute the plan's network, or None where it can."""
    kind = plan.network.kind
    return None if kind in BUILDERS else f"no OpenVINO form of {kind}"


def load(
    bundle: Bundle,
    *,
    precision: Precision = "fp32",
    cache_folder: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> OpenVINOEngine:
    """Return the engine of a bundle, all folds of it.

    Args:
        bundle: verified; its weights are read now.
        precision: fp32, or bf16 where the processor has it.
        cache_folder: where compiled networks are kept for the next process, or None. OpenVINO finds them by a hash of
            network, weights, settings and version.
        threads: how many; None is one per core.

    Raises:
        BundleError: the weights do not fit the plan.
        ResourceError: no OpenVINO form of the network, or the processor lacks the precision.
    """
    folds = [bundle.weights(name) for name in bundle.weight_names]
    try:
        return OpenVINOEngine(bundle.plan, folds, precision=precision, cache_folder=cache_folder, threads=threads)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error.message}", code=error.code) from None


class OpenVINOEngine:
    """A bundle's networks on the CPU; windows one after the other.

    Not for several threads at once: a compiled network has one set of volumes.

    Args:
        plan: what the weights were trained with.
        folds: the arrays of each fold by name.
        precision: fp32 or bf16.
        cache_folder: where compiled networks are kept, or None.
        threads: how many; None is one per core.

    Raises:
        BundleError: the weights do not fit the plan.
        ResourceError: no OpenVINO form of the network, or the processor lacks the precision.
    """

    name: Literal["openvino"] = "openvino"
    device = "cpu"

    def __init__(
        self,
        plan: Plan,
        folds: Sequence[Mapping[str, Array]],
        *,
        precision: Precision = "fp32",
        cache_folder: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ) -> None:
        assert folds, "an engine needs weights"
        if (reason := supports(plan)) is not None:
            raise ResourceError(f"{reason}. Use the engine 'torch'.", code="engine")
        self.precision = precision
        self._plan = plan
        self._folds = list(folds)
        self._settings = _settings(precision, cache_folder, threads)
        self._compiled: OrderedDict[tuple[Triple, bool, bool], openvino.InferRequest] = OrderedDict()
        self._memory: dict[Triple, NetworkMemory] = {}
        self.head = _joint_head(plan, self._folds)
        for fold in self._folds:
            # What does not fit is told now, not with the first window.
            self._model(fold, plan.patch.size, with_head=True)

    @property
    def num_outputs(self) -> int:
        """K, the channels of the logits."""
        return self._plan.dataset.num_outputs

    def logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K D H W"]:
        """Return the logits of windows; several folds' mean.

        Raises:
            DataError: another number of channels than the network takes.
            ResourceError: the memory does not suffice.
        """
        return self._run(windows, self.num_outputs, windows.shape[2:], with_head=True)

    def coarse_stride(self, window: Triple) -> int:
        """Return by how much `coarse_logits` are coarser than a window of this shape; 1 where there are none."""
        stride = COARSE_STRIDES.get(self._plan.network.kind)
        return 1 if stride is None else stride(self._plan.network, window)

    def coarse_logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K d h w"]:
        """Return the logits before the last interpolation; several folds' mean. Errors are those of `logits`."""
        d, h, w = windows.shape[2:]
        stride = self.coarse_stride((d, h, w))
        assert stride > 1, "this network does not end in an interpolation at this size"
        return self._run(windows, self.num_outputs, (d // stride, h // stride, w // stride), with_head=False)

    def features(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N F D H W"]:
        """Return what `head` is applied to; only where there is one. Several folds' features one after the other.

        Raises:
            DataError: another number of channels than the network takes.
            ResourceError: the memory does not suffice.
        """
        assert self.head is not None, "this network has no linear head"
        return self._run(windows, self.head.weight.shape[1], windows.shape[2:], with_head=False)

    @property
    def num_members(self) -> int:
        """M, how many folds are averaged."""
        return len(self._folds)

    @property
    def member_heads(self) -> tuple[LinearHead, ...] | None:
        """Each fold's own head, for its part of `features`; None where `head` is None."""
        heads = [_joint_head(self._plan, [fold]) for fold in self._folds] if self.head is not None else []
        return tuple(head for head in heads if head is not None) or None

    def member_logits(
        self, windows: Float32[np.ndarray, "N C D H W"], *, coarse: bool = False
    ) -> Float32[np.ndarray, "N M K d h w"]:
        """Return the logits of each fold, or what `coarse_logits` is the mean of. Errors are those of `logits`."""
        d, h, w = windows.shape[2:]
        stride = self.coarse_stride((d, h, w)) if coarse else 1
        sizes, width = (d // stride, h // stride, w // stride), self.num_outputs * len(self._folds)
        results = self._run(windows, width, sizes, with_head=not coarse, apart=True)
        return results.reshape(len(windows), len(self._folds), self.num_outputs, *sizes)

    def memory(self, window: Triple) -> NetworkMemory:
        """Return what a call on windows of this shape takes of the host's memory, by the graph (`openvino_memory`).

        The graph is that of `features` or of `coarse_logits` where there are such, for a prediction calls these.
        Windows are computed one after the other, so of each further one only the image and the result count. A network
        that is not compiled yet takes the same for a moment before its first window.
        """
        if window not in self._memory:
            model = self._joint_model(window, with_head=self.head is None and self.coarse_stride(window) == 1)
            values = sum(math.prod(port.get_shape()) for port in (model.inputs[0], model.outputs[0]))
            activations = round(_MARGIN.get(self.precision, 1.1) * activation_bytes(model, 4))
            weights = sum(array.nbytes for fold in self._folds for array in fold.values())
            self._memory[window] = NetworkMemory(
                fixed_bytes=_RUNTIME_BYTES + _WEIGHT_COPIES * weights + activations,
                per_window_bytes=4 * values,
            )
        return self._memory[window]

    def _run(
        self,
        windows: Float32[np.ndarray, "N C D H W"],
        width: int,
        sizes: tuple[int, ...],
        *,
        with_head: bool,
        apart: bool = False,
    ) -> Float32[np.ndarray, "N K d h w"]:
        """Return results of `width` channels whose spatial axes measure `sizes`."""
        request = self._request(windows, with_head, apart)
        results = np.empty((len(windows), width, *sizes), np.float32)
        for number, window in enumerate(windows):
            _infer(request, window, results[number : number + 1])
        return results

    def _request(
        self, windows: Float32[np.ndarray, "N C D H W"], with_head: bool, apart: bool
    ) -> openvino.InferRequest:
        channels = len(self._plan.dataset.channel_names)
        if windows.ndim != 5 or windows.shape[1] != channels:
            raise DataError(
                f"the network was given windows of shape {windows.shape}. Expected (N, {channels}, D, H, W).",
                code="input_channels",
            )
        d, h, w = windows.shape[2:]
        key = ((d, h, w), with_head, apart)
        if key not in self._compiled:
            while len(self._compiled) >= _KEPT:
                self._compiled.popitem(last=False)
            try:
                self._compiled[key] = self._compile(self._joint_model(*key)).create_infer_request()
            except RuntimeError as error:
                raise _explained(error) from None
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _compile(self, model: openvino.Model) -> openvino.CompiledModel:
        folder = self._settings.get("CACHE_DIR")
        if folder is None:
            return core().compile_model(model, "CPU", self._settings)
        try:
            # OpenVINO writes a compiled network under the name that others read it by.
            with alone(Path(folder) / "lock"):
                return core().compile_model(model, "CPU", self._settings)
        except RuntimeError:
            # A folder that can't be written (a read-only container, a user without a home) costs time, no result.
            # Whatever else was wrong is so again.
            settings = {name: value for name, value in self._settings.items() if name != "CACHE_DIR"}
            return core().compile_model(model, "CPU", settings)

    def _joint_model(self, window: Triple, with_head: bool, apart: bool = False) -> openvino.Model:
        """Return all folds as one graph, so that they take turns with one set of volumes.

        It gives the mean of their logits, or their features, or with `apart` their logits, side by side.
        """
        models = [self._model(fold, window, with_head=with_head) for fold in self._folds]
        if len(models) == 1:
            return models[0]
        image = ops.parameter(models[0].inputs[0].get_shape(), np.float32, name="image")
        ends = []
        for model in models:
            model.get_parameters()[0].output(0).replace(image.output(0))
            ends.append(model.get_results()[0].input_value(0))
        if apart or (self.head is not None and not with_head):
            result = ops.concat(ends, 1)
        else:
            result = ops.multiply(reduce(ops.add, ends), np.float32(1 / len(ends)))
        joint = openvino.Model([ops.result(result)], [image], "ensemble")
        _name_by_order(joint)
        return joint

    def _model(self, fold: Mapping[str, Array], window: Triple, *, with_head: bool) -> openvino.Model:
        spec, network = self._plan.dataset, self._plan.network
        channels = len(spec.channel_names)
        builder = BUILDERS[network.kind]
        if self.precision == "fp32" and network.kind in ROW_BUILDERS:
            builder = partial(ROW_BUILDERS[network.kind], window=window)
        model = builder(network, fold, channels, spec.num_outputs, with_head=with_head)
        # Fixing the sizes folds operators into constants, which note the names of what they were made of.
        _name_by_order(model)
        model.reshape([1, channels, *window])
        if self.precision == "fp32":
            sum_by_planes(model)
        _name_by_order(model)
        return model


def _name_by_order(model: openvino.Model) -> None:
    """Give operators names that tell their place: OpenVINO's own count on through the process, and its cache on disk
    goes by names too."""
    _name_operators(model)
    model.outputs[0].get_tensor().set_names({"output"})


def _name_operators(model: openvino.Model) -> None:
    for number, operator in enumerate(model.get_ordered_ops()):
        operator.set_friendly_name(f"{operator.get_type_name()}_{number}")
        if operator.get_type_name() == "TensorIterator":
            body = operator.get_function()
            _name_operators(body)
            for end, value in enumerate([*body.inputs, *body.outputs]):
                value.get_tensor().set_names({f"end_{end}"})


def _settings(precision: Precision, cache_folder: str | os.PathLike[str] | None, threads: int | None) -> dict[str, Any]:
    if precision not in _HINTS:
        raise ResourceError(f"OpenVINO was asked for {precision}. Expected {' or '.join(_HINTS)}.", code="precision")
    if precision == "bf16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ResourceError(
            "this processor has no bfloat16 (AVX512-BF16 or AMX). Use --precision fp32.", code="precision"
        )
    # OpenVINO picks bfloat16 by itself where the processor has it, so fp32 is said as well.
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if cache_folder is not None:
        # OpenVINO's own key leaves out the precision (2026.4): a graph made for float32 would be run in bfloat16, and
        # SegFormer3D's then computes nonsense.
        settings["CACHE_DIR"] = str(Path(cache_folder) / f"{precision}-{threads or 'all'}")
    return settings


def _joint_head(plan: Plan, folds: Sequence[Mapping[str, Array]]) -> LinearHead | None:
    """Return one head for all folds' features side by side, whose result is the mean of theirs."""
    if plan.network.kind not in HEADS:
        return None
    heads = [HEADS[plan.network.kind](plan.network, fold, plan.dataset.num_outputs) for fold in folds]
    weight = np.concatenate([weight for weight, _ in heads], axis=1) / np.float32(len(folds))
    bias = np.mean([bias for _, bias in heads], axis=0, dtype=np.float64)
    return LinearHead(np.ascontiguousarray(weight, np.float32), np.asarray(bias, np.float32))


def _infer(
    request: openvino.InferRequest, window: Float32[np.ndarray, "C D H W"], into: Float32[np.ndarray, "1 K d h w"]
) -> None:
    """Compute one window into `into`, which is contiguous, without a copy on either side."""
    request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(window[None]), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(into, shared_memory=True))
    try:
        request.infer()
    except RuntimeError as error:
        raise _explained(error) from None


def _explained(error: RuntimeError) -> Exception:
    """Return a ResourceError where memory is what failed, else the error itself."""
    if "alloc" not in str(error).lower():
        return error
    return ResourceError(
        "the memory does not suffice for OpenVINO's network. Free memory, or give --memory-gib to see what is needed.",
        code="memory",
    )
