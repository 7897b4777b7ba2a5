"""How an image was taken, as far as contracts and counts ask: object class, body part, plane, numbers of the scanner.

Rules:
  * Facts only: what a header does not say, or says illegibly, is left out; nothing is concluded from other attributes.
  * Numbers carry DICOM's own names and units, whatever kind of object or file they were read from.
  * Of a series a number is the median over its images, so that it does not depend on which file comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.grids import Floats, Volume
from locum.site_client.imaging.headers import frames, numbers, text
from locum.site_client.imaging.reasons import Reason, RefusedError

#: The numbers that are kept, with their units (PS3.3 C.8.2, C.8.3, C.7.6.2, C.11.2).
UNITS: Mapping[str, str] = MappingProxyType(
    {
        "RepetitionTime": "ms",
        "EchoTime": "ms",
        "InversionTime": "ms",
        "FlipAngle": "°",
        "EchoTrainLength": "",
        "NumberOfAverages": "",
        "PixelBandwidth": "Hz/pixel",
        "MagneticFieldStrength": "T",
        "KVP": "kV",
        "XRayTubeCurrent": "mA",
        "ExposureTime": "ms",
        "Exposure": "mAs",
        "GantryDetectorTilt": "°",
        "ReconstructionDiameter": "mm",
        "SliceThickness": "mm",
        "SpacingBetweenSlices": "mm",
        "WindowCenter": "modality values",
        "WindowWidth": "modality values",
    }
)

#: Where enhanced objects hold these numbers: functional group, attribute, name of the number (PS3.3 C.8.13, C.8.15).
_GROUPS = (
    ("MRTimingAndRelatedParametersSequence", "RepetitionTime", "RepetitionTime"),
    ("MRTimingAndRelatedParametersSequence", "FlipAngle", "FlipAngle"),
    ("MRTimingAndRelatedParametersSequence", "EchoTrainLength", "EchoTrainLength"),
    ("MREchoSequence", "EffectiveEchoTime", "EchoTime"),
    ("MRModifierSequence", "InversionTimes", "InversionTime"),
    ("MRImagingModifierSequence", "PixelBandwidth", "PixelBandwidth"),
    ("MRAveragesSequence", "NumberOfAverages", "NumberOfAverages"),
    ("CTXRayDetailsSequence", "KVP", "KVP"),
    ("CTExposureSequence", "XRayTubeCurrentInmA", "XRayTubeCurrent"),
    ("CTExposureSequence", "ExposureTimeInms", "ExposureTime"),
    ("CTExposureSequence", "ExposureInmAs", "Exposure"),
    ("CTAcquisitionDetailsSequence", "GantryDetectorTilt", "GantryDetectorTilt"),
    ("CTReconstructionSequence", "ReconstructionDiameter", "ReconstructionDiameter"),
    ("PixelMeasuresSequence", "SliceThickness", "SliceThickness"),
    ("PixelMeasuresSequence", "SpacingBetweenSlices", "SpacingBetweenSlices"),
    ("FrameVOILUTSequence", "WindowCenter", "WindowCenter"),
    ("FrameVOILUTSequence", "WindowWidth", "WindowWidth"),
    # Legacy converted objects: whatever the classic images said alike, or each for itself (C.7.6.16.2.25.1 and .2).
    *(("UnassignedSharedConvertedAttributesSequence", name, name) for name in UNITS),
    *(("UnassignedPerFrameConvertedAttributesSequence", name, name) for name in UNITS),
)

#: Anatomic regions (SNOMED CT) to values of Body Part Examined: the common ones of PS3.16 annex L, and the codes that
#: older editions had for them.
_REGIONS: Mapping[str, str] = MappingProxyType(
    {
        "818981001": "ABDOMEN",
        "113345001": "ABDOMEN",
        "818982008": "ABDOMENPELVIS",
        "416949008": "ABDOMENPELVIS",
        "70258002": "ANKLE",
        "15825003": "AORTA",
        "89837001": "BLADDER",
        "12738006": "BRAIN",
        "76752008": "BREAST",
        "69105007": "CAROTID",
        "51185008": "CHEST",
        "816094009": "CHEST",
        "416550000": "CHESTABDOMEN",
        "416775004": "CHESTABDPELVIS",
        "51299004": "CLAVICLE",
        "71854001": "COLON",
        "122494005": "CSPINE",
        "117590005": "EAR",
        "16953009": "ELBOW",
        "81745001": "EYE",
        "71341001": "FEMUR",
        "7569003": "FINGER",
        "56459004": "FOOT",
        "14975008": "FOREARM",
        "28231008": "GALLBLADDER",
        "85562004": "HAND",
        "69536005": "HEAD",
        "774007": "HEADNECK",
        "80891009": "HEART",
        "24136001": "HIP",
        "29836001": "HIP",
        "85050009": "HUMERUS",
        "661005": "JAW",
        "64033007": "KIDNEY",
        "72696002": "KNEE",
        "30021000": "LOWERLEG",
        "10200004": "LIVER",
        "122496007": "LSPINE",
        "39607008": "LUNG",
        "45048000": "NECK",
        "417437006": "NECKCHEST",
        "416152001": "NECKCHESTABDOMEN",
        "416319003": "NECKCHESTABDPELV",
        "363654007": "ORBIT",
        "15497006": "OVARY",
        "15776009": "PANCREAS",
        "816092008": "PELVIS",
        "12921003": "PELVIS",
        "41216001": "PROSTATE",
        "79601000": "SCAPULA",
        "16982005": "SHOULDER",
        "89546000": "SKULL",
        "421060004": "SPINE",
        "78961009": "SPLEEN",
        "68367000": "THIGH",
        "69748006": "THYROID",
        "53620006": "TMJ",
        "122495006": "TSPINE",
        "35039007": "UTERUS",
        "38266002": "WHOLEBODY",
        "74670003": "WRIST",
    }
)

#: What a maker's name begins with, in small letters and without marks, to the name it is counted under. Names that
#: changed with the owner are one maker: Canon bought Toshiba's scanners in 2016, Carestream Kodak's in 2007.
_VENDORS = (
    ("siemens", "Siemens"),
    ("ge ", "GE"),
    ("ge-", "GE"),
    ("gehc", "GE"),
    ("general electric", "GE"),
    ("imatron", "GE"),
    ("philips", "Philips"),
    ("picker", "Philips"),
    ("marconi", "Philips"),
    ("canon", "Canon"),
    ("toshiba", "Canon"),
    ("hitachi", "Hitachi"),
    ("fuji", "Fujifilm"),
    ("united imaging", "United Imaging"),
    ("uih", "United Imaging"),
    ("shanghai united imaging", "United Imaging"),
    ("hologic", "Hologic"),
    ("lorad", "Hologic"),
    ("agfa", "Agfa"),
    ("carestream", "Carestream"),
    ("kodak", "Carestream"),
    ("eastman kodak", "Carestream"),
    ("konica", "Konica Minolta"),
    ("samsung", "Samsung"),
    ("medison", "Samsung"),
    ("mindray", "Mindray"),
    ("esaote", "Esaote"),
    ("neusoft", "Neusoft"),
    ("varian", "Varian"),
    ("elekta", "Elekta"),
    ("bruker", "Bruker"),
    ("shimadzu", "Shimadzu"),
)
_PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Protocol:
    """How an image was taken.

    Attributes:
        sop_class: SOP Class UID of DICOM objects, else empty.
        body_part: a value of Body Part Examined (PS3.16 annex L), or empty.
        orientation: axial, coronal or sagittal, whichever plane is nearest to that of its slices; empty for an image
            without a place in the patient.
        slices: how many; 1 for a picture.
        parameters: by the names of `UNITS`, in those units.
    """

    sop_class: str = ""
    body_part: str = ""
    orientation: str = ""
    slices: int = 1
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """What became of the files of one unit: a volume, and what is known of its making."""

    volume: Volume
    modality: str = ""
    manufacturer: str = ""
    model: str = ""
    protocol: Protocol = Protocol()


def facts_of(datasets: Dataset | Sequence[Dataset]) -> Protocol:
    """The protocol of one series of classic images, or of one object.

    Raises:
        RefusedError: unreadable.
    """
    images = [datasets] if isinstance(datasets, Dataset) else datasets
    with damage_is(Reason.UNREADABLE, "header"):
        first = images[0]
        return Protocol(
            sop_class=text(first, "SOPClassUID"),
            body_part=_body_part(first),
            orientation=_orientation(first),
            slices=sum(frames(image) for image in images),
            parameters=_parameters(images),
        )


def placed(protocol: Protocol, volume: Volume) -> Protocol:
    """With plane and number of slices taken from a volume: for files whose headers say neither."""
    flat = volume.array.ndim == 2 or volume.array.shape[2] == 1
    plane = "" if flat else nearest_plane(volume.affine[:3, 2])
    return replace(protocol, orientation=plane, slices=1 if flat else int(volume.array.shape[2]))


def nearest_plane(normal: Floats) -> str:
    """The plane to which a direction (right-left, anterior-posterior, superior-inferior) is most perpendicular."""
    return _PLANES[int(np.argmax(np.abs(normal)))]


def vendor(manufacturer: str) -> str:
    """A maker's name as it is counted: one for all spellings of a known maker, else the name as it stands."""
    plain = " ".join(manufacturer.replace("_", " ").split())
    small = plain.casefold() + " "
    return next((name for beginning, name in _VENDORS if small.startswith(beginning)), plain)


