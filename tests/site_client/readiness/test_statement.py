"""What a site signs of its data: measured anew, made by the gate, and with nothing of anybody in it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from locum.common.envelope import EnvelopeError, Readiness, open_readiness, seal_readiness
from locum.common.errors import DataError
from locum.common.identity import new_key
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.readiness.clauses import measure
from tests.readiness import ready
from tests.site_client.asking import describe, plan

_NAME = "MUSTERMANN^ERIKA"


def changed(store: Path, target: Path, change: str, *values: Any) -> Path:
    """A copy of a store whose catalog says something else."""
    shutil.copytree(store, target)
    with closing(sqlite3.connect(target / "catalog.sqlite")) as connection, connection:
        connection.execute(change, values)
    return target


# --- the envelope


def test_a_statement_is_read_as_it_was_signed_and_by_no_other_key() -> None:
    key = new_key()
    made = ready(plan(), "north", key, "run-1", ("spacing",))
    assert made.envelope is not None
    assert open_readiness(made.envelope.encode(), key.public_key()) == made.said
    assert made.said.failing == ("spacing",)
    with pytest.raises(EnvelopeError, match="not signed by the key"):
        open_readiness(made.envelope.encode(), new_key().public_key())
    forged = made.envelope.replace('"spacing":false', '"spacing":true').replace('"ready":false', '"ready":true')
    with pytest.raises(EnvelopeError, match="not signed by the key"):
        open_readiness(forged.encode(), key.public_key())


@pytest.mark.parametrize(
    "lie",
    [
        {"ready": False}, {"clauses": {"modality": True}}, {"patients": 41}, {"withdrawn": 5},
        {"strata": {"sex": {"F": 7}}}, {"strata": {"sex": {"F": 0}}}, {"strata": {"diagnosis": {"x": 10}}},
        {"strata": {"manufacturer": {"/home/erika": 10}}}, {"profile": "a\nb"}, {"step": 0},
    ],
)  # fmt: skip
def test_a_statement_that_says_two_things_or_a_small_number_is_none(lie: dict[str, Any]) -> None:
    key = new_key()
    fields = ready(plan(), "north", key, None).said.model_dump() | lie
    with pytest.raises(EnvelopeError, match="other fields"):
        open_readiness(seal_readiness(Readiness.model_construct(**fields), key), key.public_key())


# --- the site


def test_a_site_that_is_ready_says_so_for_this_run_and_this_plan(agent: Agent) -> None:
    of = plan()
    found = describe(agent, of)
    assert found.able
    assert found.readiness is not None
    said = Readiness.model_validate(json.loads(found.readiness)["body"])
    assert (said.site, said.run, said.plan, said.ready) == ("north", "local", of.digest, True)


def test_a_site_that_is_not_names_the_clauses_and_no_number(
    hospitals: dict[str, Prepared], employ: Callable[..., Agent]
) -> None:
    of = plan(contract__body_parts=["FOOT"], contract__consent="required", protection__secure_aggregation="required",
              participation__quorum=3)  # fmt: skip
    found = describe(employ(least_cell=2), of)
    assert not found.able
    assert found.reason == "the contract is not met: body_parts, least_patients, consent"
    assert not any(character.isdigit() for character in found.reason)
    assert found.readiness is not None
    said = Readiness.model_validate(json.loads(found.readiness)["body"])
    assert (said.ready, said.patients, said.failing) == (False, None, ("body_parts", "least_patients", "consent"))
    # By the usual least cell of ten, a site of nine training patients has few of everything that is asked.
    few = describe(employ(), of).reason
    assert few == "the contract is not met: modality, dimensions, body_parts, least_patients, consent"


def test_it_is_measured_anew_for_each_run(
    hospitals: dict[str, Prepared], employ: Callable[..., Agent], tmp_path: Path
) -> None:
    store = shutil.copytree(hospitals["north"].store, tmp_path / "store")
    agent, of = employ(store=store), plan(contract__body_parts=["FOOT"])
    assert not describe(agent, of).able
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection, connection:
        connection.execute("UPDATE cases SET body_part = 'FOOT'")
    found = describe(agent, of)
    assert found.readiness is not None
    assert json.loads(found.readiness)["body"]["ready"]


def test_a_statement_holds_no_name_no_path_and_no_words_of_a_header(
    hospitals: dict[str, Prepared], tmp_path: Path
) -> None:
    store = tmp_path / _NAME / "store"
    changed(hospitals["north"].store, store, "UPDATE cases SET manufacturer = ?, model = ?, body_part = ?",
            _NAME, _NAME, _NAME)  # fmt: skip
    agent_policy, of = Policy(least_cell=2), plan()
    found = measure((store,), of, least_cell=2)
    from locum.site_client import gate

    said = gate.readiness(agent_policy, of, found, site="north", run=None, at=0.0)
    text = said.model_dump_json()
    assert said.ready
    assert said.strata["manufacturer"] == {"other": said.patients}
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        (patient, case) = connection.execute("SELECT patient, id FROM cases").fetchone()
    assert [word for word in (_NAME, "MUSTERMANN", patient, case, str(tmp_path), "volumes") if word in text] == []


def test_withdrawn_consent_is_in_the_next_statement_and_a_few_are_not_told(
    hospitals: dict[str, Prepared], tmp_path: Path
) -> None:
    store = shutil.copytree(hospitals["north"].store, tmp_path / "store")
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection, connection:
        patients = [row[0] for row in connection.execute("SELECT DISTINCT patient FROM cases LIMIT 3")]
        marks = ", ".join("?" * len(patients))
        connection.execute(f"DELETE FROM cases WHERE patient IN ({marks})", patients)  # noqa: S608
        connection.execute(
            f"UPDATE units SET reason = 'consent_withdrawn' WHERE json_extract(known, '$.patient') IN ({marks})",  # noqa: S608
            patients,
        )
    of = plan()
    before, after = measure((hospitals["north"].store,), of, least_cell=2), measure((store,), of, least_cell=2)
    assert (before.declared.withdrawn, after.declared.withdrawn) == (0, 3)
    assert len(after.seen) < len(before.seen)
    from locum.site_client import gate

    told = [
        gate.readiness(Policy(least_cell=least), of, after, site="north", run=None, at=0.0).withdrawn
        for least in (2, 10)
    ]
    assert told == [2, None]


def test_a_catalog_that_cannot_be_read_is_no_answer(hospitals: dict[str, Prepared], tmp_path: Path) -> None:
    store = changed(hospitals["north"].store, tmp_path / "store", "UPDATE meta SET value = 'false' WHERE name = ?",
                    "complete")  # fmt: skip
    with pytest.raises(DataError, match="did not finish"):
        measure((store,), plan(), least_cell=10)
