"""Images, and annotation objects of them: segmentations by highdicom, structure sets as PS3.3 has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from locum.site_client.imaging import geometry
from locum.site_client.imaging.dicom import unit_of
from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import known_of

KEYS = Keys.of(bytes(range(32)))
TISSUE = CodedConcept("85756007", "SCT", "Tissue")


def complete(images: Sequence[Dataset]) -> list[Dataset]:
    """Images with what highdicom copies into an object."""
    for image in images:
        image.StudyID, image.StudyDate, image.StudyTime = "1", "20200102", "030405"
        image.PatientBirthDate, image.PatientSex, image.ReferringPhysicianName = "", "O", ""
    return list(images)


@dataclass(frozen=True)
class Lab:
    """What tests of annotation objects need: images and objects, a unit and a volume of images, and the site's keys."""

    series: Any
    keys: Keys = KEYS

    def unit(self, images: Sequence[Dataset]) -> Unit:
        known = known_of(images[0], self.keys)
        key = unit_of(text(images[0], "SOPClassUID"), known, self.keys.uid(text(images[0], "SOPInstanceUID")))
        return Unit(key=key, source=0, items=(), known=known)

    def volume(self, images: Sequence[Dataset]) -> Volume:
        return geometry.slices_volume(images)

    def save(self, dataset: Dataset, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        return path

    def segmentation(
        self, images: Sequence[Dataset], mask: Any, kind: str = "BINARY", **over: Any
    ) -> highdicom.seg.Segmentation:
        """A Segmentation object; `codes` and `labels` of its segments, `reader` who made it, else of highdicom."""
        codes = over.pop("codes", ["10200004"])
        labels = over.pop("labels", [f"segment {number + 1}" for number in range(len(codes))])
        described = [
            highdicom.seg.SegmentDescription(number, label, TISSUE, CodedConcept(code, "SCT", "a thing"), "MANUAL")
            for number, (code, label) in enumerate(zip(codes, labels, strict=True), start=1)
        ]
        return highdicom.seg.Segmentation(
            source_images=complete(images),
            pixel_array=mask,
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=generate_uid(),
            series_number=9,
            sop_instance_uid=over.pop("sop", generate_uid()),
            instance_number=1,
            manufacturer="ACME",
            manufacturer_model_name="Pen",
            software_versions="1",
            device_serial_number="1",
            content_creator_name=over.pop("reader", None),
            **over,
        )

    def structures(self, images: Sequence[Dataset], rois: dict[str, Sequence[Any]], reader: str = "") -> Dataset:
        """An RT Structure Set: ROI Name to contours, each (n, 3) points in mm, or (kind, points)."""
        found = Dataset()
        found.SOPClassUID, found.SOPInstanceUID = RTStructureSetStorage, generate_uid()
        found.StudyInstanceUID, found.SeriesInstanceUID = images[0].StudyInstanceUID, generate_uid()
        found.Modality, found.PatientID, found.OperatorsName = "RTSTRUCT", images[0].PatientID, reader
        series = Dataset()
        series.SeriesInstanceUID = images[0].SeriesInstanceUID
        study, frame = Dataset(), Dataset()
        study.RTReferencedSeriesSequence = [series]
        frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = images[0].FrameOfReferenceUID, [study]
        found.ReferencedFrameOfReferenceSequence = [frame]
        found.StructureSetROISequence = [roi(number, name) for number, name in enumerate(rois, start=1)]
        found.ROIContourSequence = [drawn(number, contours) for number, contours in enumerate(rois.values(), start=1)]
        found.file_meta = FileMetaDataset()
        found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return found


@pytest.fixture(scope="session")
def lab(series: Any) -> Lab:
    return Lab(series)


def roi(number: int, name: str) -> Dataset:
    item = Dataset()
    item.ROINumber, item.ROIName = number, name
    return item


def drawn(number: int, contours: Sequence[Any]) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber, item.ContourSequence = number, []
    for given in contours:
        kind, points = given if isinstance(given, tuple) else ("CLOSED_PLANAR", given)
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
        contour.ContourData = [f"{value:.4f}" for value in np.ravel(points)]
        item.ContourSequence.append(contour)
    return item
