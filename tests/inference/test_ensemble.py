"""Bundles whose probabilities are averaged, against the mean over whole volumes."""

from __future__ import annotations

import errno
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_network import scan_of, tiny_plan
from torch import nn

import sagittal
from sagittal.bundle import pack, read_bundle
from sagittal.data.label_index import label_index
from sagittal.data.preprocessing import Frame, frame_of
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.inference import averaging
from sagittal.inference.averaging import SCRATCH, ShareSums, logits_of
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.ensemble import EnsemblePredictor, Member, load, predictor_of, require_alike
from sagittal.inference.predictor import Predictor
from sagittal.inference.probabilities import KEY, ProbabilityFile, probabilities_of
from sagittal.inference.run_report import Choices
from sagittal.inference.uncertainty import Disagreement, EntropyMap
from sagittal.plan import DatasetSpec, Label, Plan
from sagittal.plan.postprocessing import MinimumVolume
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume

REGIONS = DatasetSpec(
    name="r",
    channel_names=("a",),
    labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
    regions_class_order=(700, 2),
    file_ending=".nii",
)
OBLIQUE = np.array([[0, -2.0, 0, 5], [0, 0, 1.5, -3], [-1.0, 0, 0, 8], [0, 0, 0, 1]])
WAYS: tuple[dict[str, Any], ...] = (
    {"preprocessing.spacing_mm": [2.0, 1.0, 1.5]},
    {"preprocessing.transpose": [2, 0, 1], "preprocessing.crop_to_nonzero": True},
    {"preprocessing.orientation": "stored", "patch.size": [12, 16, 16], "preprocessing.crop_to_nonzero": True},
)


def plan_of(spec: DatasetSpec, changes: dict[str, Any], seed: int = 0) -> tuple[Plan, nn.Module]:
    """Return a plan, and a network that looks at neighbours, so that spacing and order of axes matter."""
    plan = tiny_plan(spec, **{"inference.mirror_axes": [], "inference.overlap": 0.25, **changes})
    network = nn.Conv3d(len(spec.channel_names), spec.num_outputs, 3, padding=1)
    weight = np.random.default_rng(seed).normal(size=network.weight.shape).astype(np.float32)
    network.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.linspace(-2, 2, spec.num_outputs)})
    return plan, network.eval()


def member_of(plan: Plan, *networks: nn.Module) -> Member:
    return Member(plan, lambda: TorchEngine(plan, networks, "cpu"), plan.dataset.name)


def members_of(spec: DatasetSpec, ways: Sequence[dict[str, Any]] = WAYS) -> list[Member]:
    return [member_of(*plan_of(spec, way, seed)) for seed, way in enumerate(ways)]


def scan_with_air() -> Volume:
    scan = scan_of((13, 12, 17), OBLIQUE)
    scan.array[0, :4] = 0
    scan.array[0, :, :, 19:] = 0
    return scan


def shares_on_grid(member: Member, scan: Volume) -> np.ndarray[Any, Any]:
    """Return the probabilities of one model alone, (K, D, H, W) on the scan's grid, in float64."""
    spec = member.plan.dataset
    frame, slabs = frame_of(scan, member.plan.preprocessing), list[np.ndarray[Any, Any]]()
    predictor = Predictor(member.plan, member.load(), postprocessing=False)
    predictor.predict(scan, consumers=(lambda rows, logits: slabs.append(logits.copy()),))
    logits = np.concatenate(slabs, axis=1).astype(np.float64)
    shares = 1 / (1 + np.exp(-logits)) if spec.has_regions else np.exp(logits) / np.exp(logits).sum(axis=0)
    whole = np.zeros((spec.num_outputs, *frame.stored_shape))
    whole[0] = 0 if spec.has_regions else 1
    for target, output in zip(whole, shares, strict=True):
        frame.crop(target)[...] = output
    return whole


def decided(shares: np.ndarray[Any, Any], spec: DatasetSpec) -> np.ndarray[Any, Any]:
    return np.asarray(label_index(spec).decode(shares - 0.5 if spec.has_regions else shares))


def clear(shares: np.ndarray[Any, Any], spec: DatasetSpec) -> np.ndarray[Any, Any]:
    """Where rounding decides nothing."""
    if spec.has_regions:
        return np.asarray((np.abs(shares - 0.5) > 1e-4).all(axis=0))
    second, first = np.sort(shares, axis=0)[-2:]
    return np.asarray(first - second > 1e-4)


