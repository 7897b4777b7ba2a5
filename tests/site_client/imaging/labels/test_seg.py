"""Masks in DICOM Segmentation objects: each voxel where its object says, or a reason."""

from __future__ import annotations

import contextlib
import itertools

import highdicom
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import DigitalXRayImageStorageForPresentation

from locum.site_client.imaging import geometry
from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.known import NOBODY, known_of
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.labels.seg import CLASSES, seg_masks
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks

LIVER = {"SCT:10200004": 1}


def masks_in(folder, keys, segments=LIVER, **parts):
    return seg_masks(ObjectMasks(kind="seg", path=folder, segments=segments, **parts), keys, ())


def reason_of(read):
    with pytest.raises(RefusedError) as caught:
        read()
    return caught.value.reason


def at_places(images, stacked):
    """Place in the patient, from the attributes alone (PS3.3 C.7.6.2.1.1), to the value there."""
    found = {}
    for image, plane in zip(images, stacked, strict=True):
        origin, axes = np.array(image.ImagePositionPatient), np.reshape(image.ImageOrientationPatient, (2, 3))
        for (row, column), value in np.ndenumerate(plane):
            place = origin + axes[0] * image.PixelSpacing[1] * column + axes[1] * image.PixelSpacing[0] * row
            found[tuple(place.round(2) + 0.0)] = int(value)
    return found


def places_of(volume: Volume):
    array = volume.array if volume.array.ndim == 3 else volume.array[..., None]
    return {
        tuple(((volume.affine @ (*index, 1))[:3] * (-1, -1, 1)).round(2) + 0.0): int(array[index])
        for index in np.ndindex(array.shape)
    }


def whole(images, mask):
    """A mask (slice, row, column), from the last image to the first, with its place: highdicom's volumes run so."""
    last = images[-1]
    return highdicom.Volume.from_attributes(
        array=mask.copy(),
        image_position=last.ImagePositionPatient,
        image_orientation=last.ImageOrientationPatient,
        pixel_spacing=last.PixelSpacing,
        spacing_between_slices=2.5,
        coordinate_system="PATIENT",
        frame_of_reference_uid=last.FrameOfReferenceUID,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turn=st.tuples(st.permutations(range(3)), st.sets(st.integers(0, 2))),
    # highdicom 0.28 packs the bits of frames of fewer than 8 pixels wrongly: three pixels a side at least.
    box=st.tuples(*[st.tuples(st.integers(0, 1), st.integers(3, 4))] * 3),
    kind=st.sampled_from(["BINARY", "FRACTIONAL", "LABELMAP"]),
    seed=st.integers(0, 1000),
)
def test_every_voxel_lands_whatever_axes_order_or_part_of_the_image_an_object_has(
    lab, tmp_path_factory, turn, box, kind, seed
):
    images = lab.series(slices=5, shape=(6, 7)).images()
    part = tuple(slice(first, first + count) for first, count in box)
    truth = np.zeros((5, 6, 7), dtype=np.uint8)
    truth[part] = np.random.default_rng(seed).integers(0, 2, [count for _, count in box])
    truth[part][0, 0, 0] = 1
    given_mask = whole(images, truth)[part].permute_spatial_axes(turn[0])
    for axis in turn[1]:
        given_mask = given_mask.flip_spatial(axis)
    folder = tmp_path_factory.mktemp("seg")
    lab.save(lab.segmentation(images, given_mask, kind), folder / "any name")
    mask = masks_in(folder, lab.keys).read(lab.unit(images), lab.volume(images))
    assert mask.array.dtype == np.uint8
    assert places_of(mask) == at_places(images, truth[::-1])


@pytest.mark.parametrize("turned", [False, True])
def test_frames_of_an_oblique_series_land_in_any_order_and_slices_without_one_are_background(lab, tmp_path, turned):
    cos, sin = np.cos(0.4), np.sin(0.4)
    step = np.cross((cos, sin, 0), (-sin, cos, 0)) * (-2.5 if turned else 2.5)
    images = lab.series(orientation=(cos, sin, 0, -sin, cos, 0), step=tuple(step)).images()
    truth = np.zeros((5, 6, 7), dtype=np.uint8)
    truth[1, 2:4, 3:6], truth[3, 0, 0] = 1, 1
    some = [images[3], images[1]]
    lab.save(lab.segmentation(some, truth[[3, 1]]), tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images))
    assert places_of(mask) == at_places(images, truth)
    assert mask.array.sum() == 7


