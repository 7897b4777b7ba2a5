from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import PlanError
from locum.common.plan import Plan, Told, load_plan, parse_plan
from locum.common.secagg.ring import Ring, mean_error
from tests.plans import CLASSIFY, plan, secured, with_changes


def _errors(**changes: object) -> str:
    with pytest.raises(PlanError) as caught:
        plan(**changes)
    return caught.value.message


def _as_yaml(content: dict[str, object]) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()


def test_the_digest_is_the_same_for_the_same_plan_however_it_is_written() -> None:
    reordered = dict(reversed(CLASSIFY.items()))
    assert parse_plan(_as_yaml(CLASSIFY)).digest == parse_plan(json.dumps(reordered).encode()).digest


def test_a_plan_written_out_with_its_defaults_has_the_same_digest() -> None:
    first = plan()
    assert parse_plan(first.to_yaml().encode()).digest == first.digest
    assert parse_plan(first.canonical()).digest == first.digest


def test_every_change_changes_the_digest() -> None:
    digests = {plan(**{key: value}).digest for key, value in {
        "seed": 1, "rounds": 3, "training__local_steps": 3, "optimiser__lr": 0.1, "participation__deadline": "61 s",
    }.items()}  # fmt: skip
    assert len(digests | {plan().digest}) == 6


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        plan().rounds = 3  # type: ignore[misc]


def test_a_typo_names_its_line_its_key_and_the_word_that_was_meant() -> None:
    text = _as_yaml(with_changes(CLASSIFY, training__batchsize=3))
    line = next(number for number, row in enumerate(text.decode().splitlines(), 1) if "batchsize" in row)
    with pytest.raises(PlanError, match=rf"line {line}: training\.batchsize: .*did you mean 'batch_size'"):
        parse_plan(text)


def test_all_errors_of_form_are_told_at_once() -> None:
    message = _errors(training__batchsize=3, rounds="many", participation__deadline="10 kg")
    assert len(message.splitlines()) == 3