@pytest.mark.parametrize("spec", [untrained_spec(4), REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1), (2, 0)])
def test_it_is_the_mean_of_the_probabilities_whatever_the_grids_axes_and_crops(
    spec: DatasetSpec, order: tuple[int, ...], tmp_path: Path
) -> None:
    members, scan = members_of(spec), scan_with_air()
    members = [members[number] for number in order]
    mean = np.mean([shares_on_grid(member, scan) for member in members], axis=0)
    ensemble = EnsemblePredictor(members, scratch=tmp_path / "deep" / "scratch")
    frame = frame_of(scan, ensemble.plan.preprocessing)
    with ProbabilityFile(tmp_path / "p.npz", spec, frame) as file:
        got = ensemble.predict(scan, consumers=(file,)).array[0]
        with np.load(file.finish()) as content:
            found = content[KEY].astype(np.float64)
    np.testing.assert_allclose(found, mean, atol=6e-4)
    expected, sure = decided(mean, spec), clear(mean, spec)
    assert sure.mean() > 0.99 and len(np.unique(expected)) > 1
    np.testing.assert_array_equal(got[sure], expected[sure])
    alone = decided(shares_on_grid(members[0], scan), spec)
    assert (alone != expected).mean() > 0.01
    assert list((tmp_path / "deep" / "scratch").iterdir()) == []


def test_rounding_on_disk_is_far_below_float16() -> None:
    # 0.4998 against 0.4996 in two networks' mean: float16 has steps of 0.0002 there.
    plan = tiny_plan(untrained_spec(2))
    frame = frame_of(scan_of((3, 4, 5)), plan.preprocessing)
    share = np.random.default_rng(0).uniform(0.01, 0.99, (2, 4, 5)).astype(np.float32)
    share[0] = 1 - share[1]
    with ShareSums(plan.dataset, frame, 2, Path(), keeps_votes=False) as sums:
        sums.add(0, 1, slice(0, 4), slice(0, 5), logits_of(share, has_regions=False))
        totals, votes = sums.totals(1, slice(0, 4))
        untouched, _ = sums.totals(2, slice(1, 3))
    assert votes == [] and np.abs(totals - share).max() < 2e-5
    assert (untouched[0] == 1).all() and not untouched[1].any()


def test_many_networks_do_not_overflow() -> None:
    plan = tiny_plan(untrained_spec(3))
    frame = frame_of(scan_of((2, 3, 4)), plan.preprocessing)
    sure = np.zeros((3, 3, 4), np.float32)
    sure[2] = 90
    with ShareSums(plan.dataset, frame, 30, Path(), keeps_votes=False) as sums:
        for network in range(29):
            sums.add(network, 0, slice(0, 3), slice(0, 4), sure)
        totals, _ = sums.totals(0, slice(0, 3))
    np.testing.assert_allclose(totals[2], 29, rtol=1e-5)
    np.testing.assert_allclose(totals[:2], 0, atol=1e-3)


@pytest.mark.parametrize("has_regions", [False, True])
def test_logits_give_back_their_probabilities(has_regions: bool) -> None:
    shares = np.array([[1.0, 0.25, 0.5], [0.0, 0.75, 0.5]], np.float32)
    logits = logits_of(shares, has_regions=has_regions)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(probabilities_of(logits, has_regions=has_regions), shares, atol=1e-6)


@pytest.mark.parametrize("spec", [untrained_spec(3), REGIONS], ids=["classes", "regions"])
def test_agreement_is_between_the_models(spec: DatasetSpec) -> None:
    members, scan = members_of(spec), scan_with_air()
    votes = [shares_on_grid(member, scan) for member in members]
    masks = [
        vote > 0.5 if spec.has_regions else np.eye(3, dtype=bool)[vote.argmax(axis=0)].transpose(3, 0, 1, 2)
        for vote in votes
    ]
    found = Disagreement(spec)
    EnsemblePredictor(members).predict(scan, disagreement=found)
    assert found.looked
    for number, (name, dice) in enumerate(found.agreement().items(), start=0 if spec.has_regions else 1):
        pairs = [(a, b) for a in range(3) for b in range(a)]
        shared = sum((masks[a][number] & masks[b][number]).sum() for a, b in pairs)
        sizes = sum(masks[a][number].sum() + masks[b][number].sum() for a, b in pairs)
        assert dice == pytest.approx(2 * shared / sizes, abs=2e-3), name
    assert found.agreement()


