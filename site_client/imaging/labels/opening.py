"""Which source of labels and which source of masks a site file asks for."""

from __future__ import annotations

from collections.abc import Sequence

from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.given import Annotation, LabelSource, MaskSource
from locum.site_client.imaging.labels.tables import LabelBook
from locum.site_client.imaging.sources import FhirLabels, Labels, ObjectMasks, ReportLabels, SiteData
from locum.site_client.imaging.terminology import Terminology


def label_source(site: SiteData, keys: Keys, annotations: Sequence[Annotation]) -> LabelSource | None:
    """The site's labels; None if it has none. Raises DataError if they are not as described."""
    labels = site.labels
    terms = Terminology.load(site.terminology) if site.terminology is not None else None
    if labels is None:
        return None
    if isinstance(labels, Labels):
        return LabelBook(labels, keys, terms)
    if isinstance(labels, ReportLabels):
        from locum.site_client.imaging.labels.reports import ReportBook

        return ReportBook(labels, keys, terms)
    if isinstance(labels, FhirLabels):
        from locum.site_client.imaging.labels.fhir import FhirBook

        return FhirBook(labels, keys, terms)
    from locum.site_client.imaging.labels.sr import SrBook

    return SrBook(labels, keys, annotations, terms)


def mask_source(site: SiteData, keys: Keys, annotations: Sequence[Annotation]) -> MaskSource:
    """The site's masks: of a site without any it finds none. Raises DataError if they are not as described."""
    masks = site.masks
    if not isinstance(masks, ObjectMasks):
        from locum.site_client.imaging.labels.folder import FolderMasks

        return FolderMasks(site, keys)
    if masks.kind == "seg":
        from locum.site_client.imaging.labels.seg import seg_masks

        return seg_masks(masks, keys, annotations)
    from locum.site_client.imaging.labels.rtstruct import rtstruct_masks

    return rtstruct_masks(masks, keys, annotations)
