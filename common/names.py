"""The allow-lists: every name that a plan may use, and what it stands for.

Rules:
  * A name that is not here, nor an installed entry point, does not exist. Nothing is looked up by dotted path.
  * An entry says which parameters Locum fills from the contract (a plan that repeats them is refused) and which
    are fixed because they would reach outside the plan (pretrained weights are a download).
  * This module is data: importing it loads neither torch nor MONAI.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal

Task = Literal["classification", "segmentation"]
BOTH: tuple[Task, ...] = ("classification", "segmentation")
CLASSIFY: tuple[Task, ...] = ("classification",)
SEGMENT: tuple[Task, ...] = ("segmentation",)

#: What a filled parameter takes from the contract and the training section.
Filled = Literal["dimensions", "channels", "classes", "input_size"]


@dataclass(frozen=True)
class Entry:
    """One name of an allow-list.

    Attributes:
        target: `module:attribute` of the library that provides it.
        tasks: the tasks it serves.
        fills: parameter of the target → what Locum puts there.
        fixed: parameters that a plan cannot change.
    """

    target: str
    tasks: tuple[Task, ...] = BOTH
    fills: Mapping[str, Filled] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


_NETS = "monai.networks.nets:"
_DIMS: Mapping[str, Filled] = MappingProxyType({"spatial_dims": "dimensions", "in_channels": "channels"})
_IN_OUT: Mapping[str, Filled] = MappingProxyType({**_DIMS, "out_channels": "classes"})
_RESNET: Mapping[str, Filled] = MappingProxyType(
    {"spatial_dims": "dimensions", "n_input_channels": "channels", "num_classes": "classes"}
)
_SENET: Mapping[str, Filled] = MappingProxyType({**_DIMS, "num_classes": "classes"})
_NO_DOWNLOAD: Mapping[str, Any] = MappingProxyType({"pretrained": False, "progress": False})


def _segmenter(name: str, **fixed: Any) -> Entry:
    return Entry(_NETS + name, SEGMENT, _IN_OUT, fixed)


NETWORKS: Mapping[str, Entry] = MappingProxyType(
    {
        **{
            name: Entry(_NETS + name, CLASSIFY, _IN_OUT, _NO_DOWNLOAD)
            for name in ("DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264")
        },
        **{
            f"ResNet{depth}": Entry(f"{_NETS}resnet{depth}", CLASSIFY, _RESNET, _NO_DOWNLOAD)
            for depth in (10, 18, 34, 50, 101)
        },
        "SEResNet50": Entry(_NETS + "SEResNet50", CLASSIFY, _SENET, _NO_DOWNLOAD),
        "EfficientNetBN": Entry(_NETS + "EfficientNetBN", CLASSIFY, _SENET, _NO_DOWNLOAD),
        "Classifier": Entry(
            "locum.common.build:strided_classifier",
            CLASSIFY,
            {"in_channels": "channels", "classes": "classes", "input_size": "input_size"},
        ),
        "ViT": Entry(
            _NETS + "ViT",
            CLASSIFY,
            {**_DIMS, "num_classes": "classes", "img_size": "input_size"},
            {"classification": True, "post_activation": None, "save_attn": False},
        ),
        "UNet": _segmenter("UNet"),
        "BasicUNet": _segmenter("BasicUNet"),
        "AttentionUnet": _segmenter("AttentionUnet"),
        "SegResNet": _segmenter("SegResNet"),
        "DynUNet": _segmenter("DynUNet", deep_supervision=False),
        "VNet": _segmenter("VNet"),
        "HighResNet": _segmenter("HighResNet"),
        "MedNeXt": _segmenter("MedNeXt", deep_supervision=False),
        "UNETR": Entry(_NETS + "UNETR", SEGMENT, {**_IN_OUT, "img_size": "input_size"}, {"save_attn": False}),
        "SwinUNETR": _segmenter("SwinUNETR"),
        "FlexibleUNet": Entry(_NETS + "FlexibleUNet", SEGMENT, _IN_OUT, {"pretrained": False}),
    }
)

_LOSS = "monai.losses:"
_ONE_HOT: Mapping[str, Any] = MappingProxyType({"to_onehot_y": True, "softmax": True})

LOSSES: Mapping[str, Entry] = MappingProxyType(
    {
        "CrossEntropyLoss": Entry("torch.nn:CrossEntropyLoss", CLASSIFY),
        "FocalLoss": Entry(_LOSS + "FocalLoss", BOTH, fixed={"to_onehot_y": True, "use_softmax": True}),
        "DiceLoss": Entry(_LOSS + "DiceLoss", SEGMENT, fixed=_ONE_HOT),
        "DiceCELoss": Entry(_LOSS + "DiceCELoss", SEGMENT, fixed=_ONE_HOT),
        "DiceFocalLoss": Entry(_LOSS + "DiceFocalLoss", SEGMENT, fixed=_ONE_HOT),
        "GeneralizedDiceLoss": Entry(_LOSS + "GeneralizedDiceLoss", SEGMENT, fixed=_ONE_HOT),
        "GeneralizedDiceFocalLoss": Entry(_LOSS + "GeneralizedDiceFocalLoss", SEGMENT, fixed=_ONE_HOT),
        "TverskyLoss": Entry(_LOSS + "TverskyLoss", SEGMENT, fixed=_ONE_HOT),
    }
)

OPTIMISERS: Mapping[str, Entry] = MappingProxyType(
    {name: Entry(f"torch.optim:{name}") for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop")}
)

#: Metrics by name; what each computes is in :mod:`locum.common.metrics` and :mod:`locum.common.calibration`.
METRICS: Mapping[str, Entry] = MappingProxyType(
    {
        "AUC": Entry("locum.common.metrics:auc", CLASSIFY),
        "accuracy": Entry("locum.common.metrics:accuracy", CLASSIFY),
        "confusion": Entry("locum.common.metrics:confusion", CLASSIFY),
        "calibration": Entry("locum.common.calibration:calibration", CLASSIFY),
        "ECE": Entry("locum.common.calibration:ece", CLASSIFY),
        "Brier": Entry("locum.common.calibration:brier", CLASSIFY),
        "Dice": Entry("locum.common.metrics:dice", SEGMENT),
        "surface_distance": Entry("locum.common.metrics:surface_distance", SEGMENT),
    }
)

STRATEGIES: Mapping[str, Entry] = MappingProxyType({"FedAvg": Entry("locum.server.strategies.fedavg:strategy")})

#: Rules that compare the updates of single sites, by the names that people know them by. None can be a strategy here.
NEED_SINGLE_UPDATES = frozenset(
    {
        *("Median", "CoordinateMedian", "FedMedian", "GeometricMedian", "RFA"),
        *("TrimmedMean", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "FLTrust", "FoolsGold", "qFedAvg", "QFedAvg"),
    }
)


@dataclass(frozen=True)
class TransformEntry:
    """One MONAI dictionary transform.

    Attributes:
        target: `module:attribute`.
        spatial: moves voxels, so in segmentation it is applied to image and mask together.
        random: draws from its generator; allowed under `augment` only, and the others under `prepare` only.
        interpolates: takes `mode`; the mask is always resampled by nearest neighbour.
        fixed: parameters that Locum sets.
    """

    target: str
    spatial: bool
    random: bool
    interpolates: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _transforms(names: str, **kind: Any) -> dict[str, TransformEntry]:
    return {name: TransformEntry(f"monai.transforms:{name}", **kind) for name in names.split()}


TRANSFORMS: Mapping[str, TransformEntry] = MappingProxyType(
    {
        **_transforms(
            "NormalizeIntensityd ScaleIntensityd ScaleIntensityRanged ScaleIntensityRangePercentilesd "
            "ClipIntensityPercentilesd ThresholdIntensityd HistogramNormalized AdjustContrastd ShiftIntensityd "
            "GaussianSmoothd GaussianSharpend MedianSmoothd RepeatChanneld",
            spatial=False,
            random=False,
        ),
        **_transforms("Spacingd Resized Zoomd Rotated", spatial=True, random=False, interpolates=True),
        **_transforms(
            "Orientationd SpatialPadd BorderPadd DivisiblePadd CenterSpatialCropd CenterScaleCropd "
            "ResizeWithPadOrCropd Rotate90d Flipd",
            spatial=True,
            random=False,
        ),
        "CropForegroundd": TransformEntry(
            "monai.transforms:CropForegroundd", spatial=True, random=False, fixed={"source_key": "image"}
        ),
        **_transforms(
            "RandGaussianNoised RandGaussianSmoothd RandGaussianSharpend RandAdjustContrastd RandBiasFieldd "
            "RandScaleIntensityd RandShiftIntensityd RandStdShiftIntensityd RandHistogramShiftd RandRicianNoised "
            "RandGibbsNoised RandCoarseDropoutd RandCoarseShuffled",
            spatial=False,
            random=True,
        ),
        **_transforms(
            "RandAffined RandRotated RandZoomd Rand2DElasticd Rand3DElasticd RandGridDistortiond",
            spatial=True,
            random=True,
            interpolates=True,
        ),
        **_transforms("RandFlipd RandAxisFlipd RandRotate90d RandSpatialCropd", spatial=True, random=True),
        **{
            name: TransformEntry(
                f"monai.transforms:{name}",
                spatial=True,
                random=True,
                fixed={"label_key": "mask", "num_samples": 1},
            )
            for name in ("RandCropByPosNegLabeld", "RandCropByLabelClassesd")
        },
    }
)

#: Entry-point groups that add to the lists above, for code a hospital has installed itself.
GROUPS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "locum.networks": NETWORKS,
        "locum.losses": LOSSES,
        "locum.metrics": METRICS,
        "locum.transforms": TRANSFORMS,
        "locum.strategies": STRATEGIES,
        "locum.datasets": MappingProxyType({}),
    }
)


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of `group` by name; they are loaded only when used."""
    return {entry.name: entry for entry in entry_points(group=group)}


def known(group: str) -> tuple[str, ...]:
    """Every name that resolves in `group`, sorted."""
    return tuple(sorted({*GROUPS[group], *installed(group)}))


def suggestion(word: str, options: Iterable[str]) -> str:
    """A remedy for a misspelt word: the nearest option, or the options themselves."""
    names = sorted(options)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.6)
    if near:
        return f"did you mean '{folded[near[0]]}'?"
    return "use one of: " + ", ".join(names)
