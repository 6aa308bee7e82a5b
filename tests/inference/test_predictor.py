from __future__ import annotations

import tempfile
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_network import Threshold, predictor_of, scan_of, tiny_plan
from torch import Tensor, nn

import sagittal
from sagittal.bundle import read_bundle, write_bundle
from sagittal.errors import BundleError, DataError, ResourceError
from sagittal.inference import blending, scratch
from sagittal.inference import predictor as predictor_module
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.memory import Choice, Workload
from sagittal.inference.predictor import Predictor, load
from sagittal.inference.scratch import ScratchBlocks
from sagittal.networks.build import build_network
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.geometry import axis_codes

ORIENTATIONS = [(order, signs) for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)]


def affine_of(order: tuple[int, ...], signs: tuple[float, ...], spacing: tuple[float, ...] = (1, 1, 1)) -> Any:
    affine = np.zeros((4, 4))
    for axis, (world, sign, step) in enumerate(zip(order, signs, spacing, strict=True)):
        affine[world, axis] = sign * step
    affine[:, 3] = (-12.5, 7.25, 3.0, 1.0)
    return affine


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_every_orientation_comes_back_on_its_own_grid(
    thresholding: Predictor, order: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    scan = scan_of((7, 11, 19), affine_of(order, signs))
    labels = thresholding.predict(scan, mirror=False)
    assert labels.array.dtype == np.uint8 and labels.array.shape == scan.array.shape
    assert labels.affine.tobytes() == scan.affine.tobytes()
    np.testing.assert_array_equal(labels.array[0], Threshold.expected(scan.array))


def test_orientation_reaches_the_network() -> None:
    # Marks the upper half of its first axis: the head, whatever the file's order.
    class Upper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.linspace(-1, 1, x.shape[2])[None, None, :, None, None]
            return torch.cat([-ramp, ramp, ramp - 9], dim=1).expand(-1, -1, -1, *x.shape[3:])

    plan = tiny_plan().replace(patch=tiny_plan().patch.replace(size=(16, 18, 20)))
    predictor = predictor_of(plan, Upper().eval())
    # Stored axes: D to the left, H to the feet, W to the front.
    scan = scan_of((20, 16, 18), affine_of((0, 2, 1), (-1.0, -1.0, 1.0)))
    assert axis_codes(scan.affine)[1] == "I"
    labels = predictor.predict(scan, mirror=False).array[0]
    assert (labels[:, :8] == 1).all() and (labels[:, 8:] == 0).all()


def test_oblique_anisotropic_file_keeps_its_geometry_bit_for_bit(tmp_path: Path, thresholding: Predictor) -> None:
    rng = np.random.default_rng(5)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1 / 3, 2.7, 0.9])
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    scan_of((17, 9, 13), affine).write(tmp_path / "scan.nii.gz")
    scan = read_volume(tmp_path / "scan.nii.gz")
    thresholding.predict(tmp_path / "scan.nii.gz", mirror=False).write(tmp_path / "labels.nii.gz")
    labels = read_volume(tmp_path / "labels.nii.gz")
    assert labels.affine.tobytes() == scan.affine.tobytes()
    assert labels.header == scan.header and labels.array.shape == scan.array.shape


def test_real_orientations_agree(shared_data: Path) -> None:
    folder = shared_data / "orientations"
    plan = tiny_plan(
        **{"preprocessing.spacing_mm": [8.0, 8.0, 8.0], "preprocessing.normalization": [{"kind": "zscore"}]}
    )
    predictor = predictor_of(plan, Threshold().eval())
    files = sorted(folder.glob("*.nii.gz"))
    assert len(files) > 3
    results = [predictor.predict(path, mirror=False).reoriented() for path in files]
    for other in results[1:]:
        assert other.array.shape == results[0].array.shape
        assert (other.array != results[0].array).mean() < 1e-3


