from __future__ import annotations

import json
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main
from locum.common.identity import fingerprint_of, new_key, parse_certificate, read_invitation, utc_now
from locum.server.authority import load_authority
from locum.server.cli import _free_port
from locum.server.home import Home, read_config
from locum.server.registry import Registry

Capture = pytest.CaptureFixture[str]
INIT = ("--name", "Test federation", "--host", "127.0.0.1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCUM_SERVER_HOME", raising=False)


def server(*words: str) -> int:
    return main(["server", *words]) or 0


def told(capture: Capture, *words: str) -> dict[str, Any]:
    capture.readouterr()
    assert server(*words, "--json") == 0
    found: dict[str, Any] = json.loads(capture.readouterr().out)
    return found


def enrol(name: str) -> None:
    """What the gateway does when the hospital comes with its invitation."""
    home = Home(Path("locum-server"))
    authority, registry, key = load_authority(home, read_config(home)), Registry(home.registry), new_key().public_key()
    certificate = parse_certificate(read_invitation(Path(f"{name}.invitation.json")).certificate.encode())
    registry.redeem(fingerprint_of(certificate), key=key, issue=lambda: authority.issue_site(name, key))
    registry.close()


def test_a_federation_begins_with_one_command_and_says_what_comes_next(tmp_path: Path, capsys: Capture) -> None:
    assert server("init", *INIT, "--home", "there") == 0
    said = capsys.readouterr().out
    assert "127.0.0.1:8443" in said
    assert "next: locum server invite NAME --home there" in said
    assert "locum server start --home there" in said
    assert read_config(Home(Path("there"))).name == "Test federation"


def test_the_folder_is_the_environments_or_the_default(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert "--home" not in capsys.readouterr().out
    assert Path("locum-server/server.yaml").exists()
    monkeypatch.setenv("LOCUM_SERVER_HOME", "other")
    assert server("init", *INIT) == 0
    assert Path("other/server.yaml").exists()


def test_an_initialised_folder_is_refused(capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert server("init", *INIT) == 1
    assert "holds a coordinator already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--host", "https://example.org"),
        ("--host", "example.org:8443"),
        ("--host", ""),
        ("--host", "-x"),
        ("--name", "a/b"),
        ("--name", "ä"),
        ("--port", "0"),
        ("--port", "70000"),
        ("--certificate-days", "0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_options_name(option: str, value: str, capsys: Capture) -> None:
    assert server("init", *INIT, option, value) == 2
    assert option in capsys.readouterr().err
    assert not Path("locum-server").exists()


def test_loopback_ports_that_are_taken_are_left_alone(capsys: Capture) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = held.getsockname()[1]
        assert _free_port(taken, but=set()) != taken
    assert _free_port(9093, but={9093}) != 9093
    ports = told(capsys, "init", *INIT, "--port", "9091")
    assert len({ports["port"], ports["superlink_port"], ports["hints_port"]}) == 3


def test_from_invitation_to_revocation_the_list_says_where_each_site_stands(capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert told(capsys, "sites") == {"sites": [], "invitations": []}
    invited = told(capsys, "invite", "berlin")
    assert invited["invitation"] == "berlin.invitation.json"
    assert [row["name"] for row in told(capsys, "sites")["invitations"]] == ["berlin"]
    enrol("berlin")
    (row,) = told(capsys, "sites")["sites"]
    assert (row["name"], row["state"], row["revoked_at"]) == ("berlin", "enrolled", None)
    assert told(capsys, "revoke", "berlin") == {"site": "berlin", "revoked": True, "changed": True}
    assert told(capsys, "revoke", "berlin")["changed"] is False
    (row,) = told(capsys, "sites")["sites"]
    assert row["state"] == "revoked"
    assert server("sites") == 0
    assert "berlin" in capsys.readouterr().out


def test_an_invitation_is_a_private_file_and_its_token_is_not_printed(capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert server("invite", "berlin", "--out", "b.json") == 0
    said = capsys.readouterr()
    invitation = read_invitation(Path("b.json"))
    assert invitation.site == "berlin"
    assert timedelta(hours=23) < invitation.expires - utc_now() <= timedelta(hours=24)
    assert Path("b.json").stat().st_mode & 0o777 == 0o600
    assert invitation.token.get_secret_value() not in said.out + said.err
    assert "locum site enrol b.json" in said.out


def test_an_invitation_never_overwrites_a_file_and_then_invites_nobody(capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    Path("berlin.invitation.json").write_text("mine")
    assert server("invite", "berlin") == 2
    assert "--out" in capsys.readouterr().err
    assert Path("berlin.invitation.json").read_text() == "mine"
    assert told(capsys, "sites")["invitations"] == []


def test_an_enrolled_site_is_not_invited_and_no_file_is_left(capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert server("invite", "berlin") == 0
    enrol("berlin")
    assert server("invite", "berlin", "--out", "second.json") == 1
    assert "locum server revoke berlin" in capsys.readouterr().err
    assert not Path("second.json").exists()


@pytest.mark.parametrize("words", [("invite", "../up"), ("invite", "a b"), ("revoke", "nobody")])
def test_a_name_that_is_none_is_refused(words: tuple[str, str], capsys: Capture) -> None:
    assert server("init", *INIT) == 0
    assert server(*words) in {1, 2}
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize("words", [("invite", "berlin"), ("sites",), ("revoke", "berlin")])
def test_without_a_coordinator_every_command_says_how_to_begin(words: tuple[str, ...], capsys: Capture) -> None:
    assert server(*words) == 1
    assert "locum server init" in capsys.readouterr().err
    assert not Path("locum-server").exists()
