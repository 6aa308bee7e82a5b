from __future__ import annotations

import pytest
from pydantic import ValidationError

from sagittal.plan import ChannelIntensities, Fingerprint
from sagittal.plan.volume_range import VolumeRange

FINGERPRINT = Fingerprint(
    content_sha256="0" * 64,
    shapes_vox=((3, 4, 5), (6, 7, 8)),
    spacings_mm=((1.0, 0.1, 1 / 3), (1.0, 1.0, 2.0)),
    intensities=(
        ChannelIntensities(
            mean=0.1, median=0.2, std=1e-30, min=-1e30, max=5.0, percentile_00_5=-3.0, percentile_99_5=4.0
        ),
    ),
    median_relative_size_after_crop=0.7,
)


def test_round_trip_is_exact():
    assert Fingerprint.from_json(FINGERPRINT.to_json()) == FINGERPRINT
    assert FINGERPRINT.num_cases == 2


@pytest.mark.parametrize("changes", [{"shapes_vox": ()}, {"spacings_mm": ((1.0, 1.0, 1.0),)}])
def test_every_case_has_a_shape_and_a_spacing(changes):
    with pytest.raises(ValidationError, match="one shape and one spacing per case"):
        FINGERPRINT.replace(**changes)


def test_a_fingerprint_without_volumes_of_labels_is_written_as_earlier_versions_wrote_it():
    assert "label_volumes" not in FINGERPRINT.to_json()
    measured = FINGERPRINT.replace(label_volumes=(VolumeRange.of([1.5, 2.0, 0.0]),))
    assert Fingerprint.from_json(measured.to_json()) == measured
