"""What damaged files make the imaging libraries raise, turned into a reason for quarantine.

Rules:
  * The list is what these libraries were seen to raise, on the malformed files of pydicom-data and
    pylibjpeg-data and on thousands of files with random bytes changed; it is no substitute for reading a file.
  * It is put around calls of these libraries on the content of one file, never around our own steps.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError
from pydicom.errors import BytesLengthException, InvalidDicomError

from locum.site_client.imaging.reasons import Reason, RefusedError

#: RecursionError and NotImplementedError are RuntimeErrors; UnicodeError is a ValueError.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    BytesLengthException,
    InvalidDicomError,
    HeaderDataError,
    HeaderTypeError,
    ImageDataError,
    ImageFileError,
    WrapStructError,
)


@contextmanager
def damage_is(reason: Reason, what: str = "") -> Iterator[None]:
    """Turn what a damaged file makes the libraries raise into a refusal."""
    try:
        yield
    except _DAMAGE as error:
        # The text of such an error may quote the file's content: the type says enough.
        raise RefusedError(reason, f"{what}: {type(error).__name__}" if what else type(error).__name__) from None
