"""An agent that is put together from its folder: which identity counts, and what it says when it cannot connect."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from locum.common.errors import Code, SiteFailure
from locum.common.identity import utc_now
from locum.server.authority import load_log_key
from locum.site_client.approvals import open_approvals
from locum.site_client.configuration import read_configuration
from locum.site_client.enrolment import enrol
from locum.site_client.gate import Policy
from locum.site_client.identity import load_identity
from locum.site_client.secure import Rounding, drawn, seeded
from locum.site_client.service import Service
from locum.site_client.start import open_log, open_service
from tests.plans import plan
from tests.server.door import open_door
from tests.site_client.enrolled import Hospital


@contextmanager
def _opened(home: Path, more: str = "") -> Iterator[Service]:
    (home / "store").mkdir()
    (home / "site.yaml").write_text(f"stores: [store]\n{more}")
    configuration = read_configuration(home / "site.yaml")
    service = open_service(home, configuration, open_log(home, "north", configuration))
    try:
        yield service
    finally:
        service.agent.worker.stop()


def test_an_agent_whose_site_enrolled_anew_counts_what_is_approved_with_the_new_key(tmp_path: Path) -> None:
    of = plan()
    with open_door(tmp_path / "coordinator") as door:
        door.enrol("north")
        home = door.site_home("north")
        hospital = Hospital(home, load_log_key(door.home))
        with _opened(home) as service:
            open_approvals(home, Policy()).receive(hospital.proposal(of))
            open_approvals(home, Policy()).approve(of.digest, "Anna")
            service.agent.admit(Policy(), of)

            door.registry.revoke("north")
            enrol(door.invite("north"), home, replace=True)
            with pytest.raises(SiteFailure) as refused:
                service.agent.admit(Policy(), of)
            assert refused.value.code is Code.NOT_APPROVED

            open_approvals(home, Policy()).approve(of.digest, "Anna")
            service.agent.admit(Policy(), of)
            assert len(list(service.pulse.news.decisions())) == 1


@pytest.mark.parametrize(("more", "rounding"), [("", drawn), ("rehearsal: true\n", seeded)])
def test_an_agent_rounds_at_random_unless_it_rehearses(more: str, rounding: Rounding, hospital: Hospital) -> None:
    with _opened(hospital.home, more) as service:
        secure = service.agent.secure
        assert secure.rounding is rounding
        service.pulse.offset = 86_400.0
        assert secure.now() - utc_now() == pytest.approx(timedelta(days=1), abs=timedelta(minutes=1))
        found, identity = secure.credentials(), load_identity(hospital.home)
        assert (found.site, found.certificate) == ("north", identity.certificate)
        assert found.trust.log.public_bytes_raw() == hospital.log_key.public_key().public_bytes_raw()


def test_an_agent_whose_certificate_has_ended_says_so_and_what_to_do(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator", certificate_days=1.5 / 86_400) as door:
        door.enrol("north")
        home = door.site_home("north")
        while load_identity(home).certificate.not_valid_after_utc > utc_now():
            time.sleep(0.1)
        with _opened(home) as service:
            thread = threading.Thread(target=service.run)
            thread.start()
            try:
                said = _said(home)
            finally:
                service.end()
                thread.join(30)
    assert not said["connected"]
    assert "this site's certificate ended at" in said["problem"]
    assert "enrol with --replace" in said["problem"]
    assert "this site's certificate ended at" in (home / "site.log").read_text()


def _said(home: Path) -> dict[str, object]:
    end = time.monotonic() + 60
    while not (home / "agent.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    found: dict[str, object] = json.loads((home / "agent.json").read_bytes())
    return found