def test_seventeen_regions_need_two_words_of_votes() -> None:
    labels = tuple(Label(name=f"r{value}", values=(value,)) for value in range(1, 18))
    spec = REGIONS.replace(labels=labels, regions_class_order=tuple(range(1, 18)))
    frame = frame_of(scan_of((2, 3, 4)), tiny_plan(spec).preprocessing)
    logits = np.random.default_rng(0).normal(size=(2, 17, 3, 4)).astype(np.float32)
    with ShareSums(spec, frame, 3, Path(), keeps_votes=True) as sums:
        for network in range(2):
            sums.add(network, 1, slice(0, 3), slice(0, 4), logits[network])
        _, votes = sums.totals(1, slice(0, 3))
    for vote, expected in zip(votes, logits, strict=True):
        np.testing.assert_array_equal(vote[:, 0], expected > 0)


def test_equal_models_give_what_one_gives_and_the_first_ones_rules_count() -> None:
    plan, network = plan_of(untrained_spec(3), {})
    everything = tuple(MinimumVolume(label=label.name, volume_ml=1e6) for label in plan.dataset.labels)
    ruled, scan = plan.replace(postprocessing=everything), scan_of((20, 19, 18))
    same = EnsemblePredictor([member_of(plan, network), member_of(ruled, network)])
    alone = Predictor(plan, TorchEngine(plan, [network], "cpu")).predict(scan).array
    assert (same.predict(scan).array != alone).mean() < 1e-3 and alone.any()
    swapped = [member_of(ruled, network), member_of(plan, network)]
    assert not EnsemblePredictor(swapped).predict(scan).array.any()
    assert EnsemblePredictor(swapped, postprocessing=False).predict(scan).array.any()


