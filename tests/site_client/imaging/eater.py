"""`python eater.py`: reads paths from standard input, does with each file what an ingest does, and tells the outcome.

It stands in a process of its own so that the test sees a crash as its end and a hang as silence.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import warnings
from pathlib import Path

from locum.common.errors import DataError
from locum.site_client.imaging import deeplesion, dicom, geometry, nifti, npz
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import known_of
from locum.site_client.imaging.protocol import facts_of
from locum.site_client.imaging.reasons import RefusedError

KEYS = Keys.of(bytes(32))


def eaten(path: Path) -> str:
    """'stored', or the reason why not."""
    try:
        if path.suffix == ".npz":
            npz.row_counts(path)
            npz.row(path, "train", 0)
        elif path.suffix == ".png":
            deeplesion._plane(path)
        elif ".nii" in path.name:
            nifti.encode(nifti.read_image(path, path.stat().st_size))
        else:
            return _dicom(path)
    except RefusedError as refused:
        return refused.reason
    except DataError:
        return "told"
    return "stored"


def _dicom(path: Path) -> str:
    size = path.stat().st_size
    dataset = dicom.read(path, size)
    with dicom.damage_is(dicom.Reason.UNREADABLE):
        known, sop = known_of(dataset, KEYS), dicom.text(dataset, "SOPInstanceUID")
    item = Item(path.name, path, 0, size, 0)
    dicom.look(item, dataset, known, sop)
    seen = dicom.look(item, dataset, known, sop, dicom.RELEASABLE)
    # The decoder gets what the gate would have kept from it, too: most damage lies before the gate.
    facts_of(dataset)
    with contextlib.suppress(RefusedError):
        decoded(dataset)
    nifti.encode(geometry.volume_of([dataset], crop=(0, 0, 8, 8)))
    return seen.reason or ("annotation" if seen.annotation else "stored")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    for line in sys.stdin:
        outcome = eaten(Path(line.rstrip("\n")))
        sys.stdout.write(f"{outcome} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}\n")
        sys.stdout.flush()