_PRIVATE = {"differential_privacy": {"epsilon": 1, "delta": 1e-5, "clip": 1}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network__name": "DenseNet12"}, "did you mean 'DenseNet121'"),
        ({"network__name": "torch.nn.Linear"}, "is a path"),
        ({"loss__name": "os.system"}, "is a path"),
        ({"network___target_": "os.system"}, "cannot name code"),
        ({"network__act": "torch.nn.ReLU"}, "cannot name files or code"),
        ({"network__act": "/etc/passwd"}, "cannot name files or code"),
        ({"network": {"name": "DenseNet121", "spatial_dims": 3}}, "Locum sets 'spatial_dims'"),
        ({"network": {"name": "DenseNet121", "pretrained": True}}, "Locum sets 'pretrained'"),
        ({"network": {"name": "UNet", "channels": [4, 8], "strides": [2]}}, "does not serve classification"),
        ({"evaluation__metrics": ["Dice"]}, "does not measure classification"),
        ({"evaluation__metrics": ["AUK"]}, "did you mean 'AUC'"),
        ({"release": {"metrics": ["confusion"]}}, "released but never measured"),
        ({"participation__deadline": 600}, "needs a number and a unit"),
        ({"participation__deadline": "10 mm"}, "not a unit that fits"),
        ({"contract__spacing": {"least": "2 mm", "most": "1 mm"}}, "larger than"),
        ({"contract__spacing": {"least": "2 s"}}, "not a unit that fits"),
        ({"contract__split": {"train": 0.9, "validation": 0.2, "test": 0.2}}, "sum to 1.3"),
        ({"contract__classes": ["a", "a"]}, "stands twice"),
        ({"contract__codes": {"lesoin": ["SCT:1"]}}, "did you mean 'lesion'"),
        ({"contract__codes": {"lesion": []}}, "no code stands here"),
        ({"contract__codes": {"lesion": ["4147007"]}}, "contract.codes"),
        ({"contract__prevalence": {"tumour": {"least": 0.1}}}, "none of the plan's classes"),
        ({"contract__prevalence": {"lesion": {"least": 0.6, "most": 0.5}}}, "larger than"),
        ({"contract__prevalence": {"lesion": {"most": 0.4}, "no_lesion": {"most": 0.5}}}, "sum to less than 1"),
        ({"contract__strata": [{"by": "sex", "value": "X"}]}, "sex is one of F, M, O"),
        ({"contract__strata": [{"by": "age", "value": "40-50"}]}, "age is one of 0-17"),
        (
            {
                "contract__strata": [
                    {"by": "manufacturer", "value": "GE", "least_patients": 5},
                    {"by": "manufacturer", "value": "ge", "least_patients": 6},
                ]
            },
            "stands twice",
        ),
        ({"contract__months": {"first": "2024-13"}}, "contract.months.first"),
        ({"contract__months": {"first": "2024-02", "last": "2024-01"}}, "'first' is after 'last'"),
        ({"contract__dimensions": 2, "training__input_size": [16, 16], "contract__least_slices": 3}, "has one slice"),
        ({"contract__body_parts": ["Chest"]}, "contract.body_parts"),
        ({"contract__orientation": ["oblique"]}, "contract.orientation"),
        ({"training__input_size": [16, 16]}, "give 3 numbers"),
        ({"training__local_epochs": 1}, "either local_steps or local_epochs"),
        ({"training__local_steps": None}, "either local_steps or local_epochs"),
        ({"transforms__augment": [{"name": "Spacingd", "pixdim": [1, 1, 1]}]}, "move it to transforms.prepare"),
        ({"transforms__prepare": [{"name": "RandFlipd"}]}, "move it to transforms.augment"),
        ({"transforms__prepare": [{"name": "LoadImaged"}]}, "not on the allow-list"),
        ({"transforms__prepare": [{"name": "Lambdad", "func": "x"}]}, "not on the allow-list"),
        ({"transforms__prepare": [{"name": "ScaleIntensityd", "keys": ["mask"]}]}, "Locum sets 'keys'"),
        ({"protection__ring": 16}, "Input should be 32 or 64"),
        ({"protection__secure_aggregation": "required", "participation__quorum": 101}, "has at most 100 sites"),
        ({"release": {"per_site": ["weights"]}}, "'metrics', 'training_loss' or 'case_counts'"),
        (
            {"release": {"per_site": ["training_loss"], "training_loss": False}},
            "each site is to tell its training_loss, which release.training_loss withholds",
        ),
        ({"protection": _PRIVATE}, "the training loss has no noise"),
        ({"protection": _PRIVATE, "release": {"training_loss": False}}, "no budget is set apart for them"),
        ({"protection": _PRIVATE, "training__gradient_clip": 1.0}, "clipped already"),
        ({"protection": _PRIVATE, "training__sampling": "balanced"}, "drawn independently of their class"),
        ({"protection": _PRIVATE, "training__precision": "mixed"}, "computed in float32"),
        ({"protection": {"differential_privacy": {"epsilon": 0, "delta": 1e-5, "clip": 1}}}, "greater than 0"),
        ({"protection": {"differential_privacy": {"epsilon": 1, "delta": 1e-5, "clip": 1e-30}}}, "equal to 0.00000000"),
        ({"protection": {"differential_privacy": {"epsilon": 1, "delta": 1e-5, "clip": 1e38}}}, "equal to 1000000000"),
        ({"protection": {"differential_privacy": {"epsilon": 1, "delta": 1e-16, "clip": 1}}}, "equal to 0.00000000"),
        ({"release": {"case_counts": False}}, "weights by cases tell the number of cases"),
        (
            {
                "contract": {"task": "segmentation", "classes": ["a", "b"]},
                "network": {"name": "VNet"},
                "loss": {"name": "DiceLoss"},
                "evaluation": {"metrics": ["Dice"]},
                "training__sampling": "balanced",
            },
            "a mask has many",
        ),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"name": "../../etc"}, "name"),
        ({"purpose": None}, "this key is missing"),
    ],
)
def test_a_wrong_plan_is_refused_with_what_to_do(changes: dict[str, object], told: str) -> None:
    assert told in _errors(**changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"name: [a", "line"),
        (b"a: 1\na: 2\n", "line 2: the key 'a' stands twice"),
        (b"a: &x 1\nb: *x\n", "anchors and aliases"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not allowed"),
        (b"- 1\n", "a plan is a mapping"),
        (b"", "a plan is a mapping"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a: " + b"x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_what_is_no_strict_yaml_is_refused_with_its_line(text: bytes, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        parse_plan(text)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_raise_anything_else(content: bytes) -> None:
    with pytest.raises(PlanError):
        parse_plan(content)


def test_a_missing_plan_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no plan at"):
        load_plan(tmp_path / "plan.yaml")


def test_the_exported_schema_accepts_what_ships_and_refuses_a_typo(project: Path) -> None:
    schema = Plan.model_json_schema()
    for path in sorted((project / "configs" / "plans").glob("*.yaml")):
        jsonschema.validate(load_plan(path).model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**plan().model_dump(mode="json"), "typo": 1}, schema)


def test_off_is_a_word_and_not_false() -> None:
    silent = _as_yaml(with_changes(CLASSIFY, protection=None))
    assert parse_plan(silent + b"protection:\n  secure_aggregation: off\n").digest == plan().digest


# --- secure sums


def test_a_plan_that_says_nothing_of_protection_asks_for_secure_sums() -> None:
    silent = plan(protection=None)
    assert silent.secured
    assert (silent.protection.ring, silent.release.per_site) == (32, ())
    assert not plan().secured


@pytest.mark.parametrize("what", ["metrics", "training_loss", "case_counts"])
def test_under_secure_aggregation_a_site_tells_of_itself_what_per_site_names_and_nothing_else(what: Told) -> None:
    assert plan().tells(what)
    assert not secured().tells(what)
    assert secured(release={"per_site": [what]}).tells(what)
    others: list[Told] = [other for other in ("metrics", "training_loss", "case_counts") if other != what]
    assert not any(secured(release={"per_site": [what]}).tells(other) for other in others)


def test_the_plan_page_tells_how_exact_a_secure_sum_is(project: Path) -> None:
    page = (project / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (32|64) \| (\d+) \| (\d+) \| (\d+) \| ([\d.e-]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for bits, sites, bound, cap, told in rows:
        ring = Ring(32 if bits == "32" else 64, int(sites), float(bound))
        assert mean_error(ring, float(cap), 500 * ring.sites) == pytest.approx(float(told), rel=0.05)


def test_what_a_plan_does_not_release_is_not_told_by_naming_it_per_site() -> None:
    assert not secured(release={"metrics": [], "per_site": ["metrics"]}).tells("metrics")
