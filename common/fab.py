"""The bundle that a run carries: a plan and no code.

Flower names it FAB (Flower App Bundle): a zip with an application's files. Ours holds `plan.yaml` and a licence line.
A site opens it only as a zip and reads `plan.yaml` alone; nothing of it is ever imported or written to disk.
"""

from __future__ import annotations

import io
import zipfile
import zlib

from locum.common.errors import PlanError
from locum.common.plan import Plan, parse_plan

_MAX_BUNDLE = 10 << 20
_MAX_PLAN = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_bundle(plan: Plan) -> bytes:
    """The bundle of a plan, byte for byte the same for the same plan."""
    files = {
        "LICENSE": "Apache-2.0\n",
        "plan.yaml": plan.to_yaml(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            bundle.writestr(zipfile.ZipInfo(name, _EPOCH), text)
    return buffer.getvalue()


def plan_of_bundle(content: bytes) -> Plan:
    """Reads the plan of a bundle and nothing else of it; raises :class:`PlanError`."""
    remedy = "propose the plan again"
    if len(content) > _MAX_BUNDLE:
        raise PlanError("the bundle is larger than 10 MiB", remedy)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle, bundle.open("plan.yaml") as file:
            text = file.read(_MAX_PLAN + 1)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise PlanError("the bundle is not a zip with a plan.yaml", remedy) from error
    if len(text) > _MAX_PLAN:
        raise PlanError("the bundle's plan is larger than 1 MiB", remedy)
    return parse_plan(text)
