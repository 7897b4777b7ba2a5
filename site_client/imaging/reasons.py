"""Why an image was not taken: one list for the whole site, with a sentence for a person.

Rules:
  * Everything found is either stored or quarantined for exactly one reason of this list.
  * A reason is a fact about the data, never an accident of the program: an unexpected error is not caught as one.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a file or a series is in quarantine; the value is what the catalog and the reports hold."""

    NOT_AN_IMAGE = "not_an_image"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    INCOMPLETE_HEADER = "incomplete_header"
    UNSUPPORTED_OBJECT = "unsupported_object"
    LOCALIZER = "localizer"
    DERIVED = "derived"
    BURNED_IN = "burned_in"
    SECONDARY_CAPTURE = "secondary_capture"
    DOCUMENT = "document"
    NO_REGIONS = "no_regions"
    COLOUR = "colour"
    MOSAIC = "mosaic"
    NO_PIXELS = "no_pixels"
    NO_PATIENT_ID = "no_patient_id"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    REJECTED = "rejected"
    RESIDUE = "residue"
    INCOMPLETE_STUDY = "incomplete_study"
    MIXED_PATIENTS = "mixed_patients"
    DUPLICATE_INSTANCE = "duplicate_instance"
    CONFLICTING_INSTANCES = "conflicting_instances"
    SEVERAL_VOLUMES = "several_volumes"
    NO_GEOMETRY = "no_geometry"
    MIXED_GEOMETRY = "mixed_geometry"
    DUPLICATED_POSITIONS = "duplicated_positions"
    MISSING_SLICES = "missing_slices"
    IRREGULAR_SPACING = "irregular_spacing"
    TILTED = "tilted"
    MONOCHROME1_VOLUME = "monochrome1_volume"
    DECODE_FAILED = "decode_failed"
    NOT_FINITE = "not_finite"
    NO_LABEL = "no_label"
    UNMAPPED_CODE = "unmapped_code"
    CONFLICTING_LABELS = "conflicting_labels"
    UNCERTAIN_LABEL = "uncertain_label"
    MASK_MISSING = "mask_missing"
    MASK_UNREADABLE = "mask_unreadable"
    MASK_MISMATCH = "mask_mismatch"


#: What each reason means to a data steward.
SENTENCE: dict[Reason, str] = {
    Reason.NOT_AN_IMAGE: "The file can be read but is neither DICOM nor NIfTI.",
    Reason.UNREADABLE: "The file cannot be opened or its structure is damaged.",
    Reason.TOO_LARGE: "The file, or what it unpacks to, is larger than this software accepts.",
    Reason.INCOMPLETE_HEADER: "The DICOM header lacks its SOP class, SOP instance UID or series UID.",
    Reason.UNSUPPORTED_OBJECT: "The DICOM object is no image of a kind that is read.",
    Reason.LOCALIZER: "The image is a localizer (scout), not part of the volume.",
    Reason.DERIVED: "The image is a screen save or a secondary derivation of other images.",
    Reason.BURNED_IN: "The image says, or does not deny, that text is burned into its pixels.",
    Reason.SECONDARY_CAPTURE: "The object is a secondary capture: a picture of a screen or a scan of paper.",
    Reason.DOCUMENT: "The object is an encapsulated document, such as a PDF.",
    Reason.NO_REGIONS: "The ultrasound does not say where its picture is and where its text.",
    Reason.COLOUR: "The image is in colour; a grey-scale image is expected.",
    Reason.MOSAIC: "The image is a Siemens mosaic: many slices tiled into one picture.",
    Reason.NO_PIXELS: "The image object holds no pixel data.",
    Reason.NO_PATIENT_ID: "The image has no patient ID, so that its patient cannot be kept in one fold.",
    Reason.CONSENT_WITHDRAWN: "The patient is on the site's list of those who have withdrawn their consent.",
    Reason.REJECTED: "A person at the site has rejected the image.",
    Reason.RESIDUE: "After de-identification the object still held an identifier of its patient.",
    Reason.INCOMPLETE_STUDY: "The PACS said that there are more images than it gave.",
    Reason.MIXED_PATIENTS: "One series carries the IDs of several patients.",
    Reason.DUPLICATE_INSTANCE: "The same image is present twice; the first copy is used.",
    Reason.CONFLICTING_INSTANCES: "Two different images carry the same SOP instance UID.",
    Reason.SEVERAL_VOLUMES: "The series holds several multi-frame objects, or parts of one.",
    Reason.NO_GEOMETRY: "Position, orientation or spacing is missing or impossible.",
    Reason.MIXED_GEOMETRY: "The slices of the series differ in orientation, spacing or size.",
    Reason.DUPLICATED_POSITIONS: "Several slices lie at one position (time points, echoes, b-values or copies).",
    Reason.MISSING_SLICES: "Slices are missing: the distance between two neighbours is a multiple of the others.",
    Reason.IRREGULAR_SPACING: "The slices are not equally spaced.",
    Reason.TILTED: "The slices are stacked at a slant (gantry tilt).",
    Reason.MONOCHROME1_VOLUME: "A cross-sectional series is stored with inverted grey levels (MONOCHROME1).",
    Reason.DECODE_FAILED: "The pixel data is truncated, damaged or in an unknown compression.",
    Reason.NOT_FINITE: "The image contains values that are not numbers.",
    Reason.NO_LABEL: "The label file has no label for this image.",
    Reason.UNMAPPED_CODE: "The label is a local code that the site's class mapping does not name.",
    Reason.CONFLICTING_LABELS: "The site's sources give this image, or a voxel of it, two different labels.",
    Reason.UNCERTAIN_LABEL: "The report is not certain or denies the finding, or the readers have no majority.",
    Reason.MASK_MISSING: "There is no mask for this image.",
    Reason.MASK_UNREADABLE: "The mask cannot be read, or its values are not whole numbers from 0 to 255.",
    Reason.MASK_MISMATCH: "The mask does not lie on the grid of its image.",
}


class RefusedError(Exception):
    """A file or series that goes to quarantine; it never reaches a person as an error.

    Attributes:
        reason: the reason of the list above.
        detail: what exactly was seen, for the steward; it holds no patient identifier.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail
