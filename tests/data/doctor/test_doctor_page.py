"""The page of a diagnosis: self-contained, readable without pictures, and each picture shows what it is about."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from faulty_sets import AFFINE, MM, SHAPE, a_label_map, an_image, declare, look, write, write_case, write_sound_set
from PIL import Image

from sagittal.data.dataset import read_dataset
from sagittal.data.doctor import Finding, diagnose
from sagittal.data.doctor.page import MAX_PICTURED, write_page
from sagittal.data.doctor.repair import open_repairable
from sagittal.report.doctor import TITLES, DoctorPage, Told, render_doctor_page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sound_set(tmp_path / "set")


def page_of(folder: Path) -> str:
    dataset, declared = open_repairable(folder)
    path = folder.parent / "page.html"
    write_page(path, dataset, diagnose(dataset, replaced=declared.replaced), declared.replaced)
    return path.read_text()


class _Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def alts(html: str) -> list[str]:
    return [str(attrs["aria-label"]) for tag, attrs in _Reader(html).tags if tag == "svg" and "aria-label" in attrs]


def break_a_lot(folder: Path) -> None:
    image = an_image(5)
    image[3, 3, 3] = np.nan
    write(folder / "imagesTr/b_0001.nii.gz", image)
    labels = a_label_map().astype(np.int16)
    labels[5, 6, :2] = 9
    write(folder / "labelsTr/a.nii.gz", labels)
    (folder / "imagesTr/c_0000.nii.gz").write_bytes(b"broken")
    (folder / "imagesTr/stray.txt").write_text("x")


def test_the_page_needs_nothing_else_and_is_well_formed(folder):
    break_a_lot(folder)
    html = page_of(folder)
    reader = _Reader(html)
    assert reader.open == []
    for _, attrs in reader.tags:
        for name in ("src", "href"):
            target = attrs.get(name)
            assert target is None or target.startswith(("data:image/jpeg;base64,", "#"))
    assert "<script" not in html
    assert not re.search(r"url\(|@import|https?://", html)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs["href"])[1:] for tag, attrs in reader.tags if tag == "a"}
    assert links <= set(ids)
    assert ("html", {"lang": "en"}) in reader.tags


def test_every_finding_is_told_and_has_its_pictures(folder):
    break_a_lot(folder)
    html = page_of(folder)
    for finding in look(folder).findings:
        assert finding.message.split(": ")[-1][:25].replace("'", "&#39;") in html
    shown = alts(html)
    assert [alt for alt in shown if "not a number" in alt] == [
        "b, axial plane 4 of 6, R on the left and L on the right. Outlined: not a number.",
        "b, coronal plane 4 of 7, R on the left and L on the right. Outlined: not a number.",
        "b, sagittal plane 4 of 8, A on the left and P on the right. Outlined: not a number.",
    ]
    assert sum("undeclared value 9" in alt for alt in shown) == 3
    assert "the label map alone: the image can&#39;t be read" in html
    assert "Not usable: training refuses this data set until its errors are mended." in html
    # Where the files lie is nobody's business who reads the page.
    assert str(folder.parent) not in html


def test_pictures_show_the_scan(folder):
    break_a_lot(folder)
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", page_of(folder))
    assert pictures
    for picture in pictures:
        grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        assert grey.std() > 10


def test_a_label_on_another_grid_is_drawn_where_its_header_puts_it(tmp_path):
    folder = tmp_path / "set"
    declare(folder, {"box": 1})
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[4:8, 5:9, 2:6] = 1
    write_case(folder, "a", labels, MM)
    moved = MM.copy()
    moved[0, 3] += 7
    write(folder / "labelsTr/a.nii.gz", labels, moved)
    shown = [alt for alt in alts(page_of(folder)) if "sagittal" in alt]
    # Columns 2 to 5 of the label map lie in columns 9 to 12 of the image.
    assert shown == ["a, sagittal plane 12 of 16, A on the left and P on the right. Outlined: box."]


def test_channels_on_different_grids_are_shown_beside_each_other(folder):
    affine = AFFINE.copy()
    affine[0, 3] += 3.0
    write(folder / "imagesTr/b_0001.nii.gz", an_image(5), affine)
    html = page_of(folder)
    assert html.index("channel 0 (T1)</span>") < html.index("channel 1 (FLAIR), the label map where its own header")


def test_values_that_are_no_whole_numbers_are_marked(folder):
    labels = a_label_map().astype(np.float32)
    labels[4, 4, 4] = 0.5
    write(folder / "labelsTr/b.nii.gz", labels)
    assert sum("Outlined: not a whole number." in alt for alt in alts(page_of(folder))) == 3


def test_sides_are_not_claimed_where_the_file_does_not_state_them(folder):
    for name in ("imagesTr/b_0000", "imagesTr/b_0001", "labelsTr/b"):
        image = nib.load(folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None), folder / f"{name}.nii.gz")
    html = page_of(folder)
    shown = [alt for alt in alts(html) if alt.startswith("b, ")]
    assert shown
    assert all("sides not known." in alt for alt in shown)
    assert '<span class="mark left" aria-hidden="true">?</span>' in html


def test_the_thinnest_structure_is_marked(tmp_path):
    folder = tmp_path / "set"
    declare(folder, {"organ": 1, "speck": 2})
    coarse = MM.copy()
    coarse[:3, :3] *= 3
    labels = np.zeros((10, 11, 12), np.uint8)
    labels[3:8, 3:8, 3:8] = 1
    labels[1, 1, 1] = 2
    for case in "abc":
        write_case(folder, case, labels, coarse)
    labels = np.zeros((20, 22, 24), np.uint8)
    labels[3:15, 3:15, 3:15] = 1
    labels[16:19, 17:20, 18:21], labels[17, 2, 3] = 2, 2
    write_case(folder, "d", labels)
    assert "d, axial plane 18 of 20, R on the left and L on the right. Outlined: thinnest structure of speck." in alts(
        page_of(folder)
    )


def test_intensity_scales_are_shown_with_their_numbers(folder):
    write(folder / "imagesTr/b_0000.nii.gz", an_image(5) * 1000)
    assert re.search(r"channel 0 \(T1\), black is [\d.e+]+ and white [\d.e+]+", page_of(folder))


def test_values_that_cant_be_declared_are_called_by_their_label(tmp_path):
    folder = tmp_path / "set"
    declare(folder, {"tumour": 100000})
    labels = np.zeros(SHAPE, np.int32)
    labels[2:4, 2:4, 2:4] = 100000
    labels[5, 5, 5] = 1
    write_case(folder, "a", labels.astype(np.float64))
    html = page_of(folder)
    shown = alts(html)
    # One picture for the undeclared value, one for the type.
    assert len(shown) == 6
    assert sum("Outlined: undeclared value 1." in alt for alt in shown) == 3
    assert sum("Outlined: tumour" in alt for alt in shown) == 3


def test_many_findings_of_a_kind_are_told_but_not_all_drawn(tmp_path):
    folder = tmp_path / "set"
    declare(folder, {"box": 1})
    labels = np.zeros((5, 6, 7), np.float32)
    labels[2:4, 2:4, 2:4] = 1
    for number in range(MAX_PICTURED + 2):
        write_case(folder, f"c{number}", labels)
    html = page_of(folder)
    assert len(alts(html)) == 3 * MAX_PICTURED
    assert html.count("No picture: the page shows the first 6 of a kind.") == 2


def test_a_sound_set_has_a_page_too(folder):
    html = page_of(folder)
    assert "Usable, and nothing to look at." in html
    assert alts(html) == []


def test_names_are_escaped(folder):
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "name": "<b>x</b>"}))
    assert "<h1>&lt;b&gt;x&lt;/b&gt;</h1>" in page_of(folder)


def test_a_code_without_a_heading_is_shown_as_it_is():
    assert ">brand_new<" in render_doctor_page(DoctorPage("t", [Told("error", "brand_new", "", "m")]))


def test_every_code_of_the_doctor_has_a_heading_and_stands_in_the_docs():
    source = "".join(path.read_text() for path in Path(inspect.getfile(Finding)).parent.glob("*.py"))
    codes = set(re.findall(r'Finding\(\s*(?:"\w+"|level), "(\w+)"', source))
    assert len(codes) > 20
    facts = {"cases", "label", "shapes", "spacings"}
    assert codes - facts <= TITLES.keys()
    told = (Path(__file__).parents[3] / "docs/doctor.md").read_text()
    assert {code for code in (*TITLES, *codes) if f"`{code}`" not in told} == set()


def test_a_page_is_written_whole_where_it_is_asked_for(folder, tmp_path):
    path = write_page(tmp_path / "deep/page.html", read_dataset(folder), look(folder))
    assert path.read_text().rstrip().endswith("</html>")