def _body_part(dataset: Dataset) -> str:
    converted = next(_groups(dataset, "UnassignedSharedConvertedAttributesSequence"), Dataset())
    stated = text(dataset, "BodyPartExamined") or text(converted, "BodyPartExamined")
    if stated:
        return "".join(stated.upper().split())
    coded = dataset.get("AnatomicRegionSequence") or next(
        (part.AnatomicRegionSequence for part in _groups(dataset, "FrameAnatomySequence")
         if part.get("AnatomicRegionSequence")), None
    )  # fmt: skip
    return _region(coded[0]) if coded else ""


def _region(coded: Dataset) -> str:
    """Body Part Examined for a coded region, in SNOMED CT's numbers or in the older SNOMED-RT ones."""
    code = Code(str(coded.get("CodeValue", "")), str(coded.get("CodingSchemeDesignator", "")), "")
    return next((part for number, part in _REGIONS.items() if Code(number, "SCT", "") == code), "")


def _orientation(dataset: Dataset) -> str:
    with damage_is(Reason.UNREADABLE, "ImageOrientationPatient"):
        cosines: Sequence[float] = numbers(dataset, "ImageOrientationPatient")
        if not cosines:
            plane = next(_groups(dataset, "PlaneOrientationSequence"), None)
            cosines = [float(cosine) for cosine in plane.get("ImageOrientationPatient", ())] if plane else ()
    if len(cosines) != 6:
        return ""
    return nearest_plane(np.cross(cosines[:3], cosines[3:]))


def _parameters(images: Sequence[Dataset]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for image in images:
        for name, value in (*_classic(image), *_enhanced(image)):
            if np.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: float(median(found[name])) for name in UNITS if name in found}


def _classic(image: Dataset) -> Iterator[tuple[str, float]]:
    for name in UNITS:
        try:
            values = numbers(image, name)
        except ValueError:
            continue
        if values:
            yield name, values[0]


def _enhanced(image: Dataset) -> Iterator[tuple[str, float]]:
    if "SharedFunctionalGroupsSequence" not in image:
        return
    for group, attribute, name in _GROUPS:
        for part in _groups(image, group):
            value = _number(part, attribute)
            if value is not None:
                yield name, value


def _number(part: Dataset, attribute: str) -> float | None:
    try:
        with damage_is(Reason.UNREADABLE):
            value = part.get(attribute)
            if value is None or value == "":
                return None
            return float(value if isinstance(value, int | float) else np.ravel(value)[0])
    except RefusedError:
        return None


def _groups(image: Dataset, name: str) -> Iterator[Dataset]:
    """The functional groups of one name: the shared one, then those of the frames (PS3.3 C.7.6.16)."""
    for key in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in image.get(key) or ():
            yield from (item.get(name) or ())[:1]
