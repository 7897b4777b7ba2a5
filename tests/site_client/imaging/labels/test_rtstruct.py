"""Masks in RT Structure Sets: outlines filled to the pixel, or a reason."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from locum.site_client.imaging.geometry import to_ras
from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.labels.rtstruct import filled, rtstruct_masks
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks

GTV = {"GTV": 1}


def masks_in(folder, keys, segments=GTV, **parts):
    return rtstruct_masks(ObjectMasks(kind="rtstruct", path=folder, segments=segments, **parts), keys, ())


def reason_of(read):
    with pytest.raises(RefusedError) as caught:
        read()
    return caught.value.reason


def circle(centre, radius, z, points=120):
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = centre[0] + radius * np.cos(turn), centre[1] + radius * np.sin(turn)
    return np.column_stack([x, y, np.full(points, z)])


def square(centre, half, z):
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half + np.asarray(centre)
    return np.column_stack([corners, np.full(4, z)])


def slice_at(volume, z):
    """Number of the slice at a height in an axial volume."""
    return round((z - volume.affine[2, 3]) / volume.affine[2, 2])


@pytest.fixture
def images(lab):
    """Twenty slices of 80 × 100 pixels: x from -10 to 69.2, y from 20 to 59.5, z from 30 to 77.5 mm."""
    return lab.series(slices=20, shape=(80, 100)).images()


def test_the_volume_of_a_ball_is_that_of_a_ball(lab, images, tmp_path):
    centre, radius = (30.0, 40.0, 52.5), 15.0
    heights = [z for z in 30 + 2.5 * np.arange(20) if abs(z - centre[2]) < radius]
    outlines = [circle(centre, np.sqrt(radius**2 - (z - centre[2]) ** 2), z) for z in heights]
    lab.save(lab.structures(images, {"GTV": outlines}), tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images))
    size = int(mask.array.sum()) * 0.5 * 0.8 * 2.5
    assert size == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    middle = np.argwhere(mask.array).mean(axis=0)
    assert np.allclose((mask.affine @ (*middle, 1))[:3] * (-1, -1, 1), centre, atol=0.1)


def test_a_contour_inside_another_is_a_hole_and_one_in_the_hole_is_not(lab, images, tmp_path):
    rings = [circle((30, 40), radius, 50.0) for radius in (15, 10, 5)]
    lab.save(lab.structures(images, {"GTV": rings}), tmp_path / "a")
    volume = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images))
    mask, place = volume.array, slice_at(volume, 50.0)
    assert mask.any(axis=(0, 1)).tolist() == [k == place for k in range(20)]
    assert int(mask.sum()) * 0.5 * 0.8 == pytest.approx(np.pi * (15**2 - 10**2 + 5**2), rel=0.02)
    centre = round((30 + 10) / 0.8), round((40 - 20) / 0.5)
    assert [int(mask[centre[0] + step, centre[1], place]) for step in (0, 9, 15, 20)] == [1, 0, 1, 0]


def test_a_hole_cut_in_by_a_keyhole_is_a_hole(lab, images, tmp_path):
    outer, inner = circle((30, 40), 15, 50.0), circle((30, 40), 8, 50.0)[::-1]
    keyhole = np.vstack([outer, outer[:1], inner[-1:], inner[:-1], inner[-1:]])
    lab.save(lab.structures(images, {"GTV": [keyhole]}), tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images)).array
    assert int(mask.sum()) * 0.5 * 0.8 == pytest.approx(np.pi * (15**2 - 8**2), rel=0.02)


def test_structures_that_share_an_edge_share_no_voxel_and_leave_none_out(lab, images, tmp_path):
    left, right = square((20, 40), 10, 50.0), square((40, 40), 10, 50.0)
    lab.save(lab.structures(images, {"A": [left], "B": [right]}), tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys, {"A": 1, "B": 2}).read(lab.unit(images), lab.volume(images)).array
    assert [int((mask == value).sum()) for value in (1, 2)] == [25 * 40, 25 * 40]


def test_contours_lie_on_their_slices_in_an_oblique_series_listed_backwards(lab, tmp_path):
    cos, sin = np.cos(0.4), np.sin(0.4)
    turn = np.array([(cos, sin, 0), (-sin * 0.8, cos * 0.8, 0.6)])
    normal = np.cross(*turn)
    images = lab.series(slices=6, shape=(40, 50), orientation=tuple(turn.ravel()), step=tuple(-2.5 * normal)).images()
    origin = np.array(images[2].ImagePositionPatient, dtype=float)
    corners = [origin + turn[0] * x + turn[1] * y for x, y in ((4.3, 3.2), (20.3, 3.2), (20.3, 13.2), (4.3, 13.2))]
    lab.save(lab.structures(images, {"GTV": [corners]}), tmp_path / "a")
    image = lab.volume(images)
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), image)
    inside = np.argwhere(mask.array)
    places = (inside @ image.affine[:3, :3].T + image.affine[:3, 3]) * (-1, -1, 1) - origin
    assert np.allclose(places @ normal, 0, atol=1e-6)
    across, down = places @ turn[0], places @ turn[1]
    assert (across.min(), across.max()) == pytest.approx((4.3, 20.3), abs=0.81)
    assert (down.min(), down.max()) == pytest.approx((3.2, 13.2), abs=0.51)
    assert len(inside) == 400


def test_what_lies_on_no_slice_or_outside_or_on_every_second_slice_is_a_mismatch(lab, images, tmp_path):
    image, one = lab.volume(images), lab.unit(images)
    wrong = {
        "between slices": [circle((30, 40), 9, 51.25)],
        "below": [circle((30, 40), 9, 27.5)],
        "across slices": [np.array([(20, 40, 40), (40, 40, 40), (30, 40, 60)])],
        "beside the image": [circle((75, 40), 9, 50.0)],
        "every second slice": [circle((30, 40), 9, z) for z in (40, 45, 50)],
    }
    for name, contours in wrong.items():
        lab.save(lab.structures(images, {"GTV": contours}), tmp_path / name / "a")
        source = masks_in(tmp_path / name, lab.keys)
        assert reason_of(lambda source=source: source.read(one, image)) is Reason.MASK_MISMATCH, name


def test_contours_that_cross_repeat_or_are_not_closed_are_refused(lab, images, tmp_path):
    image, one = lab.volume(images), lab.unit(images)
    wrong = {
        "cross": [circle((25, 40), 9, 50.0), circle((35, 40), 9, 50.0)],
        "repeat": [circle((25, 40), 9, 50.0), circle((25, 40), 9, 50.0)],
        "a point": [("POINT", [(25, 40, 50.0)])],
        "open": [("OPEN_PLANAR", circle((25, 40), 9, 50.0))],
    }
    for name, contours in wrong.items():
        lab.save(lab.structures(images, {"GTV": contours}), tmp_path / name / "a")
        source = masks_in(tmp_path / name, lab.keys)
        assert reason_of(lambda source=source: source.read(one, image)) is Reason.MASK_UNREADABLE, name


def test_structures_that_overlap_are_refused_unless_the_later_of_them_wins(lab, images, tmp_path):
    image, one = lab.volume(images), lab.unit(images)
    target, tumour = [circle((30, 40), 15, 50.0)], [circle((30, 40), 8, 50.0)]
    lab.save(lab.structures(images, {"PTV": target, "GTV": tumour, "EMPTY": []}), tmp_path / "a")
    both = {"PTV": 1, "GTV": 2}
    assert reason_of(lambda: masks_in(tmp_path, lab.keys, both).read(one, image)) is Reason.CONFLICTING_LABELS
    mask = masks_in(tmp_path, lab.keys, both, overlap="later").read(one, image).array
    assert int((mask == 2).sum()) * 0.4 == pytest.approx(np.pi * 64, rel=0.03)
    assert int((mask != 0).sum()) * 0.4 == pytest.approx(np.pi * 225, rel=0.03)
    assert reason_of(lambda: masks_in(tmp_path, lab.keys, {"EMPTY": 1}).read(one, image)) is Reason.MASK_MISSING


def test_a_structure_is_found_by_the_code_of_its_observation(lab, images, tmp_path):
    found = lab.structures(images, {"any name": [circle((30, 40), 9, 50.0)]})
    code, observation = pydicom.Dataset(), pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "10200004", "SCT", "Liver"
    observation.ReferencedROINumber, observation.RTROIIdentificationCodeSequence = 1, [code]
    found.RTROIObservationsSequence = [observation]
    lab.save(found, tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys, {"SCT:10200004": 6}).read(lab.unit(images), lab.volume(images)).array
    assert set(np.unique(mask)) == {0, 6}


def test_many_contours_on_a_slice_are_drawn_and_more_than_anybody_draws_are_refused(lab, images, tmp_path):
    image, one = lab.volume(images), lab.unit(images)
    spots = [square((-9.2 + 1.6 * column, 20.5 + row), 0.3, 50.0) for column in range(49) for row in range(25)]
    for name, count in {"many": 900, "too many": 1001}.items():
        lab.save(lab.structures(images, {"GTV": spots[:count]}), tmp_path / name / "a")
    assert int(masks_in(tmp_path / "many", lab.keys).read(one, image).array.sum()) == 900
    source = masks_in(tmp_path / "too many", lab.keys)
    assert reason_of(lambda: source.read(one, image)) is Reason.MASK_UNREADABLE


@settings(max_examples=100, deadline=None)
@given(corners=st.lists(st.tuples(*[st.floats(-0.9, 11.9)] * 2), min_size=3, max_size=12))
def test_filling_agrees_with_an_even_odd_test_of_every_pixel(corners):
    polygon = np.array(corners, dtype=np.float64)
    region = filled([polygon], (slice(0, 12), slice(0, 12)))
    ours = {tuple(map(int, index)) for index in np.argwhere(region)}
    truth, near = set(), set()
    for x, y in np.ndindex(12, 12):
        if edge_distance(polygon, (x, y)) < 1e-6:
            near.add((x, y))
        elif crossings(polygon, (x, y)) % 2:
            truth.add((x, y))
    assert ours - near == truth


def edge_distance(polygon, point):
    ends = np.roll(polygon, -1, axis=0) - polygon
    lengths = np.maximum((ends**2).sum(axis=1), 1e-30)
    along = np.clip(((point - polygon) * ends).sum(axis=1) / lengths, 0, 1)
    return np.linalg.norm(polygon + along[:, None] * ends - point, axis=1).min()


def crossings(polygon, point):
    """How often a ray, at an angle at which it meets no corner, leaves a point through the polygon's edges."""
    direction = np.array([np.cos(0.7310585), np.sin(0.7310585)])
    across = np.array([-direction[1], direction[0]])
    side = (polygon - point) @ across
    ahead = (polygon - point) @ direction
    count = 0
    for index in range(len(polygon)):
        after = (index + 1) % len(polygon)
        if (side[index] > 0) != (side[after] > 0):
            part = side[index] / (side[index] - side[after])
            count += ahead[index] + part * (ahead[after] - ahead[index]) > 0
    return count


