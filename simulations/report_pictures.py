"""Sample pictures of a simulation's test cases: the image, and in segmentation truth and prediction as outlines.

Rules:
  * A simulation owns the data it made or was given; these pictures are images of patients if the data is real.
  * Truth is a solid line, prediction a dashed one, so that they differ without colour.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from contourpy import contour_generator
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from locum.common.build import Model
from locum.common.plan import Plan
from locum.site_client.worker import Worker

Plane = NDArray[np.uint8]

_PER_SITE, _IN_ALL = 3, 60


@dataclass(frozen=True)
class Picture:
    """One slice of a test case.

    Attributes:
        site: whose case it is.
        case: the case's id in the site's catalog.
        image: grey values (rows × columns, uint8).
        truth: the true class: its name in classification, class indices (rows × columns, uint8) in segmentation.
        prediction: the same of the model.
        probability: what the model gives its predicted class; None in segmentation.
    """

    site: str
    case: str
    image: Plane
    truth: str | Plane
    prediction: str | Plane
    probability: float | None = None


def pictures_each(sites: int) -> int:
    """How many pictures each site of a run shows, so that the page stays small."""
    return max(1, min(_PER_SITE, _IN_ALL // max(1, sites)))


def pictures_of(
    plan: Plan, workers: Mapping[str, Worker], model: Model, *, round_number: int, count: int
) -> list[Picture]:
    """`count` slices of each site's test cases with the truth and what the model says, in the order of the sites.

    Raises:
        SiteFailure: a worker failed.
    """
    found: list[Picture] = []
    for site, worker in workers.items():
        reply, arrays = worker.call("pictures", plan, model, round=round_number, count=count)
        for number, entry in enumerate(reply["pictures"]):
            said = {
                name: entry[name] if name in entry else arrays[f"{name}-{number}"] for name in ("truth", "prediction")
            }
            found.append(
                Picture(site, entry["case"], arrays[f"image-{number}"], **said, probability=entry.get("probability"))
            )
    return found


@dataclass(frozen=True)
class Shown:
    """A picture ready for the page.

    Attributes:
        right: whether the predicted class is the true one; None in segmentation.
        dice: of the shown slice, all foreground classes together; None if both are empty, and in classification.
    """

    picture: Picture
    svg: Markup
    right: bool | None = None
    dice: float | None = None


def shown(picture: Picture) -> Shown:
    """A picture as inline SVG: the image as PNG, outlines as paths."""
    if isinstance(picture.truth, str) or isinstance(picture.prediction, str):
        svg = _svg(picture.image, "", f"slice of a test case of {picture.site}")
        return Shown(picture, svg, right=picture.truth == picture.prediction)
    paths = _outline(picture.truth, "truth") + _outline(picture.prediction, "prediction")
    alt = f"slice of a test case of {picture.site} with the outlines of truth and prediction"
    return Shown(picture, _svg(picture.image, paths, alt), dice=_dice(picture.truth, picture.prediction))


def _svg(image: Plane, paths: str, alt: str) -> Markup:
    rows, columns = image.shape
    box = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(columns, rows, alt)
    inner = Markup('<image width="{}" height="{}" href="{}"/>').format(columns, rows, _png(image))
    return box + inner + Markup(paths) + Markup("</svg>")  # noqa: S704 (paths are numbers and our own words)


def _png(image: Plane) -> str:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outline(classes: Plane, look: str) -> str:
    """The outline of each foreground class as one SVG path; empty if there is none.

    Lines are traced as a whole, so that dashes run on. A pixel's middle lies half a unit from its corner, and the
    margin of one pixel closes what touches the border.
    """
    padded = np.pad(classes, 1)
    lines = [
        np.asarray(line, dtype=np.float64) - 0.5
        for name in np.unique(classes[classes > 0])
        for line in contour_generator(z=(padded == name).astype(np.float64)).lines(0.5)
    ]
    steps = "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in line.tolist()) + "Z" for line in lines)
    return f'<path class="{look}" d="{steps}"/>' if steps else ""


def _dice(truth: Plane, prediction: Plane) -> float | None:
    """Dice of all foreground classes of one slice, a voxel counting only if its class agrees."""
    total = int((truth > 0).sum() + (prediction > 0).sum())
    return 2 * int(((truth == prediction) & (truth > 0)).sum()) / total if total else None