def test_resampling_and_crop_find_their_way_back() -> None:
    array = np.zeros((1, 30, 26, 22), np.float32)
    array[0, 5:25, 6:22, 4:18] = 1.0
    array[0, 9:21, 10:18, 8:14] = 3.0
    scan = Volume(array, affine_of((2, 1, 0), (1, 1, 1), (0.5, 1.0, 2.0)))
    plan = tiny_plan(**{"preprocessing.crop_to_nonzero": True})
    labels = predictor_of(plan, Threshold().eval()).predict(scan).array[0]
    expected = Threshold.expected(array)
    for value in (1, 2):
        overlap = (
            2 * ((labels == value) & (expected == value)).sum() / ((labels == value).sum() + (expected == value).sum())
        )
        assert overlap > 0.85
    assert (labels[expected == 0] == 0).mean() > 0.99
    outside = np.ones_like(labels, bool)
    outside[5:25, 6:22, 4:18] = False
    assert not labels[outside].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 5), (16, 18, 20), (33, 35, 37)])
def test_any_size_comes_back(thresholding: Predictor, shape: tuple[int, int, int]) -> None:
    scan = scan_of(shape)
    labels = thresholding.predict(scan)
    np.testing.assert_array_equal(labels.array[0], Threshold.expected(scan.array))


def test_several_channels_as_files_volumes_or_one_volume(tmp_path: Path) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = Threshold()(x[:, 1:])
            return logits

    predictor = predictor_of(tiny_plan(untrained_spec(3, channels=2)), Second().eval())
    first, second = scan_of((9, 10, 11), seed=1), scan_of((9, 10, 11), seed=2)
    expected = Threshold.expected(second.array)
    for number, volume in enumerate((first, second)):
        volume.write(tmp_path / f"c{number}.nii.gz")
    both = Volume(np.concatenate([first.array, second.array]), first.affine)
    for scan in ([first, second], both, [tmp_path / "c0.nii.gz", str(tmp_path / "c1.nii.gz")]):
        np.testing.assert_array_equal(predictor.predict(scan).array[0], expected)
    with pytest.raises(DataError, match="1 channel given, but the model takes 2: channel_0, channel_1") as caught:
        predictor.predict(first)
    assert caught.value.code == "channel_count"
    with pytest.raises(DataError, match="3 channels given"):
        predictor.predict([first, second, second])
    with pytest.raises(DataError, match="channels channel_0 and channel_1: grids differ"):
        predictor.predict([first, scan_of((9, 10, 11), affine_of((2, 1, 0), (1, 1, 1)))])


