"""Whole MedNeXt blocks by the Triton kernels against float64 autograd of their plain form, and a network of them.

`test_gpu_kernels.py` runs this in a process of its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sagittal.kernels import block, choice, depthwise, gpu_block, gpu_block_autograd
from sagittal.kernels.choice import interpreted_on_cpu, use_kernels
from sagittal.kernels.gpu_block_autograd import plain_block, whole_block
from sagittal.kernels.gpu_block_whole import How, Parts, output_size, unflat
from sagittal.networks import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, mednext_blocks
from sagittal.networks.half_precision import to_half_precision
from sagittal.networks.mednext_blocks import BlockOptions

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

Run = Callable[[Tensor, Tensor | None, Parts, How], Tensor | None]


@pytest.fixture(autouse=True)
def _kernels_on() -> Iterator[None]:
    with interpreted_on_cpu() if INTERPRETED else nullcontext(), use_kernels("on"):
        yield


class Form(NamedTuple):
    """A block: C, R, O, kernel, what it is, and which parts it has."""

    widths: tuple[int, int, int]
    kernel: tuple[int, int, int]
    how: How
    size: tuple[int, int, int]
    path: bool = False
    grn: bool = False
    skip: bool = False


FORMS = [
    Form((16, 32, 16), (3, 3, 3), How(), (3, 4, 5)),
    Form((5, 10, 5), (3, 3, 3), How(layer=True), (2, 3, 4), grn=True),
    Form((8, 16, 12), (3, 3, 3), How((2, 2, 2), identity=False), (3, 4, 5), path=True, grn=True),
    Form((8, 16, 8), (1, 5, 5), How((1, 2, 1), identity=False, layer=True), (2, 3, 2)),
    Form((8, 16, 4), (3, 3, 3), How((2, 2, 2), True, False), (2, 3, 1), path=True),
    Form((8, 16, 4), (3, 3, 3), How((2, 2, 2), True, False), (2, 1, 3), path=True, skip=True),
    Form((8, 16, 4), (1, 3, 3), How((1, 2, 2), True, False, layer=True), (2, 3, 2), path=True, grn=True, skip=True),
    Form((8, 16, 4), (3, 3, 3), How((2, 1, 2), True, False, by_sum=True), (2, 3, 2), grn=True, skip=True),
    Form((8, 16, 4), (3, 3, 3), How((1, 1, 1), True, False), (2, 3, 2), path=True, skip=True),
]


def make(form: Form, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """x, the skip, and the parts."""
    generator = torch.Generator().manual_seed(sum(form.widths))
    c, r, o = form.widths
    shapes: list[tuple[int, ...] | None] = [(2, c, *form.size), (2, o, *output_size(form.size, form.how))]
    shapes += [(c, 1, *form.kernel), (c,), (c,), (c,), (r, c), (r,), (o, r), (o,), (o, c), (o,), (r,), (r,)]
    missing = {1} if not form.skip else set()
    missing |= {10, 11} if not form.path else set()
    missing |= {12, 13} if not form.grn else set()
    made: list[Tensor | None] = []
    for index, shape in enumerate(shapes):
        if index in missing or shape is None:
            made.append(None)
            continue
        tensor = torch.randn(shape, generator=generator)
        if index > 1:
            tensor /= max(1, torch.Size(shape[1:]).numel()) ** 0.5
        made.append(tensor.to(DEVICE, dtype if index < 2 else torch.float32).requires_grad_())
    return made


def step(run: Run, given: list[Tensor | None], form: Form) -> list[Tensor]:
    y = run(given[0], given[1], unflat(given[2:]), form.how)  # type: ignore[arg-type]
    assert y is not None
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.device, torch.bfloat16).to(y.dtype)
    wanted = [tensor for tensor in given if tensor is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def exactly(given: list[Tensor | None], form: Form) -> list[Tensor]:
    double = [None if part is None else part.detach().double().requires_grad_() for part in given]
    return step(plain_block, double, form)


def errors(ours: list[Tensor], exact: list[Tensor], form: Form) -> list[float]:
    found = []
    for index, (a, b) in enumerate(zip(ours, exact, strict=True)):
        if index != 3 + form.skip or form.how.layer:  # what the norm takes away again is rounding alone
            found.append(float((a.double() - b).norm() / b.norm()))
    return found


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_is_within_a_hundred_thousandth_of_float64(form: Form) -> None:
    given = make(form)
    assert max(errors(step(whole_block, given, form), exactly(given, form), form)) < 1e-5


@pytest.mark.parametrize("form", [FORMS[2], FORMS[6], FORMS[7]], ids=str)
def test_wide_blocks_are_whole_products(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_block, "WIDEST", 0)
    given = make(form)
    assert max(errors(step(whole_block, given, form), exactly(given, form), form)) < 1e-5


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[5]], ids=str)
def test_half_precision_is_no_worse_than_the_plain_form(form: Form) -> None:
    form = form._replace(size=(3, 4, 5))
    given = make(form, torch.bfloat16)
    exact = exactly(given, form)

    def plain(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> Tensor:
        # As autocast does it: parameters are rounded at their use.
        flat = [None if part is None else part.bfloat16() for part in parts.flat]
        with use_kernels("off"):
            return plain_block(x, skip, unflat(flat), how)

    ours, usual = (errors(step(run, given, form), exact, form) for run in (whole_block, plain))
    assert all(a <= 1.25 * max(b, 4e-3) for a, b in zip(ours, usual, strict=True)), (ours, usual)


@pytest.mark.parametrize("form", [FORMS[3], FORMS[6]], ids=str)
def test_a_compiled_step_gives_the_same_bits_from_one_operator(form: Form) -> None:
    torch.compiler.reset()
    names: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return compiled(graph, inputs)

    compiled = torch._dynamo.lookup_backend("aot_eager")
    given = make(form)
    eager = step(whole_block, given, form)
    ours = step(torch.compile(whole_block, fullgraph=True, backend=backend), given, form)
    torch.compiler.reset()
    assert "sagittal.mednext_block.default" in names
    assert not any("sagittal" in name for name in names - {"sagittal.mednext_block.default"})
    assert ours[0].stride() == eager[0].stride()
    assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize(
    "form",
    [
        Form((2, 3, 2), (3, 3, 3), How((1, 2, 2), True, False), (1, 1, 2), path=True, skip=True),
        Form((2, 3, 2), (1, 3, 3), How(layer=True), (1, 2, 1), grn=True),
    ],
    ids=str,
)
def test_operators_keep_the_rules_of_the_framework(form: Form) -> None:
    x, skip, *flat = make(form)
    assert x is not None
    tensors = [part for part in flat if part is not None]
    present = [index for index, part in enumerate(flat) if part is not None]
    how = (list(form.how.strides), *form.how[1:])
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    check(gpu_block_autograd._block, (x, skip, tensors, present, *how))
    y, *kept = gpu_block_autograd._block(x.detach(), skip, [part.detach() for part in tensors], present, *how)
    given = (x.detach(), torch.randn_like(y), [part.detach() for part in kept], [part.detach() for part in tensors])
    for wants_x in (True, False):
        check(gpu_block_autograd._block_grad, (*given, present, *how, wants_x))


def test_a_skip_of_another_size_is_left_to_those_who_can_complain() -> None:
    x, skip, *flat = make(FORMS[5])
    assert x is not None
    assert skip is not None
    assert whole_block(x, skip[..., 1:], unflat(flat), FORMS[5].how) is None


@pytest.mark.parametrize(("form", "training"), [(FORMS[1], True), (FORMS[3], False), (FORMS[8], True)], ids=str)
def test_auto_takes_what_passed_its_trial(form: Form, training: bool) -> None:
    given = make(form)
    with use_kernels("auto"), torch.set_grad_enabled(training), mock.patch.dict(choice._verdicts, clear=True):
        y = whole_block(given[0], given[1], unflat(given[2:]), form.how)  # type: ignore[arg-type]
        # In the interpreter nothing is timed, so that passing is enough.
        assert list(choice._verdicts.values()) == [y is not None]
        assert y is not None or not INTERPRETED


BLOCKS: list[tuple[type[nn.Module], int, BlockOptions]] = [
    (MedNeXtBlock, 3, {"grn": True}),
    (MedNeXtBlock, 2, {"norm": "layer", "grn": "v2"}),
    (MedNeXtDownBlock, 3, {"kernel_size": (1, 3, 3)}),
    (MedNeXtDownBlock, 2, {"grn": "v2", "residual": False}),
    (MedNeXtUpBlock, 3, {"norm": "layer"}),
    (MedNeXtUpBlock, 2, {"grn": True}),
    (MedNeXtUpBlock, 3, {"checkpointing": "block"}),
]


def gradients(network: nn.Module, *volumes: Tensor) -> list[Tensor]:
    volumes = tuple(volume.detach().requires_grad_() for volume in volumes)
    y = network(*volumes)
    wanted = [*volumes, *(part for name, part in network.named_parameters() if not name.endswith("conv1.bias"))]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@pytest.mark.parametrize(("kind", "axes", "options"), BLOCKS, ids=str)
def test_every_block_of_the_network_computes_as_a_whole(
    kind: type[nn.Module], axes: int, options: BlockOptions
) -> None:
    torch.manual_seed(0)
    options = {"expansion_ratio": 2, "spatial_dims": axes, **options}
    if kind is not MedNeXtBlock and axes == 3:
        options = {**options, "stride": (1, 2, 2)}  # type: ignore[typeddict-unknown-key]
    outputs = 4 if kind is MedNeXtBlock else 3
    network = kind(4, outputs, **options).to(DEVICE)
    for name, part in network.named_parameters():
        if "grn" in name:
            nn.init.normal_(part)
    size = (2, 3, 2)[-axes:]
    volumes = [torch.randn(2, 4, *size, device=DEVICE)]
    if kind is MedNeXtUpBlock:
        doubled = [2 * n for n in size] if axes == 2 else [2, 6, 4]
        volumes.append(torch.randn(2, outputs, *doubled, device=DEVICE))
    with mock.patch.object(mednext_blocks._Block, "_tail", side_effect=AssertionError("plain operators ran")):
        ours = gradients(network, *volumes)
    exact = gradients(network.double(), *(volume.double() for volume in volumes))
    assert max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)) < 1e-5


@pytest.mark.parametrize("options", [{"grn": "v2"}, {"norm": "layer", "flat_levels": (1, 0, 0)}], ids=str)
def test_a_whole_network_runs_without_its_plain_forms(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    strides = ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1))
    # A norm over two channels would magnify rounding, also that of the plain forms.
    network = MedNeXt(1, 2, channels=4, block_counts=(1,) * 9, strides=strides, **options).to(DEVICE)
    for name, part in network.named_parameters():
        if "grn" in name:
            nn.init.normal_(part, std=0.3)
    image = torch.randn(1, 1, 2, 3, 4, device=DEVICE)
    plain = [(depthwise, "plain_conv"), (depthwise, "plain_transpose"), (block, "_plain_tail")]
    plain += [(mednext_blocks, "pad_front"), (mednext_blocks, "depthwise"), (mednext_blocks, "depthwise_transpose")]
    patches = [mock.patch.object(module, name, side_effect=AssertionError(name)) for module, name in plain]
    for patch in patches:
        patch.start()
    try:
        ours = gradients(network, image)
    finally:
        mock.patch.stopall()
    exact = gradients(network.double(), image.double())
    scale = max(float(part.norm()) for part in exact[1:])
    assert float((ours[0].double() - exact[0]).norm() / exact[0].norm()) < 1e-5
    worst = max(float((a.double() - b).norm()) / scale for a, b in zip(ours[1:], exact[1:], strict=True))
    assert worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_in_half_precision_rounds_no_worse_than_its_plain_form(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    strides = ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1))
    network = MedNeXt(1, 3, channels=4, block_counts=(1,) * 9, strides=strides).to(DEVICE).eval()
    for part in network.parameters():
        part.data.add_(0.05 * torch.randn_like(part))
    half, image = to_half_precision(copy.deepcopy(network), dtype), torch.randn(3, 1, 4, 6, 4, device=DEVICE)
    slow = AssertionError("plain operators ran")
    with torch.inference_mode():
        exact = network.double()(image.double())
        with use_kernels("off"):
            plain = half(image.to(dtype))
        with mock.patch.object(mednext_blocks._Block, "_tail", side_effect=slow):
            ours = half(image.to(dtype))
    assert ours.dtype == plain.dtype == torch.float32
    found, usual = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, plain))
    assert found <= 1.1 * usual < 0.1


@pytest.mark.parametrize("options", [{"grn": True}, {"norm": "layer"}, {"grn": "v2", "norm": "layer"}], ids=str)
def test_the_tail_alone_is_fused_where_the_whole_is_not(options: BlockOptions) -> None:
    torch.manual_seed(0)
    network, x = MedNeXtBlock(4, 4, expansion_ratio=2, **options).to(DEVICE), torch.randn(1, 4, 2, 3, 2, device=DEVICE)
    expected = gradients(network, x)
    slow = AssertionError("plain operators ran")
    with (
        use_kernels("auto"),
        mock.patch.dict(choice._verdicts, clear=True),
        mock.patch.object(mednext_blocks, "whole_block", return_value=None),
        mock.patch.object(mednext_blocks, "global_response_norm", side_effect=slow),
        mock.patch.object(nn.LayerNorm, "forward", side_effect=slow),
    ):
        ours = gradients(network, x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