def test_a_real_structure_set_lies_where_its_points_lie(lab, tmp_path):
    found = pydicom.dcmread(get_testdata_file("rtstruct.dcm"), force=True)
    found.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    lab.save(found, tmp_path / "a.dcm")
    contours = found.ROIContourSequence[0].ContourSequence
    heights = sorted({float(contour.ContourData[2]) for contour in contours})
    step = heights[1] - heights[0]
    lps = np.array([[0, 0, 5.0, -250], [0, 5.0, 0, -250], [step, 0, 0, heights[0]], [0, 0, 0, 1]])
    image = Volume(np.zeros((101, 101, len(heights)), dtype=np.uint8), to_ras(lps))
    series = found.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    stub = pydicom.Dataset()
    stub.SeriesInstanceUID, stub.PatientID = series.SeriesInstanceUID, "P"
    mask = masks_in(tmp_path, lab.keys, {"patient": 1}).read(lab.unit([stub]), image)
    for contour in contours:
        points = np.reshape([float(value) for value in contour.ContourData], (-1, 3))
        place = heights.index(float(points[0, 2]))
        columns, rows = np.argwhere(mask.array[:, :, place]).T
        area = abs(np.sum(points[:, 0] * np.roll(points[:, 1], -1) - np.roll(points[:, 0], -1) * points[:, 1])) / 2
        assert len(columns) * 25 == pytest.approx(area, rel=0.05)
        for indices, axis in ((columns, 0), (rows, 1)):
            assert points[:, axis].min() - 5 < 5.0 * indices.min() - 250
            assert 5.0 * indices.max() - 250 < points[:, axis].max() + 5
    point = masks_in(tmp_path, lab.keys, {"Isocenter 1": 1})
    assert reason_of(lambda: point.read(lab.unit([stub]), image)) is Reason.MASK_UNREADABLE


@pytest.fixture(scope="module")
def small(lab):
    """The images, and the bytes, of a small structure set."""
    images = lab.series(slices=4, shape=(10, 10)).images()
    written = io.BytesIO()
    rois = {"GTV": [circle((-6, 22), 2, 32.5)], "B": [square((-6, 22), 1, 30.0)]}
    lab.structures(images, rois).save_as(written, enforce_file_format=True)
    return images, written.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    part=st.floats(0.3, 1) | st.just(1.0),
)
def test_damaged_structure_sets_are_listed_or_refused_and_never_anything_else(
    lab, small, tmp_path_factory, places, part
):
    images, whole = small
    content = bytearray(whole)
    for place, value in places:
        content[int(place * len(content))] = value
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a").write_bytes(content[: int(part * len(content))])
    source = masks_in(folder, lab.keys, {"GTV": 1, "B": 2})
    with contextlib.suppress(RefusedError):
        assert source.read(lab.unit(images), lab.volume(images)).array.shape == (10, 10, 4)
    assert len(source.unmatched()) <= 1