def test_it_takes_files_and_tells_its_time_and_windows(tmp_path: Path) -> None:
    members, scan = members_of(untrained_spec(3), WAYS[:2]), scan_with_air()
    path, seen = scan.write(tmp_path / "scan.nii.gz"), list[tuple[int, int]]()
    ensemble = EnsemblePredictor(members)
    held = ensemble.predict(scan)
    got = ensemble.predict(path, memory_gib=4.0, on_window=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(got.array, held.array)
    assert sum(done == total for done, total in seen) == 2
    assert ensemble.last_timings is not None and ensemble.last_timings.seconds["network"] > 0
    assert ensemble.engines == (("torch", "fp32", "cpu"),) * 2
    entropy = EntropyMap(ensemble.plan.dataset, frame_of(scan, ensemble.plan.preprocessing))
    ensemble.predict([scan], consumers=(entropy,))
    assert entropy.on_grid().max() > 0.1


def test_networks_are_loaded_again_where_they_do_not_fit_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def counted(name: str, plan: Plan, network: nn.Module) -> Member:
        def build() -> TorchEngine:
            loads.append(name)
            return TorchEngine(plan, [network], "cpu")

        return Member(plan, build)

    members = [counted(name, *plan_of(untrained_spec(3), {}, seed)) for seed, name in enumerate("ab")]
    ensemble, scan = EnsemblePredictor(members), scan_of((20, 19, 18))
    expected = ensemble.predict(scan, memory_gib=8.0).array
    assert loads == ["a", "b"]
    monkeypatch.setattr("sagittal.inference.ensemble.KEPT_SHARE", 0.0)
    np.testing.assert_array_equal(ensemble.predict(scan, memory_gib=8.0).array, expected)
    assert loads == ["a", "b", "a"]
    monkeypatch.undo()
    # Alone in memory it fits.
    predict, refused = Predictor.predict, list[float | None]()

    def once(self: Predictor, *arguments: Any, memory_gib: float | None, **options: Any) -> Volume:
        if not refused:
            refused.append(memory_gib)
            raise ResourceError("needs more", code="memory")
        return predict(self, *arguments, memory_gib=memory_gib, **options)

    ensemble = EnsemblePredictor(members)
    monkeypatch.setattr(Predictor, "predict", once)
    np.testing.assert_array_equal(ensemble.predict(scan).array, expected)
    assert loads == ["a", "b", "a", "a", "b", "a"]


def test_what_never_fits_is_refused_before_a_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = EnsemblePredictor(members_of(untrained_spec(3), WAYS[:2]))
    monkeypatch.setattr(TorchEngine, "logits", lambda *_: pytest.fail("the network must not run"))
    with pytest.raises(ResourceError, match=r"GiB are allowed") as caught:
        ensemble.predict(scan_of((20, 21, 22)), memory_gib=0.2)
    assert caught.value.code == "memory"
    with pytest.raises(PlanError, match="above 0"):
        ensemble.predict(scan_of((20, 21, 22)), memory_gib=-1.0)


def test_a_disk_without_room_is_told_before_a_network_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ensemble = EnsemblePredictor(members_of(untrained_spec(3), WAYS[:2]), scratch=tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(averaging.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(TorchEngine, "logits", lambda *_: pytest.fail("the network must not run"))
    with pytest.raises(ResourceError, match=r"averaging 2 bundles .* of disk .*0\.00 GiB are free") as caught:
        ensemble.predict(scan_of((20, 21, 22)))
    assert caught.value.code == SCRATCH


def test_a_disk_that_fills_up_meanwhile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShareSums, "_seek", full)
    with pytest.raises(ResourceError, match=r"No space left.*Free space") as caught:
        EnsemblePredictor(members_of(untrained_spec(3), WAYS[:2]), scratch=tmp_path).predict(scan_of((9, 8, 7)))
    assert caught.value.code == "disk" and list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_models() -> None:
    # 24 classes, so that what grows with models x classes x volume would be seen.
    spec, scan = untrained_spec(24), scan_of((48, 32, 40))
    plan, network = plan_of(spec, {"patch.size": [16, 32, 40]})
    peaks = []
    for count in (2, 5):
        ensemble = EnsemblePredictor([member_of(plan, network)] * count)
        tracemalloc.start()
        ensemble.predict(scan)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    probabilities = 24 * 48 * 32 * 40 * 2
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] - peaks[0] < probabilities / 4


def _other(**changes: Any) -> Plan:
    return tiny_plan(untrained_spec(3, 2).replace(**changes))


def test_models_that_mean_other_things_are_refused_by_name() -> None:
    first = ("one", tiny_plan(untrained_spec(3, 2)))
    labels = untrained_spec(3).labels
    other = untrained_spec(3, 2).channel_names[::-1]
    for plan, what in (
        (_other(channel_names=other), "its channels are channel_1, channel_0; those of one are channel_0, channel_1"),
        (_other(labels=labels[:1]), "its labels are class_1 1; those of one are class_1 1, class_2 2"),
        (_other(labels=(labels[0], Label(name="x", values=(2,)))), "its labels are"),
        (
            _other(labels=(labels[0], Label(name="class_2", values=(3,)))),
            "its labels are class_1 1, class_2 3; those of one are",
        ),
        (_other(regions_class_order=(1, 2)), "its regions' values are 1, 2; those of one are none"),
        (_other(label_map=((2, -1),)), "its original values are 2 is -1; those of one are none"),
    ):
        with pytest.raises(PlanError, match=f"^two: {what}") as caught:
            require_alike([first, ("two", plan)])
        assert caught.value.code == "options" and "the same" in caught.value.message
    require_alike([first, ("two", _other(name="another", file_ending=".nrrd"))])
    with pytest.raises(PlanError, match="two bundles or more"):
        require_alike([first])


def test_channels_can_be_missing_where_every_model_does_without() -> None:
    spec, scan = untrained_spec(3, 2), scan_of((17, 18, 19))
    dropout = {"training.augmentation.channel_dropout": 0.2}
    members = members_of(spec, [dropout, {**dropout, **WAYS[1]}])
    got = EnsemblePredictor(members, missing=("channel_1",)).predict(scan)
    assert got.array.shape == scan.array.shape
    with pytest.raises(DataError, match="1 channels; the plan has 2"):
        EnsemblePredictor(members).predict(scan)
    with pytest.raises(DataError, match="channel_dropout"):
        EnsemblePredictor(members_of(spec, [dropout, {}]), missing=("channel_1",))


def test_bundles_and_packages_are_loaded_together(tmp_path: Path) -> None:
    paths = [write_random_bundle(tmp_path / f"b{number}", tiny_plan(**way)) for number, way in enumerate(WAYS[:2])]
    package = pack(paths[1], tmp_path / "b1.sagittal")
    scan = scan_with_air()
    got = sagittal.load([paths[0], package], device="cpu").predict(scan, mirror=False)
    choices = Choices(mirror=False)
    again = predictor_of([read_bundle(path) for path in paths], choices, "cpu", scratch=tmp_path / "s")
    np.testing.assert_array_equal(again.predict(scan, mirror=False).array, got.array)
    assert isinstance(load(paths[0]), Predictor) and isinstance(load([paths[0]]), Predictor)
    assert isinstance(predictor_of([read_bundle(paths[0])], choices, "cpu"), Predictor)
    with pytest.raises(PlanError, match="given: 0"):
        load([])


def test_a_frame_of_zeros_alone_is_the_whole_scan() -> None:
    members, scan = members_of(untrained_spec(3), WAYS[1:]), scan_of((9, 8, 7))
    scan.array[...] = 0
    frame: Frame = frame_of(scan, EnsemblePredictor(members).plan.preprocessing)
    assert sorted(frame.cropped_shape) == [7, 8, 9]
    assert EnsemblePredictor(members).predict(scan).array.shape == (1, 9, 8, 7)
