"""The ledger of a real agent's folder: it begins with the agent, and is the one that the site's log knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from locum.common.log.entries import LedgerEntry
from locum.site_client.configuration import read_configuration
from locum.site_client.privacy.ledger import Ledger, Use
from locum.site_client.service import Service
from locum.site_client.start import open_service
from tests.site_client.enrolled import Hospital

_AT = "2026-11-26T20:00:00Z"


@contextmanager
def _opened(home: Path) -> Iterator[Service]:
    (home / "store").mkdir(exist_ok=True)
    (home / "site.yaml").write_text("stores: [store]\n")
    service = open_service(home, read_configuration(home / "site.yaml"), logging.getLogger("locum.test.ledger"))
    yield service
    service.agent.worker.stop()


def test_the_ledger_begins_with_the_agent_and_the_log_says_so(
    hospital: Hospital, caplog: pytest.LogCaptureFixture
) -> None:
    with _opened(hospital.home) as service:
        assert service.agent.budget is not None
        assert [row.kind for row in service.agent.budget.ledger.rows()] == ["opened"]
        assert service.agent.budget.signer().site == "north"
    assert "a new ledger begins" in caplog.text
    caplog.clear()
    with _opened(hospital.home):
        assert "ledger" not in caplog.text


def test_a_ledger_that_lost_its_last_rows_or_is_a_new_one_is_told_by_the_sites_log(
    hospital: Hospital, caplog: pytest.LogCaptureFixture
) -> None:
    path = hospital.home / "ledger.sqlite"
    with _opened(hospital.home) as service:
        Ledger(path).note_unprotected(Use("patients", "run-1", "a" * 64, 1, "train"))
        rows, head = Ledger(path).state()
        service.releases.log.append(LedgerEntry(at=_AT, rows=rows, head=head))
    caplog.clear()
    with _opened(hospital.home):
        assert "not the one" not in caplog.text
    for beside in hospital.home.glob("ledger.sqlite*"):
        beside.unlink()
    with _opened(hospital.home):
        assert "the ledger is not the one that this site's log knows of: row 2 of the ledger" in caplog.text


def test_an_agent_with_a_damaged_ledger_starts_and_says_what_it_refuses(
    hospital: Hospital, caplog: pytest.LogCaptureFixture
) -> None:
    (hospital.home / "ledger.sqlite").write_bytes(b"no ledger at all" * 400)
    with _opened(hospital.home):
        assert "plans with differential privacy are refused: the ledger" in caplog.text