@pytest.mark.parametrize("cleaned", [False, True])
def test_an_object_finds_its_image_after_both_were_de_identified(lab, tmp_path, cleaned):
    images = lab.series().images()
    found = lab.segmentation(images, np.ones((5, 6, 7), dtype=np.uint8))
    known = known_of(images[0], lab.keys)
    if cleaned:
        for element in found.iterall():
            if element.VR == "UI" and element.keyword.endswith(("InstanceUID", "ReferenceUID")):
                element.value = lab.keys.uid(str(element.value))
    path = lab.save(found, tmp_path / "seg.dcm")
    annotation = Annotation(path, path.stat().st_size, found.SOPClassUID, cleaned, known)
    source = seg_masks(ObjectMasks(kind="seg", segments=LIVER), lab.keys, [annotation])
    assert source.read(lab.unit(images), lab.volume(images)).array.all()
    assert source.unmatched() == []


def test_segments_are_chosen_by_label_or_code_and_others_are_background(lab, tmp_path):
    images = lab.series().images()
    truth = np.zeros((5, 6, 7, 3), dtype=np.uint8)
    truth[..., :2, 0], truth[..., 2:4, 1], truth[..., 4:, 2] = 1, 1, 1
    lab.save(
        lab.segmentation(images, truth, codes=["10200004", "78961009", "64033007"], labels=["L", "S", "K"]),
        tmp_path / "a",
    )
    image = lab.volume(images)
    mask = masks_in(tmp_path, lab.keys, {"S": 3, "SCT:10200004": 7}).read(lab.unit(images), image).array
    assert [set(np.unique(mask[part])) for part in (slice(2), slice(2, 4), slice(4, None))] == [{7}, {3}, {0}]
    by_old_code = masks_in(tmp_path, lab.keys, {"SRT:T-62000": 2}).read(lab.unit(images), image).array
    assert np.array_equal(by_old_code == 2, mask == 7)
    category = masks_in(tmp_path, lab.keys, {"SCT:85756007": 1}).read(lab.unit(images), image).array
    assert category.all()
    assert (
        reason_of(lambda: masks_in(tmp_path, lab.keys, {"Brain": 1}).read(lab.unit(images), image))
        is Reason.MASK_MISSING
    )
    twice = masks_in(tmp_path, lab.keys, {"L": 1, "SCT:10200004": 2})
    assert reason_of(lambda: twice.read(lab.unit(images), image)) is Reason.CONFLICTING_LABELS


def test_segments_that_overlap_are_refused_unless_the_later_of_them_wins(lab, tmp_path):
    images = lab.series().images()
    truth = np.zeros((5, 6, 7, 2), dtype=np.uint8)
    truth[..., :4, 0], truth[..., 3:, 1] = 1, 1
    lab.save(lab.segmentation(images, truth, codes=["10200004", "78961009"], labels=["A", "B"]), tmp_path / "a")
    image, one = lab.volume(images), lab.unit(images)
    assert (
        reason_of(lambda: masks_in(tmp_path, lab.keys, {"A": 1, "B": 2}).read(one, image)) is Reason.CONFLICTING_LABELS
    )
    later = masks_in(tmp_path, lab.keys, {"A": 1, "B": 2}, overlap="later").read(one, image).array
    assert [int(later[column].max()) for column in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    other = masks_in(tmp_path, lab.keys, {"B": 2, "A": 1}, overlap="later").read(one, image).array
    assert [int(other[column].max()) for column in range(7)] == [1, 1, 1, 1, 2, 2, 2]
    same = masks_in(tmp_path, lab.keys, {"A": 5, "B": 5}).read(one, image).array
    assert (same == 5).all()


def test_half_of_the_maximum_fractional_value_belongs_to_a_segment(lab, tmp_path):
    images = lab.series(slices=2, shape=(2, 2)).images()
    parts = np.array([[[0.0, 0.49], [0.5, 1.0]], [[0.51, 0.0], [0.0, 0.0]]])
    lab.save(lab.segmentation(images, parts, "FRACTIONAL", max_fractional_value=200), tmp_path / "a")
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images))
    assert places_of(mask) == at_places(images, (parts >= 0.5).astype(int))


