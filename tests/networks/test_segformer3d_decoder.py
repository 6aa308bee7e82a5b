"""SegFormer3D's decoder against the published one, interpolation by products against PyTorch's, and its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sagittal.kernels import native
from sagittal.networks import SegFormer3D
from sagittal.networks.segformer3d_decoder import Decoder, interpolation_matrix, upsample_logits

WIDTHS = (8, 16, 24, 32)
SIZES = {3: [(9, 8, 12), (5, 4, 6), (3, 2, 3), (2, 1, 2)], 2: [(9, 12), (5, 6), (3, 3), (2, 2)]}


def published_decoder(decoder: Decoder, grids: list[Tensor]) -> Tensor:
    """The decoder as the paper writes it: upsample, concatenate stages 4 to 1, fuse at the finest grid."""
    finest = grids[0].shape[1:-1]
    mode = "trilinear" if len(finest) == 3 else "bilinear"
    maps = []
    for stage in (4, 3, 2, 1):
        volume = decoder.get_submodule(f"linear_c{stage}")(grids[stage - 1]).movedim(-1, 1)
        maps.append(nn.functional.interpolate(volume, size=finest, mode=mode, align_corners=False))
    return decoder.linear_pred(torch.relu(decoder.linear_fuse(torch.cat(maps, 1))))


def trained_decoder(norm: str = "batch", spatial_dims: int = 3, width: int = 32) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(WIDTHS, 3, width, norm=norm, spatial_dims=spatial_dims).eval()
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape))
    return decoder


def token_grids(spatial_dims: int = 3, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, *size, width) for size, width in zip(SIZES[spatial_dims], WIDTHS, strict=True)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("norm", "spatial_dims", "width"), [("batch", 3, 32), ("group", 3, 32), ("batch", 2, 5)])
def test_coarse_fuse_equals_the_published_one(norm: str, spatial_dims: int, width: int, gradients: bool) -> None:
    decoder, grids = trained_decoder(norm, spatial_dims, width), token_grids(spatial_dims)
    with torch.set_grad_enabled(gradients):
        logits = decoder(grids).detach()
    with torch.no_grad():
        expected = published_decoder(decoder.double(), [grid.double() for grid in grids])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_equal_those_of_the_published_decoder(norm: str) -> None:
    decoder, grids = trained_decoder(norm).train(), token_grids()

    def gradients(form: object) -> list[Tensor]:
        leaves = [grid.clone().requires_grad_() for grid in grids]
        decoder.zero_grad()
        form(leaves).square().mean().backward()
        return [tensor.grad for tensor in (*leaves, *decoder.parameters())]

    published = gradients(lambda leaves: published_decoder(decoder, leaves))
    largest = max(gradient.abs().max() for gradient in published)
    for ours, theirs in zip(gradients(decoder), published, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * largest


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, grids = trained_decoder(), token_grids()
    with torch.inference_mode():
        whole = decoder(grids)
        monkeypatch.setattr("sagittal.networks.segformer3d_decoder._SLAB_VOXELS", 60)  # five lines of 12
        torch.testing.assert_close(decoder(grids), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["zero_weight", "zero_bias", "equal_rows", "wide_stage"])
def test_projections_without_full_rank_stay_exact(change: str) -> None:
    decoder, grids = trained_decoder(width=6 if change == "wide_stage" else 32), token_grids()
    projection = decoder.linear_c1
    with torch.no_grad():
        if change == "zero_weight":
            projection.proj.weight.zero_()
            projection.proj.bias.zero_()
        elif change == "zero_bias":
            projection.proj.bias.zero_()
        elif change == "equal_rows":
            projection.proj.weight[:, 1] = projection.proj.weight[:, 0]
        logits = decoder(grids)
        expected = published_decoder(decoder.double(), [grid.double() for grid in grids])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(positions=st.integers(1, 12), size=st.integers(1, 50))
def test_interpolation_matrix_is_linear_interpolation(positions: int, size: int) -> None:
    matrix = interpolation_matrix(positions, size)
    assert matrix.shape == (size, positions)
    expected = nn.functional.interpolate(
        torch.eye(positions, dtype=torch.float64)[None], size=size, mode="linear", align_corners=False
    )
    torch.testing.assert_close(matrix.double(), expected[0].t(), rtol=0, atol=1e-6)


def test_interpolation_matrix_made_at_inference_serves_training() -> None:
    interpolation_matrix.cache_clear()
    with torch.inference_mode():
        upsample_logits(torch.randn(1, 2, 3, 4, 5), 4, (12, 16, 20))
    logits = torch.randn(1, 2, 3, 4, 5, requires_grad=True)
    upsample_logits(logits, 4, (12, 16, 20)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 64.0))


@pytest.mark.parametrize("sizes", [(9, 13, 20), (12, 16, 17), (13, 20)])
def test_logits_are_upsampled_then_cropped(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *(-(-size // 4) for size in sizes))
    ours = upsample_logits(logits.movedim(1, -1).contiguous().movedim(-1, 1), 4, sizes)
    mode = "trilinear" if len(sizes) == 3 else "bilinear"
    expected = nn.functional.interpolate(logits, scale_factor=4, mode=mode, align_corners=False)
    expected = expected[(..., *(slice(size) for size in sizes))]
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(native, "eager", lambda *_tensors: False)
    assert torch.equal(upsample_logits(logits, 4, sizes), expected)


def test_inference_never_holds_the_finest_map_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}
    network = SegFormer3D(1, 2, **small, mlp_ratios=(1, 1, 1, 1), decoder_dim=64).eval()
    monkeypatch.setattr("sagittal.networks.segformer3d_decoder._SLAB_VOXELS", 256)
    with (
        torch.inference_mode(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
    ):
        network(torch.randn(1, 1, 32, 48, 64))
    # Finest grid: 8 x 12 x 16 = 1536 voxels; what ReLU takes is as large as it gets.
    seen = [event.input_shapes[0] for event in profile.events() if event.name in ("aten::relu_", "aten::relu")]
    assert seen == [[16, 16, 64]] * 6
