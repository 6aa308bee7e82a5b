"""What every image format promises: a format's test class inherits `ReaderContract`, or `WriterContract`."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagittal.errors import DataError, ResourceError
from sagittal.testing.strategies import volumes
from sagittal.volumes import Volume, read_header, read_labels, read_volume
from sagittal.volumes.geometry import differences
from sagittal.volumes.io import is_scan, read_stored, scan_files, scan_name

# Each format runs the same inherited tests, which hypothesis would otherwise call one test with several executors.
quick = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)
INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)
REFUSED = ("unreadable", "not_3d")


def a_scan(dtype=np.int16, shape=(3, 5, 4)) -> Volume:
    """Return an oblique scan whose voxels all differ."""
    axes = np.array([[0.0, -0.3, 1.5], [0.2, 2.0, 0.4], [3.0, -0.0, -0.3]])
    directions, _ = np.linalg.qr(axes)
    # DICOM can't store the other handedness.
    directions[:, 0] *= -np.sign(np.linalg.det(directions))
    affine = np.eye(4)
    affine[:3, :3] = directions * (3.0, 2.0, 1.5)
    affine[:3, 3] = (-40.5, 12.25, 7.125)
    count = int(np.prod(shape))
    values = np.random.default_rng(5).permutation(count).reshape(1, *shape) % 250
    return Volume(values.astype(dtype), affine)


class ReaderContract:
    """Tests that every reader passes.

    Attributes:
        suffix: of the files that `save` makes.
        dtypes: the voxel types that the format holds.
        tolerance_mm: how far a voxel may move by being stored.
    """

    suffix: str
    dtypes: tuple[type, ...]
    tolerance_mm: float

    @abstractmethod
    def save(self, folder: Path, name: str, volume: Volume) -> Path:
        """Write a volume of one channel in this format and return its path."""

    @abstractmethod
    def odd_scans(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """Return scans that are no volume of real numbers, as written by another library, and how each is refused."""

    @abstractmethod
    def oracle_read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return (D, H, W) values and the (d, h, w, 1) -> RAS affine as another library reads them."""

    def voxel_file(self, path: Path) -> Path:
        """Return the file that holds the last voxels."""
        return scan_files(path)[-1]

    def cut_voxels(self, path: Path) -> None:
        """Take the last byte of the voxels away."""
        voxels = self.voxel_file(path)
        voxels.write_bytes(voxels.read_bytes()[:-1])

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("format")

    def assert_same_place(self, geometry, other) -> None:
        assert geometry.shape == other.shape
        corners = np.stack(np.meshgrid(*[(0.0, size - 1.0) for size in other.shape], [1.0])).reshape(4, -1)
        moved = np.linalg.norm((geometry.affine @ corners - other.affine @ corners)[:3], axis=0)
        assert moved.max() <= self.tolerance_mm, f"{moved.max()} mm"

    def test_another_library_reads_the_same_scan(self, tmp_path):
        scan = a_scan()
        path = self.save(tmp_path, "scan", scan)
        values, affine = self.oracle_read(path)
        volume = read_volume(path)
        assert np.array_equal(values, scan.array[0])
        assert np.array_equal(volume.array[0], values)
        assert np.allclose(volume.affine, affine, atol=1e-5)
        assert volume.geometry.has_world

    def test_the_header_alone_tells_grid_and_type_and_reads_no_voxel(self, tmp_path):
        # Larger than what a reader of packed files reads ahead.
        scan = a_scan(np.int16, (40, 70, 72))
        scan = scan.with_array(np.random.default_rng(3).integers(0, 2000, scan.array.shape, dtype=np.int16))
        path = self.save(tmp_path, "scan", scan)
        whole = read_stored(path)
        self.cut_voxels(path)
        header = read_header(path)
        assert np.array_equal(header.geometry.affine, whole.affine)
        assert header.geometry.shape == whole.voxels.shape
        assert header.dtype == whole.voxels.dtype
        with pytest.raises(DataError):
            read_stored(path)

    def test_reading_changes_no_byte(self, tmp_path):
        path = self.save(tmp_path, "scan", a_scan())
        before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
        read_volume(path)
        read_labels(path)
        read_header(path)
        assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before

    def test_names_with_spaces_and_letters_of_any_alphabet(self, tmp_path):
        folder = tmp_path / "Müller, Жанна 患者"
        folder.mkdir()
        path = self.save(folder, "Größe 1.5 mm", a_scan())
        assert np.array_equal(read_volume(path).array, a_scan().array)
        assert scan_name(path) == "Größe 1.5 mm"
        assert is_scan(path)

    def test_labels_keep_their_type(self, tmp_path):
        for dtype in self.dtypes:
            if np.dtype(dtype).kind in "iu":
                labels, geometry = read_labels(self.save(tmp_path, f"labels_{np.dtype(dtype)}", a_scan(dtype)))
                assert labels.dtype == dtype
                assert np.array_equal(labels, a_scan(dtype).array[0])
                self.assert_same_place(geometry, a_scan().geometry)

    def test_what_is_no_volume_of_numbers_is_refused(self, tmp_path):
        scans = self.odd_scans(tmp_path)
        assert scans
        for name, (path, message) in scans.items():
            for read in (read_volume, read_labels, read_header):
                with pytest.raises(DataError, match=message) as caught:
                    read(path)
                assert caught.value.code in (*REFUSED, "multi_frame", "compressed"), name
                assert caught.value.message.startswith(f"{path}: "), name

    @pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.6, 0.9, 0.99])
    def test_a_truncated_file_is_refused(self, tmp_path, share):
        path = self.save(tmp_path, "scan", a_scan(np.int16, (9, 11, 10)))
        voxels = self.voxel_file(path)
        content = voxels.read_bytes()
        voxels.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match="xpected") as caught:
            read_volume(path)
        assert caught.value.code in REFUSED
        assert str(path) in caught.value.message or str(voxels) in caught.value.message

    def test_random_damage_is_a_data_error_or_harmless(self, tmp_path):
        path = self.save(tmp_path, "scan", a_scan())
        head = scan_files(path)[0]
        whole = head.read_bytes()
        random = np.random.default_rng(7)
        refused = 0
        for _ in range(80):
            content = bytearray(whole)
            for place in random.integers(0, min(len(content), 500), size=3):
                content[place] = random.choice([0, 32, 45, 57, 127, 255])
            head.write_bytes(content)
            try:
                assert read_volume(path).array.dtype == np.float32
            except DataError:
                refused += 1
        assert refused > 8