def test_a_plane_off_the_grid_or_on_no_slice_is_a_mismatch(lab, tmp_path):
    images = lab.series().images()
    image, one = lab.volume(images), lab.unit(images)
    mask = np.ones((5, 6, 7), dtype=np.uint8)
    moves = {"half a slice": (0, 0, 1.25), "a quarter of a pixel": (0.2, 0, 0), "a slice below": (0, 0, -2.5),
             "a pixel beside": (0.8, 0, 0)}  # fmt: skip
    for name, move in moves.items():
        moved = lab.series(origin=tuple(np.add((-10.0, 20.0, 30.0), move))).images()
        lab.save(lab.segmentation(moved, mask), tmp_path / name / "a")
        source = masks_in(tmp_path / name, lab.keys)
        assert reason_of(lambda source=source: source.read(one, image)) is Reason.MASK_MISMATCH, name
    turned = lab.series(orientation=(0.6, 0.8, 0, -0.8, 0.6, 0))
    for name, other in {"coarser": lab.series(spacing=(1.0, 1.6)), "turned": turned}.items():
        lab.save(lab.segmentation(other.images(), mask), tmp_path / name / "a")
        source = masks_in(tmp_path / name, lab.keys)
        assert reason_of(lambda source=source: source.read(one, image)) is Reason.MASK_MISMATCH, name


def test_a_segmentation_of_a_radiograph_has_its_rows_and_columns(lab, tmp_path):
    over = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "ImagePositionPatient": None,
            "ImageOrientationPatient": None, "FrameOfReferenceUID": None}  # fmt: skip
    images = lab.series(slices=2, over=over).images()
    truth = np.arange(42, dtype=np.uint8).reshape(6, 7) % 2
    lab.save(lab.segmentation(images[:1], truth), tmp_path / "a")
    source = masks_in(tmp_path, lab.keys)
    mask = source.read(lab.unit(images[:1]), geometry.radiograph(images[0]))
    assert np.array_equal(mask.array, truth.T)
    assert reason_of(lambda: source.stamp(lab.unit(images[1:]))) is Reason.MASK_MISSING
    other = lab.series(slices=1, shape=(7, 6), over=over).images()
    assert reason_of(lambda: source.read(lab.unit(images[:1]), geometry.radiograph(other[0]))) is Reason.MASK_MISMATCH


