from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from locum.common.errors import RunError
from locum.common.identity import (
    IdentityError,
    Subject,
    check_issued,
    check_valid,
    load_certificate,
    new_key,
    renewal_due,
    subject_of,
    utc_now,
)
from locum.server.authority import (
    Authority,
    initialise,
    load_authority,
    load_log_certificate,
    load_log_key,
    refresh_server_certificate,
)
from locum.server.home import Home, ServerConfig, read_config

CONFIG = ServerConfig(name="Test federation", host="127.0.0.1", superlink_port=9091, hints_port=9092)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "coordinator")


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_a_new_home_has_an_authority_and_what_it_issued(home: Home) -> None:
    authority = initialise(home, CONFIG)
    assert read_config(home) == CONFIG
    for name, role in (("server", "server"), ("log", "log")):
        certificate = load_certificate(home.authority / f"{name}.pem")
        check_issued(certificate, authority.certificate)
        check_valid(certificate, utc_now())
        assert subject_of(certificate).role == role
    assert load_authority(home, CONFIG).certificate == authority.certificate
    assert isinstance(load_log_key(home), ed25519.Ed25519PrivateKey)
    assert load_log_certificate(home).public_key() == load_log_key(home).public_key()


def test_every_secret_of_a_home_is_its_owners_alone(home: Home) -> None:
    initialise(home, CONFIG)
    secrets = [path for path in home.path.rglob("*") if path.suffix in {".key", ".secret", ".sqlite"}]
    assert len(secrets) == 3 + 1 + 3 + 1
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert home.path.stat().st_mode & 0o777 == 0o700
    assert len({path.read_bytes() for path in home.superlink.glob("*.secret")}) == 3


def test_the_superlinks_certificate_is_for_loopback_and_of_an_authority_nobody_has(home: Home) -> None:
    initialise(home, CONFIG)
    certificate, root = (load_certificate(home.superlink / name) for name in ("tls.pem", "tls-ca.pem"))
    check_issued(certificate, root)
    assert [str(name.value) for name in _names(certificate)] == ["127.0.0.1", "localhost"]
    assert len(list(home.superlink.glob("*.key"))) == 1
    with pytest.raises(IdentityError):
        check_issued(certificate, load_certificate(home.authority / "ca.pem"))


def test_a_coordinator_is_never_initialised_over_another(home: Home) -> None:
    initialise(home, CONFIG)
    key = (home.authority / "ca.key").read_bytes()
    with pytest.raises(RunError, match="holds a coordinator already"):
        initialise(home, CONFIG)
    home.configuration.unlink()
    with pytest.raises(RunError, match=r"no server.yaml") as refused:
        initialise(home, CONFIG)
    assert "restore server.yaml" in refused.value.remedy
    assert (home.authority / "ca.key").read_bytes() == key


@pytest.mark.parametrize(
    ("host", "kind"), [("10.1.2.3", x509.IPAddress), ("fd00::1", x509.IPAddress), ("fl.example.org", x509.DNSName)]
)
def test_the_gateways_certificate_is_for_its_host(home: Home, host: str, kind: type) -> None:
    authority = initialise(home, CONFIG)
    certificate = authority.issue_server(host, new_key().public_key())
    assert [str(name.value) for name in _names(certificate)] == [host]
    assert isinstance(next(iter(_names(certificate))), kind)


def test_what_is_issued_begins_in_the_past_and_never_outlives_the_root(home: Home) -> None:
    now = utc_now().replace(microsecond=0)
    authority = initialise(home, CONFIG, now=now - timedelta(days=25 * 365 - 10))
    certificate = authority.issue_site("berlin", new_key().public_key(), now=now)
    assert subject_of(certificate) == Subject("Test federation", "site", "berlin")
    assert certificate.not_valid_before_utc == now - timedelta(hours=1)
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_serial_numbers_do_not_repeat(home: Home) -> None:
    authority, key = initialise(home, CONFIG), new_key().public_key()
    assert len({authority.issue_site("berlin", key).serial_number for _ in range(30)}) == 30


def test_only_the_root_can_issue(home: Home) -> None:
    authority = initialise(home, CONFIG)
    key = new_key()
    site = authority.issue_site("berlin", key.public_key())
    forged = Authority(key, site, timedelta(days=1)).issue_site("paris", new_key().public_key())
    with pytest.raises(IdentityError, match="not issued by this federation"):
        check_issued(forged, authority.certificate)


def test_the_gateways_certificate_is_issued_again_when_a_month_is_left(home: Home) -> None:
    authority = initialise(home, CONFIG)
    path, now = home.authority / "server.pem", utc_now()
    before, key = path.read_bytes(), (home.authority / "server.key").read_bytes()
    assert not refresh_server_certificate(home, authority, CONFIG.host, now=now + timedelta(days=366))
    assert path.read_bytes() == before
    assert refresh_server_certificate(home, authority, CONFIG.host, now=now + timedelta(days=368))
    assert load_certificate(path).not_valid_after_utc > now + timedelta(days=700)
    assert (home.authority / "server.key").read_bytes() == key


def test_the_gateways_certificate_follows_its_host(home: Home) -> None:
    authority = initialise(home, CONFIG)
    assert refresh_server_certificate(home, authority, "fl.example.org")
    assert not refresh_server_certificate(home, authority, "fl.example.org")


def test_a_certificate_is_renewed_in_the_last_third_of_its_life(home: Home) -> None:
    authority, now = initialise(home, CONFIG), utc_now()
    certificate = authority.issue_site("berlin", new_key().public_key(), now=now)
    assert not renewal_due(certificate, now)
    assert not renewal_due(certificate, now + timedelta(days=59))
    assert renewal_due(certificate, now + timedelta(days=61))
