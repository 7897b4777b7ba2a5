"""Cases that nobody has ingested: what a catalog would say of them, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locum.common.plan import Plan
from locum.site_client.imaging.catalog import Case, Facts
from locum.site_client.imaging.declared import Declared
from locum.site_client.imaging.fitting import Seen, misses
from locum.site_client.readiness.clauses import Measured, judged
from tests.plans import plan

#: What the cases of these tests are, unless told.
_FACTS: dict[str, Any] = {
    "label": "lesion", "masked": False, "modality": "CT", "manufacturer": "SIEMENS", "model": "M",
    "shape": (64, 64, 40), "spacing": (1.0, 1.0, 2.0), "dtype": "int16", "sop_class": "1.2.840.10008.5.1.4.1.1.2",
    "body_part": "CHEST", "sex": "F", "age": 50, "month": "2024-05", "orientation": "axial", "slices": 40,
    "profile": "PS3.15 Basic", "defaced": True, "parameters": {}, "codes": (),
}  # fmt: skip

#: A contract that asks for everything, and that the cases of these tests meet.
CONTRACT: dict[str, Any] = {
    "task": "classification", "modality": ["CT"], "classes": ["no_lesion", "lesion"],
    "spacing": {"least": "0.5 mm", "most": "3 mm"}, "sop_classes": ["1.2.840.10008.5.1.4.1.1.2"],
    "body_parts": ["CHEST"], "orientation": ["axial"], "least_slices": 20,
    "months": {"first": "2024-01", "last": "2024-12"}, "codes": {"lesion": ["SCT:4147007"]},
    "prevalence": {"lesion": {"least": 0.2, "most": 0.8}},
    "strata": [{"by": "sex", "value": "F", "least_patients": 10}], "deidentified": True, "deface": "required",
    "consent": "required", "least_patients": 20, "single_class": "exclude",
}  # fmt: skip
DECLARED = Declared(consent=True, terminology="ab" * 32, codes={"lesion": ("SCT:4147007",)})


def asking(**changes: Any) -> Plan:
    """A plan with that contract, with changes."""
    return plan(contract=CONTRACT | changes)


def seen(of: Plan, number: int, *, fold: Any = "train", patient: str | None = None, **facts: Any) -> Seen:
    """One case; of a patient of its own unless told."""
    name = f"{number:016x}"
    told = Facts(id=name, patient=patient or f"p{number}", **(_FACTS | facts))
    case = Case(name, told.patient, Path("i.nii"), None, told.label, fold, told.manufacturer)
    return Seen(case, told, misses(told, of.contract))


def everybody(of: Plan, count: int = 40, **facts: Any) -> list[Seen]:
    """So many patients, the half of them with a lesion, with an image each."""
    return [seen(of, n, **({"label": ("lesion", "no_lesion")[n % 2]} | facts)) for n in range(count)]


def measured(
    of: Plan, cases: Sequence[Seen] | None = None, declared: Declared = DECLARED, *, least_cell: int = 10
) -> Measured:
    """What a site with these cases says."""
    return judged(of, everybody(of) if cases is None else cases, declared, least_cell=least_cell)