def test_several_objects_of_one_image_join_agree_or_are_refused(lab, tmp_path):
    images = lab.series().images()
    image, one = lab.volume(images), lab.unit(images)
    low, high = np.zeros((2, 5, 6, 7), dtype=np.uint8)
    low[..., :3], high[..., 3:] = 1, 1
    lab.save(lab.segmentation(images, low, labels=["A"]), tmp_path / "joined" / "1")
    lab.save(lab.segmentation(images, high, labels=["B"]), tmp_path / "joined" / "2")
    joined = masks_in(tmp_path / "joined", lab.keys, {"A": 1, "B": 2}).read(one, image).array
    assert [int(joined[column].max()) for column in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    for name, second in {"same": low, "other": high}.items():
        lab.save(lab.segmentation(images, low, labels=["A"]), tmp_path / name / "1")
        lab.save(lab.segmentation(images, second, labels=["A"]), tmp_path / name / "2")
    assert np.array_equal(masks_in(tmp_path / "same", lab.keys, {"A": 1}).read(one, image).array, joined == 1)
    source = masks_in(tmp_path / "other", lab.keys, {"A": 1})
    assert reason_of(lambda: source.read(one, image)) is Reason.CONFLICTING_LABELS


def test_a_copy_counts_once_and_a_changed_object_under_the_same_uid_is_refused(lab, tmp_path):
    images = lab.series().images()
    image, one = lab.volume(images), lab.unit(images)
    masks = np.zeros((2, 5, 6, 7), dtype=np.uint8)
    masks[0, 1:3, 2:4, 2:4], masks[1, 1:3, 1:3, 2:4] = 1, 1
    objects = [lab.segmentation(images, mask, sop="1.2.3.4") for mask in masks]
    for name in "abc":
        lab.save(objects[0], tmp_path / name)
    assert masks_in(tmp_path, lab.keys, consensus="majority").readings(one, image).keys() == {"object 1"}
    lab.save(objects[1], tmp_path / "d")
    assert (tmp_path / "a").stat().st_size == (tmp_path / "d").stat().st_size
    assert reason_of(lambda: masks_in(tmp_path, lab.keys).read(one, image)) is Reason.CONFLICTING_LABELS


@pytest.mark.parametrize("how", ["majority", "staple"])
def test_several_readers_become_one_mask_and_stay_apart_for_their_agreement(lab, tmp_path, how):
    images = lab.series(slices=4, shape=(20, 20)).images()
    image, one = lab.volume(images), lab.unit(images)
    truth = np.zeros((4, 20, 20), dtype=np.uint8)
    truth[1:3, 5:15, 5:15] = 1
    for number in range(3):
        drawn = truth.copy()
        drawn[1, 5 + number, 5:15] = 0
        lab.save(lab.segmentation(images, drawn, labels=["A"], reader=f"Reader^{number}"), tmp_path / str(number))
    source = masks_in(tmp_path, lab.keys, {"A": 1}, consensus=how)
    assert places_of(source.read(one, image)) == at_places(images, truth)
    readings = source.readings(one, image)
    assert len(readings) == 3
    assert {len(name) for name in readings} == {8}
    assert all(int(each.array.sum()) == 190 for each in readings.values())


def test_what_names_no_image_and_what_is_no_segmentation_is_listed(lab, tmp_path):
    images, others = lab.series().images(), lab.series(number=2).images()
    ones = np.ones((5, 6, 7), dtype=np.uint8)
    lab.save(lab.segmentation(images, ones), tmp_path / "own.dcm")
    lab.save(lab.segmentation(others, ones), tmp_path / "far" / "other.dcm")
    lab.save(images[0], tmp_path / "image.dcm")
    (tmp_path / "note.txt").write_text("no DICOM")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "own.dcm").read_bytes()[:700])
    source = masks_in(tmp_path, lab.keys)
    assert source.read(lab.unit(images), lab.volume(images)).array.all()
    listed = source.unmatched()
    assert [name.partition(" ")[0] for name in listed] == ["far/other.dcm", "cut.dcm", "image.dcm", "note.txt"]
    assert "(unsupported_object)" in listed[2]
    assert "(not_an_image)" in listed[3]


def test_the_stamp_changes_with_the_object_and_with_what_is_asked_of_it(lab, tmp_path):
    images = lab.series().images()
    lab.save(lab.segmentation(images, np.ones((5, 6, 7), dtype=np.uint8), sop="1.2.3"), tmp_path / "a")
    one = lab.unit(images)
    asked = [{}, {}, {"segments": {"Liver": 1}}, {"overlap": "later"}]
    stamps = [masks_in(tmp_path, lab.keys, **each).stamp(one) for each in asked]
    lab.save(lab.segmentation(images, np.eye(7, dtype=np.uint8)[:6][None].repeat(5, 0), sop="1.2.3"), tmp_path / "a")
    stamps.append(masks_in(tmp_path, lab.keys).stamp(one))
    assert stamps[0] == stamps[1]
    assert len(set(stamps[1:])) == 4
    other = lab.unit(lab.series(number=3).images())
    assert reason_of(lambda: masks_in(tmp_path, lab.keys).stamp(other)) is Reason.MASK_MISSING


# Objects of others: highdicom's and dcmqi's own test files.


@pytest.fixture(scope="module")
def objects(shared_data):
    return shared_data / "dicom_codecs_objects"


def real_unit(path, lab):
    """The unit to which a real object refers, and a volume on whose grid the object lies."""
    found = highdicom.seg.segread(path)
    assert found.SOPClassUID in CLASSES
    listed = found.ReferencedSeriesSequence[0]
    image = listed.ReferencedInstanceSequence[0]
    stub = pydicom.Dataset()
    stub.SOPClassUID, stub.SOPInstanceUID = image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID
    stub.SeriesInstanceUID, stub.PatientID = listed.SeriesInstanceUID, "P"
    return found, lab.unit([stub])


