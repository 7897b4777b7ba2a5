"""A plan's names turned into objects: network, loss, optimiser, transforms, and the checks that need them built.

Rules:
  * Only names of :mod:`locum.common.names` are imported, and torch and MONAI only inside the functions here.
  * What the contract says (dimensions, channels, classes) is filled in, so that a plan cannot contradict itself.
"""

from __future__ import annotations

import importlib
import inspect
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from locum.common import names
from locum.common.canonical import digest
from locum.common.metrics import Metric
from locum.common.names import suggestion
from locum.common.plan import Part, Plan, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

Role = Literal["shared", "local", "frozen"]
Model = dict[str, NDArray[Any]]

#: What libraries raise from a constructor that is given parameters it cannot use.
CONSTRUCTION_ERRORS = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError, RuntimeError
)  # fmt: skip

_RUNNING_STATISTICS = ("*running_mean", "*running_var")


def load_target(target: str) -> Any:
    """Imports `module:attribute` of an allow-list entry."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve(group: str, name: str) -> tuple[Any, Any]:
    """The object behind a name, and its allow-list entry (None for an entry point)."""
    entry = names.GROUPS[group].get(name)
    if entry is not None:
        return load_target(entry.target), entry
    return names.installed(group)[name].load(), None


def _filled(plan: Plan, fills: Mapping[str, names.Filled]) -> dict[str, Any]:
    contract = plan.contract
    values = {
        "dimensions": contract.dimensions,
        "channels": contract.channels,
        "classes": len(contract.classes),
        "input_size": list(plan.training.input_size),
    }
    return {parameter: values[what] for parameter, what in fills.items()}


def _construct(plan: Plan, group: str, part: Part) -> Any:
    target, entry = resolve(group, part.name)
    if entry is None:
        return target(plan=plan, **part.parameters)
    return target(**{**_filled(plan, entry.fills), **part.parameters, **entry.fixed})


def network(plan: Plan) -> nn.Module:
    """The network of a plan, with fresh weights from torch's default generator."""
    built: nn.Module = _construct(plan, "locum.networks", plan.network)
    return built


def skeleton(plan: Plan) -> nn.Module:
    """The network of a plan without weights, for names and shapes. Some networks cannot be made so, but be moved."""
    return network(plan).to("meta")


def strided_classifier(
    in_channels: int, classes: int, input_size: list[int], channels: list[int], num_groups: int = 4
) -> nn.Module:
    """A small classifier: strided 3-wide convolutions, group norm, ReLU, global mean, one linear layer.

    Args:
        in_channels: channels of the image.
        classes: number of classes.
        input_size: spatial size of the input, of 2 or 3 dimensions.
        channels: channels of each stage; every stage halves the size.
        num_groups: groups of the normalisation (Wu & He, ECCV 2018).
    """
    from monai.networks.blocks import Convolution
    from monai.networks.layers.factories import Pool
    from torch import nn

    dimensions = len(input_size)
    widths = [in_channels, *channels]
    stages = [
        Convolution(dimensions, a, b, strides=2, act="RELU", norm=("GROUP", {"num_groups": num_groups}))
        for a, b in zip(widths, channels, strict=False)
    ]
    pool = Pool[Pool.ADAPTIVEAVG, dimensions](1)
    return nn.Sequential(*stages, pool, nn.Flatten(), nn.Linear(widths[-1], classes))


