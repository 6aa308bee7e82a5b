"""The tail's Triton kernels against float64 autograd of the plain form, run by `test_gpu_kernels.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sagittal.kernels import gpu_block, gpu_block_kernels, gpu_block_ops, gpu_block_wide
from sagittal.kernels.gpu_block import Tail, Tiles
from sagittal.kernels.gpu_block_ops import block_tail
from sagittal.kernels.gpu_grn import Responses
from sagittal.kernels.response_norm import global_response_norm

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
SMALL = Tiles(16, 16, 4, 1)


class Form(NamedTuple):
    """A block's tail: sizes, and what is in it. grn: None, False (mean) or True (sum)."""

    size: tuple[int, ...]
    channels: int
    wide: int
    outputs: int
    residual: bool = True
    layer: bool = False
    grn: bool | None = None
    cases: int = 2


def make(form: Form, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, the residual, the six weights, and GRN's two."""
    generator = torch.Generator().manual_seed(form.channels + form.wide)
    c, r, o = form.channels, form.wide, form.outputs
    shapes = [(form.cases, c, *form.size), (form.cases, o, *form.size), (c,), (c,), (r, c), (r,), (o, r), (o,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] = 2 * tensors[0] + 1
    tensors[4] /= c**0.5
    tensors[6] /= r**0.5
    if form.grn is not None:
        tensors += [torch.randn(r, generator=generator) for _ in range(2)]
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]


def fused(tensors: list[Tensor], form: Form) -> Tensor:
    grn = None if form.grn is None else Responses(tensors[8], tensors[9], form.grn)
    residual = tensors[1] if form.residual else None
    return block_tail(tensors[0], tensors[2:8], grn=grn, residual=residual, layer_norm=form.layer)


def plain(tensors: list[Tensor], form: Form) -> Tensor:
    h, residual, weight, bias, expand, expand_bias, contract, contract_bias = tensors[:8]
    if form.layer:
        normed = F.layer_norm(h.movedim(1, -1), (form.channels,), weight, bias, 1e-5).movedim(-1, 1)
    else:
        normed = torch.group_norm(h, form.channels, weight, bias, 1e-5)
    wide = F.gelu(F.linear(normed.movedim(1, -1), expand, expand_bias)).movedim(-1, 1)
    if form.grn is not None:
        shape = (1, form.wide, *(1,) * len(form.size))
        wide = global_response_norm(wide, tensors[8].view(shape), tensors[9].view(shape), by_sum=form.grn)
    y = F.linear(wide.movedim(1, -1), contract, contract_bias).movedim(-1, 1)
    return residual + y if form.residual else y


def step(run: Callable[[list[Tensor], Form], Tensor], tensors: list[Tensor], form: Form) -> list[Tensor]:
    y = run(tensors, form)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.device, torch.bfloat16).to(y.dtype)
    wanted = tensors if form.residual else [tensors[0], *tensors[2:]]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def exactly(tensors: list[Tensor], form: Form) -> list[Tensor]:
    return step(plain, [tensor.detach().double().requires_grad_() for tensor in tensors], form)


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(ours, exact, strict=True)
    # Some gradients are zero but for rounding: at h, where the norm sees one voxel.
    return [float((a.double() - b).norm() / max(float(b.norm()), 1e-3 * b.numel() ** 0.5)) for a, b in pairs]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything so small that a small volume has many tiles, chunks and slabs."""
    monkeypatch.setattr(gpu_block, "forward_tiles", lambda *_: SMALL)
    monkeypatch.setattr(gpu_block, "backward_tiles", lambda *_: SMALL)
    monkeypatch.setattr(gpu_block, "_PROGRAMS", 6)
    monkeypatch.setattr(gpu_block, "_MATRIX_PROGRAMS", 12)


FORMS = [
    Form((3, 5, 4), 16, 32, 16),
    Form((3, 4, 2), 40, 72, 40),
    Form((2, 3, 2), 64, 72, 96, residual=False),
    Form((9, 8), 3, 6, 5),
    Form((1, 1, 1), 16, 32, 16),
    Form((1, 2, 3), 1, 1, 1, cases=1),
    Form((2, 1, 9), 20, 40, 20, cases=3),
    Form((3, 2, 4), 24, 48, 24, layer=True),
    Form((3, 2, 5), 16, 36, 16, grn=False),
    Form((2, 3, 5), 16, 20, 20, residual=False, grn=True),
    Form((3, 3, 2), 5, 20, 5, layer=True, grn=True),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_is_within_a_hundred_thousandth_of_float64(form: Form) -> None:
    tensors = make(form)
    assert max(errors(step(fused, tensors, form), exactly(tensors, form))) < 1e-5


@pytest.mark.parametrize("form", [FORMS[1], FORMS[2], FORMS[6], FORMS[7], FORMS[10]], ids=str)
def test_many_tiles_chunks_and_slabs_make_no_difference(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    tensors = make(form)
    assert max(errors(step(fused, tensors, form), exactly(tensors, form))) < 1e-5


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[3], FORMS[7], FORMS[8], FORMS[10]], ids=str)
def test_wide_blocks_are_whole_products_in_parts(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_block, "WIDEST", 0)
    monkeypatch.setattr(gpu_block_wide, "_HIDDEN", 7 * form.wide)
    tensors = make(form)
    assert max(errors(step(fused, tensors, form), exactly(tensors, form))) < 1e-5


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[7], FORMS[8]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_form(form: Form, dtype: torch.dtype) -> None:
    tensors = make(form, dtype)
    exact = exactly(tensors, form)
    ours, usual = (errors(step(run, tensors, form), exact) for run in (fused, plain))
    assert all(a <= max(b, 1e-6) for a, b in zip(ours, usual, strict=True)), (ours, usual)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[7], FORMS[8]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_blocks_in_half_precision_are_no_worse_on_the_whole(
    form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They round where the plain form rounds: either is a little better at one tensor or another, by chance.
    monkeypatch.setattr(gpu_block, "WIDEST", 0)
    form = form._replace(size=(9, 11, 8))
    tensors = make(form, dtype)
    exact = exactly(tensors, form)
    ours, usual = (errors(step(run, tensors, form), exact) for run in (fused, plain))
    assert sum(ours) <= 1.05 * sum(usual)
    assert all(a <= 1.5 * b for a, b in zip(ours, usual, strict=True)), (ours, usual)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[7], FORMS[9]], ids=str)
def test_float32_parameters_with_half_activations_get_float32_gradients(form: Form) -> None:
    tensors = make(form)
    tensors[:2] = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors[:2]]
    ours = step(fused, tensors, form)
    wanted = [torch.bfloat16, *(tensor.dtype for tensor in (tensors if form.residual else [tensors[0], *tensors[2:]]))]
    assert [part.dtype for part in ours] == wanted
    assert max(errors(ours, exactly(tensors, form))) < 2e-2


def test_a_wider_residual_keeps_its_digits() -> None:
    form = Form((3, 4, 5), 16, 32, 16)
    tensors = make(form)
    tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
    ours = step(fused, tensors, form)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    assert ours[2].dtype == torch.float32


@pytest.mark.parametrize("voxels", [1, 255, 256, 1500])
@pytest.mark.parametrize("channels", [1, 16, 33])
def test_moments_keep_their_digits_far_from_zero(voxels: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_block, "_PROGRAMS", 4)
    h = (1000 + torch.randn(2, voxels, channels, generator=torch.Generator().manual_seed(voxels))).to(DEVICE)
    mean, scale = gpu_block.moments(h, 1e-5)
    exact = h.double()
    assert float((mean - exact.mean(1)).abs().max()) < 2e-4
    expected = (exact.var(1, correction=0) + 1e-5).rsqrt()
    assert float((scale / expected - 1).abs().max()) < 1e-4


def test_known_moments_give_the_same_bits() -> None:
    form = FORMS[0]
    tensors = make(form)
    known = gpu_block.moments(gpu_block_ops.rows(tensors[0].detach()), 1e-5)

    def given(tensors: list[Tensor], form: Form) -> Tensor:
        return block_tail(tensors[0], tensors[2:8], moments=known, residual=tensors[1])

    assert all(map(torch.equal, step(given, tensors, form), step(fused, tensors, form)))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[9]], ids=str)
def test_every_layout_and_run_gives_the_same_bits(form: Form) -> None:
    tensors = make(form)
    other = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    for index in range(2):
        lying = tensors[index].detach().contiguous(memory_format=torch.channels_last_3d)
        other[index] = lying.requires_grad_()
    for index in (4, 6):
        other[index] = tensors[index].detach()[..., None, None, None].clone().requires_grad_()
    first, second = step(fused, tensors, form), step(fused, other, form)
    assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", [Form((2, 1, 3), 4, 8, 4), Form((2, 1, 3), 4, 8, 4, layer=True, grn=True)], ids=str)
def test_a_compiled_step_gives_the_same_bits(form: Form) -> None:
    torch.compiler.reset()
    tensors = make(form)
    graph = torch.compile(lambda *given: fused(list(given), form), fullgraph=True, backend="aot_eager")
    ours, eager = step(lambda given, _: graph(*given), tensors, form), step(fused, tensors, form)
    assert ours[0].stride() == eager[0].stride()
    assert all(map(torch.equal, ours, eager))
    torch.compiler.reset()


@pytest.mark.parametrize("form", [Form((1, 2), 2, 3, 2), Form((1, 2), 2, 3, 2, layer=True, grn=True)], ids=str)
def test_operators_keep_the_rules_of_the_framework(form: Form) -> None:
    h, residual, *weights = make(form)
    known = [] if form.layer else list(gpu_block_ops._moments(h.detach(), 1e-5))
    torch.library.opcheck(gpu_block_ops._tail, (h, known, residual, 1e-5, False, weights))
    norms = torch.rand(2, form.wide, device=DEVICE) if form.grn is not None else torch.empty(0, device=DEVICE)
    parts = [weight.detach() for weight in weights]
    torch.library.opcheck(gpu_block_ops._tail_grad, (h.detach(), residual.detach(), known, norms, 1e-5, False, parts))
    torch.library.opcheck(gpu_block_ops._moments, (h.detach(), 1e-5))


def test_folded_weights_do_the_norm() -> None:
    tensors = make(FORMS[2])
    h, weights = gpu_block_ops.rows(tensors[0].detach()).double(), [part.detach().double() for part in tensors[2:8]]
    mean, scale = h.mean(1), (h.var(1, correction=0) + 1e-5).rsqrt()
    matrix, bias = gpu_block.folded_weights(Tail((mean, scale), weights))
    wide = F.gelu(torch.baddbmm(bias[:, None], h, matrix.mT))
    y = F.linear(wide, weights[4], weights[5])
    torch.testing.assert_close(y, gpu_block_ops.rows(plain([part.double() for part in tensors], FORMS[2])).detach())


def test_what_does_not_fit_is_cut_smaller_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []
    run = gpu_block._run

    def crowded(
        h: Tensor, kernel: object, grid: tuple[int, ...], arguments: tuple[object, ...], options: dict[str, int]
    ) -> None:
        tried.append((options["M"], options["BH"]))
        if options["M"] > 32:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        run(h, kernel, grid, arguments, options)

    monkeypatch.setattr(gpu_block, "_fitting", {})
    form = FORMS[0]
    rows, weights = gpu_block_ops.rows(make(form)[0].detach()), [part.detach() for part in make(form)[2:8]]
    tail = Tail(gpu_block.moments(rows, 1e-5), weights)
    expected = gpu_block.forward(rows, None, tail, tiles=Tiles(32, 64))
    monkeypatch.setattr(gpu_block, "_run", crowded)
    for _ in range(2):
        torch.testing.assert_close(gpu_block.forward(rows, None, tail, tiles=Tiles(128, 64)), expected)
    assert tried == [(128, 64), (64, 64), (32, 64), (32, 64)]


def test_what_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(*_: object) -> None:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    rows, weights = gpu_block_ops.rows(make(FORMS[0])[0].detach()), [part.detach() for part in make(FORMS[0])[2:8]]
    tail = Tail(gpu_block.moments(rows, 1e-5), weights)
    monkeypatch.setattr(gpu_block, "_run", crowded)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        gpu_block.forward(rows, None, tail)


@triton.jit
def cdf_of(x, y, B: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, B)
    tl.store(y + index, gpu_block_kernels.normal_cdf(tl.load(x + index), EXACT))


@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-6), (False, 3e-5)])
def test_normal_distribution_function(exact: bool, bound: float) -> None:
    x = torch.linspace(-9, 9, 4096, device=DEVICE)
    y = torch.empty_like(x)
    cdf_of[(1,)](x, y, 4096, exact)
    assert float((y.double() - torch.special.ndtr(x.double())).abs().max()) < bound
    assert float(y[0]) >= 0