@pytest.mark.parametrize(
    ("name", "segment", "threshold"),
    [
        ("ImagingDataCommons+highdicom/data/test_files/seg_image_ct_binary.dcm", "SCT:272673000", 1),
        ("ImagingDataCommons+highdicom/data/test_files/seg_image_ct_binary_fractional.dcm", "SCT:272673000", 128),
        ("ImagingDataCommons+highdicom/data/test_files/seg_image_ct_true_fractional.dcm", "first segment", 128),
        ("ImagingDataCommons+highdicom/data/test_files/seg_image_ct_binary_single_frame.dcm", "first segment", 1),
        ("QIICR+dcmqi/data/segmentations/liver.dcm", "SCT:10200004", 1),
        ("QIICR+dcmqi/data/sr-example/seg.dcm", "SRT:M-80003", 1),
        ("QIICR+dcmqi/data/segmentations/sparse-labelmap-noppv.dcm", "Liver", 1),
        ("QIICR+dcmqi/data/segmentations/sparse-labelmap-ppv5.dcm", "SCT:10200004", 1),
    ],
)
def test_real_segmentations_lie_where_highdicom_places_them(objects, lab, tmp_path, name, segment, threshold):
    path = objects / name
    found, one = real_unit(path, lab)
    frames = found.get_volume_geometry()
    assert frames is not None
    image = Volume(np.zeros(frames.spatial_shape[::-1], dtype=np.uint8), geometry.to_ras(frames.affine))
    (tmp_path / "seg").symlink_to(path)
    mask = masks_in(tmp_path, lab.keys, {segment: 4}).read(one, image).array
    stored = np.zeros(frames.spatial_shape, dtype=int)
    for index in range(found.number_of_frames):
        groups = found.PerFrameFunctionalGroupsSequence[index]
        place = frames.map_reference_to_indices(
            np.array([groups.PlanePositionSequence[0].ImagePositionPatient], dtype=float)
        )[0, 0] if "PlanePositionSequence" in groups else 0  # fmt: skip
        stored[round(float(place))] = found.get_stored_frame(index, as_index=True)
    assert stored.any()
    assert np.array_equal(mask == 4, threshold <= stored.T)


def test_real_segments_that_overlap_are_refused_and_each_alone_is_right(objects, lab, tmp_path):
    path = objects / "QIICR+dcmqi/data/segmentations/partial_overlaps.dcm"
    found, one = real_unit(path, lab)
    images = [pydicom.dcmread(objects / f"QIICR+dcmqi/data/segmentations/ct-3slice/0{n}.dcm") for n in (1, 2, 3)]
    image = geometry.slices_volume(images)
    (tmp_path / "seg").symlink_to(path)
    labels = ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    sizes = {label: int(masks_in(tmp_path, lab.keys, {label: 1}).read(one, image).array.sum()) for label in labels}
    stored = [int(found.get_stored_frame(index, as_index=True).sum()) for index in range(found.number_of_frames)]
    assert sum(sizes.values()) == sum(stored)
    pairs = {}
    for pair in itertools.combinations(labels, 2):
        source = masks_in(tmp_path, lab.keys, dict(zip(pair, (1, 2), strict=True)))
        try:
            pairs[pair] = int((source.read(one, image).array != 0).sum()) == sizes[pair[0]] + sizes[pair[1]]
        except RefusedError as refused:
            pairs[pair] = refused.reason is Reason.CONFLICTING_LABELS
    assert all(pairs.values())
    every = masks_in(tmp_path, lab.keys, {label: n for n, label in enumerate(labels, 1)})
    assert reason_of(lambda: every.read(one, image)) is Reason.CONFLICTING_LABELS


