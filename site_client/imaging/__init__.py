"""From DICOM or NIfTI folders to a catalog of cases that a model can train on."""
