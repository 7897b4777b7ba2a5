"""Images, and annotation objects of them: segmentations by highdicom, and what they refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from highdicom import sr
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
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
MASS = CodedConcept("4147007", "SCT", "Mass")


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
        types = over.pop("codes", ["10200004"])
        labels = over.pop("labels", [f"segment {number + 1}" for number in range(len(types))])
        described = [
            highdicom.seg.SegmentDescription(number, label, TISSUE, CodedConcept(code, "SCT", "a thing"), "MANUAL")
            for number, (code, label) in enumerate(zip(types, labels, strict=True), start=1)
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

    def report(self, images: Sequence[Dataset], groups: Sequence[Any] | None = None, reader: str = "Doe^Jane") -> Any:
        """A Measurement Report on images, of measurement groups or of one group with the finding Mass."""
        observer = sr.ObserverContext(codes.DCM.Person, sr.PersonObserverIdentifyingAttributes(name=reader))
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_person_context=observer),
            procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
            imaging_measurements=[self.group(images)] if groups is None else groups,
        )
        return sr.Comprehensive3DSR(
            evidence=complete(images),
            content=content[0],
            series_number=1,
            series_instance_uid=generate_uid(),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="ACME",
        )

    def group(self, images: Sequence[Dataset], finding: CodedConcept | None = MASS, evaluations: Any = ()) -> Any:
        """Measurements of whole images (TID 1501)."""
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking(),
            finding_type=finding,
            qualitative_evaluations=[sr.QualitativeEvaluation(name, value) for name, value in evaluations],
            source_images=[sr.SourceImageForMeasurementGroup.from_source_image(image) for image in images],
        )

    def region(self, image: Dataset, finding: CodedConcept = MASS) -> Any:
        """Measurements of a region in one slice (TID 1410)."""
        return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking(),
            referenced_region=sr.ImageRegion(
                graphic_type=sr.GraphicTypeValues.POLYLINE,
                graphic_data=np.array([[1.0, 1.0], [3.0, 1.0], [3.0, 3.0], [1.0, 1.0]]),
                source_image=sr.SourceImageForRegion.from_source_image(image),
            ),
            finding_type=finding,
        )


def tracking() -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(uid=generate_uid(), identifier="one")


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