class WriterContract(ReaderContract):
    """Tests that every reader passes whose format is written too."""

    def save(self, folder: Path, name: str, volume: Volume) -> Path:
        return volume.write(folder / f"{name}{self.suffix}")

    @abstractmethod
    def oracle_write(self, path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
        """Write (D, H, W) voxels and a (d, h, w, 1) -> RAS affine with another library."""

    @quick
    @given(st.data())
    def test_writing_and_reading_is_exact(self, folder, data):
        volume = data.draw(volumes(dtype=data.draw(st.sampled_from(self.dtypes))))
        stored = read_stored(self.save(folder, "any", volume))
        assert stored.voxels.dtype == volume.array.dtype
        assert np.array_equal(stored.voxels, volume.array[0])
        assert not stored.is_scaled
        self.assert_same_place(stored.geometry, volume.geometry)
        assert differences(stored.geometry, volume.geometry) == ()

    @quick
    @given(volumes(dtype=np.int16))
    def test_another_library_reads_what_is_written_and_the_other_way_round(self, folder, volume):
        values, affine = self.oracle_read(self.save(folder, "ours", volume))
        assert np.array_equal(values, volume.array[0])
        assert np.allclose(affine, volume.affine, atol=max(self.tolerance_mm, 1e-6))
        theirs = read_volume(self.oracle_write(folder / f"theirs{self.suffix}", volume.array[0], volume.affine))
        assert np.array_equal(theirs.array, volume.array.astype(np.float32))
        self.assert_same_place(theirs.geometry, volume.geometry)

    def test_a_sheared_grid_keeps_its_shear(self, tmp_path):
        scan = a_scan()
        affine = scan.affine.copy()
        affine[:3, 1] += 0.4 * affine[:3, 2]
        sheared = Volume(scan.array, affine)
        self.assert_same_place(read_header(self.save(tmp_path, "sheared", sheared)).geometry, sheared.geometry)

    def test_an_upper_case_suffix_counts(self, tmp_path):
        scan = a_scan()
        path = scan.write(tmp_path / f"SCAN{self.suffix.upper()}")
        assert np.array_equal(read_volume(path).array, scan.array)

    def test_the_same_volume_is_written_as_the_same_bytes(self, tmp_path):
        for place in ("first", "second"):
            (tmp_path / place).mkdir()
            self.save(tmp_path / place, "scan", a_scan())
        first, second = ([file.read_bytes() for file in sorted((tmp_path / n).iterdir())] for n in ("first", "second"))
        assert first == second

    def test_all_files_of_a_scan_are_listed(self, tmp_path):
        path = self.save(tmp_path, "scan", a_scan())
        assert sorted(scan_files(path)) == sorted(tmp_path.iterdir())

    def test_byte_order_and_memory_layout_do_not_matter(self, tmp_path):
        scan = a_scan()
        turned = np.asfortranarray(scan.array.astype(">i2"))
        assert np.array_equal(read_volume(self.save(tmp_path, "turned", scan.with_array(turned))).array, scan.array)

    def test_masks_are_written_as_uint8(self, tmp_path):
        mask = a_scan().array > 20
        labels, _ = read_labels(self.save(tmp_path, "mask", a_scan().with_array(mask)))
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, mask[0])

    def test_types_that_the_format_lacks_are_refused(self, tmp_path):
        lacking = [dtype for dtype in (*INTEGERS, np.float16, np.float64, np.complex64) if dtype not in self.dtypes]
        assert np.float16 in lacking
        for dtype in lacking:
            with pytest.raises(DataError, match=f"can't hold {np.dtype(dtype)} voxels"):
                self.save(tmp_path, "odd", a_scan().with_array(a_scan().array.astype(dtype)))
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_the_old_file_and_no_part(self, tmp_path, monkeypatch):
        path = self.save(tmp_path, "scan", a_scan())
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            self.save(tmp_path, "scan", a_scan().with_array(a_scan().array + 1))
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert path in before


class PackedContract(WriterContract):
    """Tests that every reader passes whose voxels are packed and carry a checksum."""

    def test_a_flipped_bit_in_packed_voxels_is_refused(self, tmp_path):
        path = self.save(tmp_path, "scan", a_scan(np.int16, (9, 11, 10)))
        voxels = self.voxel_file(path)
        content = voxels.read_bytes()
        random = np.random.default_rng(1)
        for place in random.integers(len(content) // 3, len(content), size=60):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(random.integers(0, 8))
            voxels.write_bytes(flipped)
            try:
                assert np.array_equal(read_volume(path).array, a_scan(np.int16, (9, 11, 10)).array)
            except DataError as error:
                assert error.code == "unreadable"
            else:
                # Padding bits of the last block and gzip's size field of the whole are all that may change nothing.
                assert len(content) - place <= 12
