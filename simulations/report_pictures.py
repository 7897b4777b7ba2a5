"""Sample pictures of a simulation's test cases, and how they are drawn: the image, and in segmentation truth and prediction as outlines.

Rules:
  * A simulation owns the data it made or was given; these pictures are images of patients if the data is real.
  * Truth is a solid line, prediction a dashed one, so that they differ without colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from locum.common.build import Model
from locum.common.plan import Plan
from locum.site_client.worker import Worker

Plane = NDArray[np.uint8]


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


def pictures_of(
    plan: Plan, workers: Mapping[str, Worker], model: Model, *, round_number: int, count: int = 3
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