def logits(built: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The class scores of a network."""
    return scores_of(built(images))


def scores_of(output: Any) -> torch.Tensor:
    """The class scores of what a network gave; some MONAI networks return them first of several outputs."""
    scores: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return scores


def loss(plan: Plan) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of a plan, called with scores (batch × classes × …) and integer truth (batch × 1 × …)."""
    function = _construct(plan, "locum.losses", plan.loss)
    if plan.loss.name == "CrossEntropyLoss":
        return lambda scores, truth: function(scores, truth[:, 0].long())
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = function
    return plain


def optimiser(plan: Plan, parameters: Iterable[nn.Parameter], rate: float = 1.0) -> torch.optim.Optimizer:
    """The optimiser of a plan, its learning rate multiplied by `rate` (the schedule's factor)."""
    kind = load_target(names.OPTIMISERS[plan.optimiser.name].target)
    built: torch.optim.Optimizer = kind(parameters, **plan.optimiser.parameters)
    for group in built.param_groups:
        group["lr"] = group["lr"] * rate
    return built


def metric_of(name: str) -> Metric:
    """The metric behind a name."""
    found: Metric = resolve("locum.metrics", name)[0]
    return found


def transforms(plan: Plan, stage: Literal["prepare", "augment"]) -> list[Any]:
    """The MONAI dictionary transforms of one stage, over the keys `image` and, in segmentation, `mask`."""
    parts = plan.transforms.prepare if stage == "prepare" else plan.transforms.augment
    return [_transform(part, segmentation=plan.contract.task == "segmentation") for part in parts]


def _transform(part: Part, *, segmentation: bool) -> Any:
    target, entry = resolve("locum.transforms", part.name)
    spatial = entry is None or entry.spatial
    keys = ["image", "mask"] if segmentation and spatial else ["image"]
    parameters = dict(part.parameters)
    if entry is not None and entry.interpolates and len(keys) == 2:
        parameters["mode"] = [parameters.get("mode", "bilinear"), "nearest"]
    return target(keys=keys, **parameters, **(entry.fixed if entry is not None else {}))


def tensor_roles(plan: Plan, built: nn.Module) -> dict[str, Role]:
    """What happens to each tensor of the network's state; integer buffers are always local."""
    return {name: _role(plan, name, tensor) for name, tensor in built.state_dict().items()}


def _role(plan: Plan, name: str, tensor: torch.Tensor) -> Role:
    def named(globs: Iterable[str]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    if named(plan.tensors.frozen):
        return "frozen"
    if named(plan.tensors.local) or not tensor.is_floating_point():
        return "local"
    if named(plan.tensors.shared):
        return "shared"
    return "local" if named(_RUNNING_STATISTICS) else "shared"


def initial_state(plan: Plan) -> tuple[nn.Module, dict[str, Role]]:
    """The network with the weights that the plan's seed gives, and the role of each tensor.

    Coordinator and sites call this alike, so frozen and local tensors start equal everywhere.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        built = network(plan)
    return built, tensor_roles(plan, built)


def tensors_of(built: nn.Module, roles: Mapping[str, Role], wanted: Role) -> Model:
    """The tensors of a network that have one role, as numpy arrays (copies), by name."""
    state = built.state_dict()
    return {name: state[name].detach().cpu().numpy().copy() for name, role in roles.items() if role == wanted}


def shared_tensors(built: nn.Module, roles: Mapping[str, Role]) -> Model:
    """The tensors that travel."""
    return tensors_of(built, roles, "shared")


def configuration(plan: Plan, shared: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """What must be equal at every site of a run, in words or digests, by topic."""
    shapes = {name: [str(array.dtype), *array.shape] for name, array in shared.items()}
    return {
        "plan": plan.digest,
        "tensors": digest(shapes),
        "transforms": digest(plan.transforms.model_dump(mode="json")),
        "classes": ", ".join(plan.contract.classes),
        "codes": digest({name: sorted(codes) for name, codes in plan.contract.codes.items()}),
        "metrics": ", ".join(plan.evaluation.metrics),
        "locum": version("locum"),
        "monai": version("monai"),
        "torch": version("torch").split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


# --- checks that need the parts built


def check_buildable(plan: Plan) -> list[Problem]:
    """Builds every part of a plan and probes the network's output shape; returns what is wrong."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    found: list[Problem] = []
    for stage in ("prepare", "augment"):
        for index, part in enumerate(getattr(plan.transforms, stage)):
            location = ("transforms", stage, index)
            segmentation = plan.contract.task == "segmentation"
            found += _attempt(location, part, partial(_transform, part, segmentation=segmentation))
    found += _attempt(("loss",), plan.loss, lambda: loss(plan))
    found += _strategy_problems(plan)
    found += _network_problems(plan)
    found += _unbounded_problems(plan)
    return found


def _attempt(location: tuple[str | int, ...], part: Part, build: Callable[[], Any]) -> list[Problem]:
    """One problem if `build` fails."""
    try:
        build()
    except CONSTRUCTION_ERRORS as error:
        return [_construction_problem(location, part, error)]
    return []


def _construction_problem(location: tuple[str | int, ...], part: Part, error: Exception) -> Problem:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "unexpected keyword argument" in text:
        parameter = text.rsplit("'", 2)[-2]
        options = _parameters_of(part)
        message = f"{part.name} has no parameter '{parameter}'"
        return Problem((*location, parameter), message, suggestion(parameter, options) if options else "remove it")
    return Problem(location, f"{part.name} cannot be built: {text}", f"check the parameters of {part.name}")


def _parameters_of(part: Part) -> list[str]:
    for table in (names.NETWORKS, names.LOSSES, names.TRANSFORMS, names.OPTIMISERS, names.STRATEGIES):
        entry = table.get(part.name)
        if entry is not None:
            hidden = {"self", "args", "kwargs", "keys", "plan", *getattr(entry, "fills", ()), *entry.fixed}
            return [name for name in inspect.signature(load_target(entry.target)).parameters if name not in hidden]
    return []


def _strategy_problems(plan: Plan) -> list[Problem]:
    part = plan.strategy
    return _attempt(("strategy",), part, lambda: resolve("locum.strategies", part.name)[0](**part.parameters))


def _network_problems(plan: Plan) -> list[Problem]:
    import torch

    built: list[nn.Module] = []
    found = _attempt(("network",), plan.network, lambda: built.append(skeleton(plan)))
    if found:
        return found
    found = [
        *_optimiser_problems(plan, built[0]),
        *_tensor_problems(plan, built[0]),
        *_noise_problems(plan, built[0]),
        *_privacy_problems(plan, built[0]),
    ]
    shapes: list[tuple[int, ...]] = []
    with torch.no_grad():
        probe = torch.empty((2, plan.contract.channels, *plan.training.input_size), device="meta")
        found += _attempt(
            ("network",), plan.network, lambda: shapes.append(tuple(logits(built[0].eval(), probe).shape))
        )
    return found + (_shape_problems(plan, shapes[0]) if shapes else [])


def _tensor_problems(plan: Plan, built: nn.Module) -> list[Problem]:
    """A glob that names no tensor is a misspelling, and what it meant to protect would travel."""
    existing = list(built.state_dict())
    return [
        Problem(
            ("tensors", role, index), f"'{glob}' names no tensor of {plan.network.name}", f"there are {existing[0]}, …"
        )
        for role, globs in plan.tensors
        for index, glob in enumerate(globs)
        if not any(fnmatchcase(name, glob) for name in existing)
    ]


def coordinates(plan: Plan, built: nn.Module) -> int:
    """How many numbers an update has."""
    state = built.state_dict()
    return sum(state[name].numel() for name, role in tensor_roles(plan, built).items() if role == "shared")


def _noise_problems(plan: Plan, built: nn.Module) -> list[Problem]:
    """Whether a ring holds the site noise of every roster that the plan may have."""
    from locum.common.secagg import LEAST_SITES, MOST_SITES
    from locum.common.secagg.ring import RingError
    from locum.common.sums import site_noise  # it needs the metrics of this module

    least = max(LEAST_SITES, plan.participation.quorum)
    # The bits that are left to the sum grow at 2^k + 1 sites; in between, more sites make room.
    for sites in {least, *(n for n in (5, 9, 17, 33, 65, MOST_SITES) if n > least)}:
        try:
            site_noise(plan, sites=sites, size=coordinates(plan, built))
        except RingError as error:
            remedy = "set protection.ring: 64" if plan.protection.ring == 32 else "ask for a larger epsilon"
            return [Problem(("protection", "site_noise"), str(error), remedy)]
    return []


#: Normalisations that look at one image alone, as a plan writes them.
_NORMS = {"instance": "instance", "[instance, {affine: true}]": ["instance", {"affine": True}]}


def privacy_problem(built: nn.Module) -> str:
    """Why a network cannot be trained with differential privacy, as far as its layers show; empty if it can."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, layer in built.named_modules():
        if isinstance(layer, _BatchNorm):
            return f"'{name}' normalises over the batch ({type(layer).__name__}), which mixes patients"
        if getattr(layer, "running_mean", None) is not None:
            return f"'{name}' keeps running statistics ({type(layer).__name__}), and they have no noise"
    return ""


def _privacy_problems(plan: Plan, built: nn.Module) -> list[Problem]:
    """What a plan with differential privacy cannot train."""
    problem = privacy_problem(built) if plan.private is not None else ""
    if not problem:
        return []
    fitting = [words for words, norm in _NORMS.items() if _private_with(plan, norm)]
    remedy = f"set norm: {fitting[0]}" if fitting else "use a network with instance or group normalisation"
    return [Problem(("network",), problem, remedy)]


def _private_with(plan: Plan, norm: object) -> bool:
    """Whether the network takes a norm with which it can be trained with differential privacy."""
    parameters = {**plan.network.parameters, "norm": norm}
    other = plan.model_copy(update={"network": Part.model_validate({"name": plan.network.name, **parameters})})
    try:
        return not privacy_problem(skeleton(other))
    except CONSTRUCTION_ERRORS:
        return False


def _unbounded_problems(plan: Plan) -> list[Problem]:
    """Metrics that no noise can hide a patient in."""
    if plan.private is None:
        return []
    message = "one patient can change it without bound, so no noise is enough"
    remedy = "leave it out of release.metrics, or use another metric"
    return [
        Problem(("release", "metrics"), f"{name}: {message}", remedy)
        for name in plan.released_metrics
        if metric_of(name).bound is None
    ]


def _optimiser_problems(plan: Plan, built: nn.Module) -> list[Problem]:
    return _attempt(("optimiser",), plan.optimiser, lambda: optimiser(plan, built.parameters()))


def _shape_problems(plan: Plan, shape: tuple[int, ...]) -> list[Problem]:
    classes = len(plan.contract.classes)
    spatial = plan.training.input_size if plan.contract.task == "segmentation" else ()
    wanted = (2, classes, *spatial)
    if shape == wanted:
        return []
    message = (
        f"{plan.network.name} gives {list(shape[1:])} for an input of {list(plan.training.input_size)}, "
        f"but {classes} classes need {list(wanted[1:])}"
    )
    return [Problem(("network",), message, "choose a network or parameters whose output has one channel per class")]