@pytest.mark.parametrize(
    "name",
    [
        "QIICR+dcmqi/data/segmentations/liver.dcm",
        "pydicom+pydicom-data/data_store/data/liver_j2k.dcm",
    ],
)
def test_a_real_liver_lies_on_its_real_images_plain_and_compressed(objects, lab, tmp_path, name):
    path = objects / name
    images = [pydicom.dcmread(objects / f"QIICR+dcmqi/data/segmentations/ct-3slice/0{n}.dcm") for n in (1, 2, 3)]
    (tmp_path / "seg").symlink_to(path)
    mask = masks_in(tmp_path, lab.keys).read(lab.unit(images), lab.volume(images))
    assert int(mask.array.sum()) == 107098
    liver = places_in(mask, highdicom.seg.segread(objects / "QIICR+dcmqi/data/segmentations/liver.dcm"))
    assert liver == 107098


@pytest.mark.parametrize("name", ["liver_rle", "liver_deflate", "liver_nonbyte_aligned_rle"])
def test_real_objects_that_no_codec_reads_are_refused(objects, lab, tmp_path, name):
    images = [pydicom.dcmread(objects / f"QIICR+dcmqi/data/segmentations/ct-3slice/0{n}.dcm") for n in (1, 2, 3)]
    (tmp_path / "seg").symlink_to(objects / f"malformed/pydicom+pydicom-data/data_store/data/{name}.dcm")
    source = masks_in(tmp_path, lab.keys)
    assert reason_of(lambda: source.read(lab.unit(images), lab.volume(images))) is Reason.MASK_UNREADABLE


def places_in(mask, found):
    """How many voxels of a mask lie where a pixel of some frame of an object lies and is set."""
    to_index = np.linalg.inv(mask.affine)
    orientation = np.reshape(
        found.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0][0x20, 0x37].value, (2, 3)
    )
    spacing = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    seen = 0
    for index, groups in enumerate(found.PerFrameFunctionalGroupsSequence):
        rows, columns = np.nonzero(found.get_stored_frame(index, as_index=True))
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        places = origin + np.outer(columns * spacing[1], orientation[0]) + np.outer(rows * spacing[0], orientation[1])
        indices = (places * (-1, -1, 1)) @ to_index[:3, :3].T + to_index[:3, 3]
        assert np.abs(indices - indices.round()).max() < 0.05
        seen += int(mask.array[tuple(indices.round().astype(int).T)].sum())
    return seen


def test_whole_slides_are_refused(objects, lab, tmp_path):
    path = objects / "ImagingDataCommons+highdicom/data/test_files/seg_image_sm_dots.dcm"
    _, one = real_unit(path, lab)
    (tmp_path / "seg").symlink_to(path)
    source = masks_in(tmp_path, lab.keys, {"SCT:21793004": 1})
    image = Volume(np.zeros((10, 10), dtype=np.uint8), np.eye(4))
    assert reason_of(lambda: source.read(one, image)) is Reason.MASK_MISMATCH


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_object_is_listed_or_refused_and_never_anything_else(objects, lab, tmp_path_factory, data):
    names = ["ImagingDataCommons+highdicom/data/test_files/seg_image_ct_binary_overlap.dcm",
             "QIICR+dcmqi/data/segmentations/sparse-labelmap-ppv5.dcm",
             "ImagingDataCommons+highdicom/data/test_files/seg_image_ct_true_fractional.dcm"]  # fmt: skip
    path = objects / data.draw(st.sampled_from(names))
    found, one = real_unit(path, lab)
    frames = found.get_volume_geometry()
    content = bytearray(path.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    ):
        content[place] = value
    cut = data.draw(st.integers(200, len(content)) | st.just(len(content)))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "seg").write_bytes(content[:cut])
    image = Volume(np.zeros(frames.spatial_shape[::-1], dtype=np.uint8), geometry.to_ras(frames.affine))
    source = masks_in(folder, lab.keys, {"SCT:10200004": 1, "first segment": 2, "second segment": 3}, overlap="later")
    with contextlib.suppress(RefusedError):
        assert source.read(one, image).array.shape == image.array.shape
    assert all(isinstance(line, str) for line in source.unmatched())


def test_an_image_that_is_no_dicom_has_no_mask_among_the_objects(lab, tmp_path):
    images = lab.series().images()
    lab.save(lab.segmentation(images, np.ones((5, 6, 7), dtype=np.uint8)), tmp_path / "a")
    assert masks_in(tmp_path, lab.keys).stamp(Unit(key="x.nii", source=0, items=(), known=NOBODY)) is None
