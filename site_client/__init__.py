"""The site agent: policy gate, imaging (DICOM to tensors), training."""
