"""De-identification of DICOM by PS3.15 Annex E: tables as data, an engine of our own, a search for what is left."""
