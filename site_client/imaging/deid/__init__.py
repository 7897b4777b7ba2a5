"""De-identification of DICOM: PS3.15 Annex E, as a table and an engine over it."""