def test_regions_and_large_values() -> None:
    labels = (Label(name="whole", values=(1, 700)), Label(name="core", values=(700,)))
    spec = DatasetSpec(
        name="r", channel_names=("a",), labels=labels, regions_class_order=(1, 700), file_ending=".nii.gz"
    )

    class Regions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x - 0.5, x - 2], dim=1)

    scan = scan_of((9, 10, 11))
    got = predictor_of(tiny_plan(spec), Regions().eval()).predict(scan).array
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, np.where(scan.array > 2, 700, np.where(scan.array > 0.5, 1, 0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scans_that_are_not_finite_are_refused(thresholding: Predictor, bad: float) -> None:
    scan = scan_of((5, 6, 7))
    scan.array[0, 2, 3, 4] = bad
    with pytest.raises(DataError, match="channel channel_0: holds NaN or infinite") as caught:
        thresholding.predict(scan)
    assert caught.value.code == "not_finite"


def test_the_network_goes_back_to_the_mode_it_was_in(thresholding: Predictor) -> None:
    network = Threshold().train()
    predictor_of(tiny_plan(), network).predict(scan_of((5, 6, 7)))
    assert network.training


def test_mirroring_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    logits = TorchEngine.logits

    def counting(self: TorchEngine, windows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shown.append(len(windows))
        return logits(self, windows)

    monkeypatch.setattr(TorchEngine, "logits", counting)
    predictor = predictor_of(tiny_plan(**{"inference.mirror_axes": [0, 2]}), Threshold())
    seen: list[tuple[int, int]] = []
    predictor.predict(scan_of((5, 6, 7)), mirror=False, on_window=lambda done, total: seen.append((done, total)))
    assert shown == [1] and seen == [(1, 1)]
    predictor.predict(scan_of((5, 6, 7)))
    assert sum(shown) == 1 + 4


def test_mirroring_keeps_the_sides_of_a_network_that_knows_them() -> None:
    # A structure is left or right by what lies to its right, so a mirrored scan shows it as the other one.
    class Sided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            slope = torch.gradient(x[:, 0], dim=3)[0]
            return torch.stack([0.05 - slope.abs(), slope, -slope], dim=1)

    sides = (Label(name="kidney left", values=(4,)), Label(name="kidney right", values=(9,)))
    plan = tiny_plan(untrained_spec(3).replace(labels=sides))
    every = plan.inference.replace(mirror_axes=(0, 1, 2))
    paired = plan.training.augmentation.replace(mirror_axes=(0, 1, 2), swapped_labels=((2, 4, 9),))
    plan = plan.replace(inference=every, training=plan.training.replace(augmentation=paired))
    predictor = predictor_of(plan, Sided().eval())
    scan = scan_of((9, 11, 19))
    straight, mirrored = (predictor.predict(scan, mirror=mirror).array for mirror in (False, True))
    assert set(np.unique(straight)) == {0, 4, 9}
    assert (straight == mirrored).mean() > 0.999
    without = paired.replace(swapped_labels=())
    confused = predictor_of(plan.replace(training=plan.training.replace(augmentation=without)), Sided().eval())
    assert (straight == confused.predict(scan).array).mean() < 0.9


def test_memory_that_does_not_suffice_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan()
    network = build_network(plan.network, 1, 3).eval()
    predictor = predictor_of(plan, network)
    scan = scan_of((30, 31, 32))
    monkeypatch.setattr(TorchEngine, "logits", lambda *_: pytest.fail("the network must not run"))
    with pytest.raises(ResourceError, match=r"needs 0\.\d\d GiB of memory .*0\.20 GiB are allowed"):
        predictor.predict(scan, memory_gib=0.2)


def test_the_budget_changes_no_voxel(tmp_path: Path) -> None:
    plan = tiny_plan(**{"preprocessing.spacing_mm": [2.0, 1.0, 1.0]})
    predictor = load(write_random_bundle(tmp_path / "b", plan))
    scan = scan_of((50, 33, 34))
    within = predictor.predict(scan, mirror=False, memory_gib=1.0)
    np.testing.assert_array_equal(predictor.predict(scan, mirror=False).array, within.array)


def test_a_file_takes_what_windows_share_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_random_bundle(tmp_path / "b", tiny_plan())
    scan = scan_of((50, 33, 34))
    expected = load(bundle, device="cpu").predict(scan, mirror=False)
    chosen: list[Workload] = []

    def short(work: Workload, *_: Any, **__: Any) -> Choice:
        chosen.append(work)
        return Choice(1, levels_in_file=2)

    monkeypatch.setattr(predictor_module, "choose", short)
    (tmp_path / "out").mkdir()
    got = load(bundle, device="cpu", scratch=tmp_path / "out").predict(scan, mirror=False, memory_gib=8.0)
    np.testing.assert_array_equal(got.array, expected.array)
    assert chosen[0].may_use_file and not any((tmp_path / "out").iterdir())
    in_memory = load(bundle, device="cpu")
    Predictor(in_memory.plan, in_memory.engine).predict(scan, mirror=False)
    assert not chosen[1].may_use_file


def test_a_plain_load_takes_a_file_in_the_temporary_folder_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[Path] = []
    blocks = blending.ScratchBlocks

    def noted(folder: Path, *given: Any) -> ScratchBlocks:
        made.append(folder)
        return blocks(folder, *given)

    monkeypatch.setattr(blending, "ScratchBlocks", noted)
    monkeypatch.setattr(scratch, "_is_in_memory", lambda _: False)
    plain = load(write_random_bundle(tmp_path / "b", tiny_plan()), device="cpu")
    scan, works = scan_of((50, 33, 34)), list[Workload]()

    def tight(work: Workload, *_: Any, **__: Any) -> Choice:
        works.append(work)
        return Choice(1, levels_in_file=2)

    expected = plain.predict(scan, mirror=False)
    assert not made
    monkeypatch.setattr(predictor_module, "choose", tight)
    np.testing.assert_array_equal(plain.predict(scan, mirror=False).array, expected.array)
    assert works[0].may_use_file and set(made) == {tmp_path}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_refusal_tells_why_a_file_could_not_help(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "b", tiny_plan())
    absent = load(bundle, device="cpu", scratch=tmp_path / "absent")
    with pytest.raises(ResourceError, match=r"a part of it, but .*absent: no file can be made there \(No such file"):
        absent.predict(scan_of((50, 33, 34)), mirror=False, memory_gib=0.01)
    with pytest.raises(ResourceError) as caught:
        load(bundle, device="cpu", scratch=tmp_path).predict(scan_of((50, 33, 34)), mirror=False, memory_gib=0.01)
    assert "a part of it" not in caught.value.message


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 TB")]
)
def test_running_out_of_memory_is_explained(
    monkeypatch: pytest.MonkeyPatch, thresholding: Predictor, error: Any
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Threshold, "forward", fail)
    with pytest.raises(ResourceError, match="memory of cpu does not suffice"):
        thresholding.predict(scan_of((5, 6, 7)))


def test_other_runtime_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch, thresholding: Predictor) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Threshold, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        thresholding.predict(scan_of((5, 6, 7)))


def test_load_averages_the_folds_of_a_bundle(tmp_path: Path) -> None:
    plan = tiny_plan()
    path = write_random_bundle(tmp_path / "two", plan, folds=("fold_0", "fold_1"))
    scan = scan_of((20, 21, 22))
    state = torch.random.get_rng_state()
    together = load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    bundle = read_bundle(path)
    networks = []
    for name in bundle.weight_names:
        network = build_network(plan.network, 1, 3).eval()
        network.load_state_dict({key: torch.tensor(array) for key, array in bundle.weights(name).items()})
        networks.append(network)

    class Mean(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return sum((network(x) for network in self), torch.zeros(())) / 2

    expected = predictor_of(plan, Mean(networks).eval()).predict(scan, mirror=False)
    got = together.predict(scan, mirror=False)
    assert (got.array != expected.array).mean() < 1e-3
    alone = predictor_of(plan, networks[0]).predict(scan, mirror=False)
    assert (alone.array != expected.array).mean() > 1e-2


@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
def test_both_networks_predict_from_a_bundle(tmp_path: Path, name: str) -> None:
    small = {"network.channels": 4, "network.block_counts": [1] * 9} if name == "mednext-s" else {}
    plan = untrained_plan(name, untrained_spec(2), patch_size=(16, 16, 32), settings=small)
    labels = sagittal.load(write_random_bundle(tmp_path / "b", plan)).predict(scan_of((18, 20, 22)), mirror=False)
    assert labels.array.shape == (1, 18, 20, 22)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    weights = {"all": {"some.weight": np.ones((2, 2), np.float32)}}
    path = write_bundle(tmp_path / "b", plan=tiny_plan(), weights=weights, metrics={})
    with pytest.raises(BundleError, match="weights 'all' do not fit the plan's network") as caught:
        load(path, device="cpu", engine="torch")
    assert caught.value.code == "weights_do_not_fit"


def test_load_takes_a_bundle_that_is_read_and_knows_its_devices(tmp_path: Path) -> None:
    path = write_random_bundle(tmp_path / "b", tiny_plan())
    assert load(read_bundle(path), device="cpu").device == "cpu"
    with pytest.raises(ResourceError, match="is not a device"):
        load(path, device="quantum")
