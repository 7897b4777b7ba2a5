"""Compressed pixels to plain ones, in a process of their own: a codec that crashes or hangs takes no ingest with it.

Rules:
  * The codecs are C and C++: a damaged stream was seen to end the whole process (CharLS, an image of 60000 × 60000).
    So whatever is encapsulated (PS3.5 A.4) is decoded in a child, which may die; the next one is started then.
  * The child gets the pixel data and the numbers that describe them, nothing else of the header; no pickle.
  * It has a time limit and a memory limit. It ends when its parent ends, for then its input ends; if it hangs then, the
    system's alarm ends it.

One request: a line of JSON with the numbers and the length, then so many bytes. One answer: a line of JSON with shape
and type, or the error's name, then the array's bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.grids import Array
from locum.site_client.imaging.headers import count, frames, text, voxels
from locum.site_client.imaging.reasons import Reason, RefusedError

#: Seconds for one object, and for each million of its voxels: slow codecs need 0.1.
_PATIENCE = 20.0
_PER_MILLION = 2.0
#: Seconds after that in which the parent, if it lives, ends the child itself and says why.
_GRACE = 10.0
#: What the child may address: three times the largest image that is accepted, and the libraries.
_MEMORY = 6 << 30
_COUNTS = ("Rows", "Columns", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit",
           "PixelRepresentation")  # fmt: skip


def decoded(dataset: Dataset) -> Array:
    """Stored values as pydicom gives them: ([frame,] row, column[, colour]).

    YBR becomes RGB; a palette is not applied.

    Raises:
        RefusedError: decode_failed.
    """
    with damage_is(Reason.DECODE_FAILED):
        if not UID(dataset.file_meta.TransferSyntaxUID).is_compressed:
            return np.asarray(dataset.pixel_array)
        return _CODECS.decode(dataset)


class _Codecs:
    """The child, started when it is first needed, and again when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def decode(self, dataset: Dataset) -> Array:
        """One object's pixels; raises RefusedError, or what a damaged header raises."""
        content = bytes(dataset["PixelData"].value)
        request: dict[str, Any] = {name: count(dataset, name) for name in _COUNTS} | {
            "syntax": str(dataset.file_meta.TransferSyntaxUID),
            "frames": frames(dataset),
            "photometric": text(dataset, "PhotometricInterpretation"),
            "length": len(content),
        }
        limit = _PATIENCE + _PER_MILLION * voxels(dataset) / 1e6
        request["alarm"] = limit + _GRACE
        with self._lock:
            try:
                return _conversation(self._running(), request, content, limit)
            except (BrokenPipeError, EOFError):
                self.end()
                raise RefusedError(Reason.DECODE_FAILED, "the codec crashed") from None
            except TimeoutError:
                self.end()
                raise RefusedError(Reason.DECODE_FAILED, f"not decoded after {limit:.0f} s") from None

    def _running(self) -> subprocess.Popen[bytes]:
        # A fork of this process has the same pipes: it needs a child of its own.
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._child = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-P", "-m", __name__],  # -P: what lies in the working folder is not ours to import
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._child

    def end(self) -> None:
        """End the child, whatever it is doing."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


_CODECS = _Codecs()
atexit.register(_CODECS.end)


def _conversation(child: subprocess.Popen[bytes], request: dict[str, Any], content: bytes, limit: float) -> Array:
    """Ask and read the answer; raises EOFError, BrokenPipeError, TimeoutError or RefusedError."""
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    # Of a child that hangs, writing does not come back either: only its end ends that.
    watch = threading.Timer(limit, end)
    watch.daemon = True
    watch.start()
    try:
        return _asked(child, request, content)
    except (BrokenPipeError, EOFError):
        if late.is_set():
            raise TimeoutError from None
        raise
    finally:
        watch.cancel()


def _asked(child: subprocess.Popen[bytes], request: dict[str, Any], content: bytes) -> Array:
    given, got = child.stdin, child.stdout
    if given is None or got is None:
        raise EOFError
    given.write(json.dumps(request).encode() + b"\n")
    given.write(content)
    given.flush()
    line = got.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    if "error" in head:
        raise RefusedError(Reason.DECODE_FAILED, head["error"])
    kind, shape = np.dtype(head["dtype"]), tuple(head["shape"])
    length = kind.itemsize * int(np.prod(shape, dtype=object))
    pixels = got.read(length)
    if len(pixels) < length:
        raise EOFError
    return np.frombuffer(pixels, kind).reshape(shape)


# The child.


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # The libraries print to standard output: it is not ours any more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        content = sys.stdin.buffer.read(request["length"])
        # Nobody handles this signal, so it ends the process even within a codec, and when nobody waits any more.
        signal.setitimer(signal.ITIMER_REAL, request["alarm"])
        try:
            with damage_is(Reason.DECODE_FAILED):
                pixels = np.ascontiguousarray(_image(request, content).pixel_array)
        except RefusedError as refused:
            answers.write(json.dumps({"error": refused.detail}).encode() + b"\n")
        else:
            answers.write(json.dumps({"shape": pixels.shape, "dtype": pixels.dtype.str}).encode() + b"\n")
            answers.write(pixels.data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()


def _image(request: dict[str, Any], content: bytes) -> Dataset:
    image = Dataset()
    for name in _COUNTS:
        setattr(image, name, request[name])
    image.NumberOfFrames = request["frames"]
    image.PhotometricInterpretation = request["photometric"]
    image.PixelData = content
    image["PixelData"].VR = "OB"
    image["PixelData"].is_undefined_length = True
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = UID(request["syntax"])
    return image


if __name__ == "__main__":
    _serve()
