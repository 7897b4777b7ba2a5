"""Sample pictures of a site's test cases, for a simulation's report: one slice each, with truth and prediction.

They are made only where the images are. No message type of the coordinator leads here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from locum.common.messages import Tensors
from locum.site_client.session import Session
from locum.site_client.training.evaluate import predict


def sample_pictures(session: Session, count: int) -> tuple[dict[str, Any], Tensors]:
    """Slices of the first `count` test cases, spread over the classes, as the network stands.

    Returns:
        a header with one entry per picture (case id, true and predicted class, probability) and the arrays
        `image-i` (rows × columns, uint8) and, in segmentation, `truth-i` and `prediction-i` (class indices, uint8).
    """
    session.network.eval()
    data = session.dataset("test", augment=False)
    entries: list[dict[str, Any]] = []
    arrays: Tensors = {}
    for number, index in enumerate(_spread(session, count)):
        item = data[index]
        with torch.inference_mode():
            probabilities = predict(session.plan, session.network, item["image"][None].to(session.device))[0].cpu()
        entry, pictures = _picture(session, item, probabilities)
        entries.append({"case": session.cases["test"][index].id, **entry})
        arrays |= {f"{name}-{number}": picture for name, picture in pictures.items()}
    return {"pictures": entries}, arrays


def _spread(session: Session, count: int) -> list[int]:
    """Indices of test cases, taking the classes in turn."""
    by_label: dict[str | None, list[int]] = {}
    for index, case in enumerate(session.cases["test"]):
        by_label.setdefault(case.label, []).append(index)
    turns = max((len(rows) for rows in by_label.values()), default=0)
    return [rows[turn] for turn in range(turns) for rows in by_label.values() if turn < len(rows)][:count]


def _picture(session: Session, item: dict[str, Any], probabilities: torch.Tensor) -> tuple[dict[str, Any], Tensors]:
    volume = item["image"][0].numpy()
    classes = session.plan.contract.classes
    if session.plan.contract.task == "classification":
        best = int(probabilities.argmax())
        entry = {
            "truth": classes[int(item["label"])],
            "prediction": classes[best],
            "probability": float(probabilities[best]),
        }
        return entry, {"image": _grey(_slice(volume, volume.shape[-1] // 2))}
    truth, predicted = item["mask"][0].numpy(), probabilities.argmax(dim=0).numpy()
    at = int((truth > 0).sum(axis=tuple(range(truth.ndim - 1))).argmax()) if volume.ndim == 3 else 0
    planes = {
        "truth": _slice(truth, at).astype(np.uint8),
        "prediction": _slice(predicted, at).astype(np.uint8),
    }
    return {}, {"image": _grey(_slice(volume, at)), **planes}


def _slice(volume: Any, at: int) -> Any:
    """A plane as a viewer shows it: the last axis is the slice, rows downwards."""
    plane = volume[..., at] if volume.ndim == 3 else volume
    return np.ascontiguousarray(np.rot90(plane))


def _grey(plane: Any) -> Any:
    low, high = np.percentile(plane, [1, 99])
    return (np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
