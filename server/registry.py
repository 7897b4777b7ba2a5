"""The registry: who was invited, who is in the federation, what was proposed and asked, and what sites said to it.

One SQLite file, shared by the gateway, the commands and the runs. Rules:
  * Every change is one short transaction, flushed to the disk before it counts (WAL, synchronous=FULL).
  * Fail closed: a file that is missing, damaged or busy for long raises RegistryError, and nobody is let in.
    A file that was replaced is opened again, so that no answer comes from a registry that is no longer there.
  * Of a token only the SHA-256 is kept. No private key ever comes here.
  * What a site approved stands only while its newest word is `approve`, its enrolment is not revoked, and the word was
    signed with the key of that enrolment: a site that enrols again approves again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from locum.common.durable import transaction
from locum.common.errors import LocumError, RunError
from locum.common.identity import (
    PublicKey,
    certificate_pem,
    certified_key,
    fingerprint_of,
    parse_certificate,
    public_key_sha256,
    serial_of,
    utc_now,
)

_BUSY_SECONDS = 10.0
_LEAST_PREFIX = 6

_SCHEMA = """
CREATE TABLE invitations (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, token_sha256 BLOB NOT NULL, expires REAL NOT NULL,
    used_at REAL, used_key TEXT, serial TEXT, revoked_at REAL
) STRICT;
CREATE TABLE sites (
    name TEXT PRIMARY KEY, key TEXT NOT NULL, enrolled_at REAL NOT NULL, node_id TEXT UNIQUE, revoked_at REAL
) STRICT;
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, not_after REAL NOT NULL,
    pem BLOB NOT NULL, revoked_at REAL
) STRICT;
CREATE INDEX certificates_of ON certificates (name, not_after);
CREATE TABLE proposals (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, envelope BLOB NOT NULL) STRICT;
CREATE TABLE approvals (
    site TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL, approved INTEGER NOT NULL,
    envelope BLOB NOT NULL, PRIMARY KEY (site, key, digest)
) STRICT;
"""
_QUESTIONS = """
CREATE TABLE questions (
    number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, until REAL NOT NULL, envelope BLOB NOT NULL
) STRICT;
CREATE TABLE answers (
    site TEXT NOT NULL, key TEXT NOT NULL, question TEXT NOT NULL, envelope BLOB NOT NULL,
    PRIMARY KEY (site, key, question)
) STRICT;
CREATE TABLE readiness (
    site TEXT NOT NULL, key TEXT NOT NULL, plan TEXT NOT NULL, at REAL NOT NULL, envelope BLOB NOT NULL,
    PRIMARY KEY (site, key, plan)
) STRICT;
"""
_VERSION = 2
#: Tables whose rows have a name and can be revoked.
_REVOCABLE = ("sites", "certificates", "invitations")
_STANDING = """
    FROM approvals JOIN sites ON sites.name = approvals.site AND sites.key = approvals.key
    WHERE sites.revoked_at IS NULL AND approvals.approved = 1 AND approvals.digest = ?
"""

_ANSWERED = "SELECT 1 FROM answers WHERE site = ? AND key = ? AND question = ? AND envelope = ?"
_SAID = "SELECT 1 FROM approvals WHERE site = ? AND key = ? AND digest = ? AND envelope = ?"


def _unnoted(*_: object) -> None:
    """Nobody else is told of a change."""


class RegistryError(LocumError):
    """The registry cannot be read or written: whoever asked must be refused."""


class RefusedError(LocumError):
    """What was asked of the registry is not allowed; the message may be told to the caller."""


@dataclass(frozen=True)
class InvitationRow:
    """An invitation: for whom, until when, and whether it was used or revoked. Times in UTC."""

    name: str
    fingerprint: str
    token_sha256: bytes
    expires: datetime
    used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True)
class SiteRow:
    """An enrolled site; `expires` and `certificate` are those of its newest certificate. Times in UTC."""

    name: str
    enrolled_at: datetime
    node_id: int | None
    revoked_at: datetime | None
    expires: datetime
    certificate: x509.Certificate


@dataclass(frozen=True)
class ApprovalRow:
    """A standing approval: when the site dated it (seconds since 1970), and its signed envelope."""

    at: float
    envelope: bytes


class Registry:
    """The registry's file. One object may be shared by threads; each process opens its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, ...] = ()

    @classmethod
    def create(cls, path: Path) -> Registry:
        """Makes an empty registry, mode 0600; raises RegistryError if there is one."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            reason = f"the registry {path} cannot be made: {error.strerror}"
            raise RegistryError(reason, "use another folder") from error
        registry = cls(path)
        with registry._use(new=True) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA + _QUESTIONS)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        return registry

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # --- invitations and enrolment ---

    def invite(self, name: str, *, token_sha256: bytes, fingerprint: str, expires: datetime) -> None:
        """Notes an invitation; earlier open ones for the name end.

        Raises RefusedError if the site is enrolled, unless its certificate expired and nothing else would let it in.
        """
        with self._change() as connection:
            site = _one(connection, "SELECT * FROM sites WHERE name = ? AND revoked_at IS NULL", name)
            if site is not None and _newest(connection, name, site["key"]).not_valid_after_utc > utc_now():
                raise RefusedError(
                    f"{name} is enrolled already", f"to give it a new key: locum server revoke {name}, then invite"
                )
            _end(connection, "invitations", name, utc_now().timestamp())
            connection.execute(
                "INSERT INTO invitations (fingerprint, name, token_sha256, expires) VALUES (?, ?, ?, ?)",
                (fingerprint, name, token_sha256, expires.timestamp()),
            )

    def invitation(self, fingerprint: str) -> InvitationRow | None:
        """The invitation whose certificate has this fingerprint."""
        with self._use() as connection:
            row = _one(connection, "SELECT * FROM invitations WHERE fingerprint = ?", fingerprint)
        return None if row is None else _invitation(row)

    def open_invitations(self, *, now: datetime | None = None) -> tuple[InvitationRow, ...]:
        """Invitations that can still be used, by name."""
        query = "SELECT * FROM invitations WHERE used_at IS NULL AND revoked_at IS NULL AND expires > ? ORDER BY name"
        with self._use() as connection:
            return tuple(_invitation(row) for row in connection.execute(query, ((now or utc_now()).timestamp(),)))

    def redeem(
        self, fingerprint: str, *, key: PublicKey, issue: Callable[[], x509.Certificate], now: datetime | None = None
    ) -> x509.Certificate:
        """Enrols a site: uses its invitation, once, and notes the certificate that `issue` makes.

        The same key again, within the invitation's time, gets the same certificate again: the reply may have been lost.

        Args:
            fingerprint: of the invitation's certificate.
            key: the site's public key.
            issue: makes its certificate; called within the transaction, and only if all else is right.
            now: the time.

        Raises:
            RefusedError: unknown, revoked, expired or used invitation, or a key that had a certificate before.
        """
        moment, digest = (now or utc_now()).timestamp(), public_key_sha256(key)
        with self._change() as connection:
            row = _one(connection, "SELECT * FROM invitations WHERE fingerprint = ?", fingerprint)
            _check_open(row, digest, moment)
            if row["used_at"] is not None:
                return _certificate(connection, row["serial"])
            if _one(connection, "SELECT 1 FROM certificates WHERE key = ?", digest) is not None:
                raise RefusedError("this key had a certificate before", "enrol with a new key")
            certificate = issue()
            _note_certificate(connection, row["name"], certificate)
            connection.execute(
                "UPDATE invitations SET used_at = ?, used_key = ?, serial = ? WHERE fingerprint = ?",
                (moment, digest, serial_of(certificate), fingerprint),
            )
            connection.execute(
                "INSERT INTO sites (name, key, enrolled_at) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "key = excluded.key, enrolled_at = excluded.enrolled_at, node_id = NULL, revoked_at = NULL",
                (row["name"], digest, moment),
            )
        return certificate

    def renew(
        self, name: str, *, key: PublicKey, issue: Callable[[x509.Certificate], x509.Certificate | None]
    ) -> x509.Certificate:
        """The site's newest certificate, or the one that `issue` makes of it. Raises RefusedError for another key."""
        digest = public_key_sha256(key)
        with self._change() as connection:
            site = _one(connection, "SELECT * FROM sites WHERE name = ?", name)
            if site is None or site["revoked_at"] is not None or site["key"] != digest:
                raise RefusedError("a certificate is renewed under the site's own key", "enrol again")
            newest = _newest(connection, name, digest)
            issued = issue(newest)
            if issued is not None:
                _note_certificate(connection, name, issued)
        return issued or newest

    # --- sites ---

    def sites(self) -> tuple[SiteRow, ...]:
        """Every site that ever enrolled, by name."""
        with self._use() as connection:
            rows = connection.execute("SELECT * FROM sites ORDER BY name").fetchall()
            return tuple(_site(connection, row) for row in rows)

    def site(self, name: str) -> SiteRow | None:
        """One site, revoked or not."""
        with self._use() as connection:
            row = _one(connection, "SELECT * FROM sites WHERE name = ?", name)
            return None if row is None else _site(connection, row)

    def set_node(self, name: str, node_id: int) -> None:
        """Notes the site's node at the SuperLink; raises RefusedError if the node is another site's."""
        with self._change() as connection:
            try:
                connection.execute("UPDATE sites SET node_id = ? WHERE name = ?", (str(node_id), name))
            except sqlite3.IntegrityError as error:
                reason = f"node {node_id} is another site's than {name}"
                raise RefusedError(reason, "register the site again") from error

    def nodes(self) -> dict[int, str]:
        """Unrevoked sites by their nodes at the SuperLink."""
        query = "SELECT node_id, name FROM sites WHERE node_id IS NOT NULL AND revoked_at IS NULL ORDER BY name"
        with self._use() as connection:
            return {int(row["node_id"]): row["name"] for row in connection.execute(query)}

    def certificate_state(self, serial: str) -> Literal["active", "revoked", "unknown"]:
        """Whether a certificate of this serial number was issued to a site, and not revoked since."""
        with self._use() as connection:
            row = _one(connection, "SELECT revoked_at FROM certificates WHERE serial = ?", serial)
        if row is None:
            return "unknown"
        return "active" if row["revoked_at"] is None else "revoked"

    def certificates(self) -> tuple[tuple[str, x509.Certificate], ...]:
        """Every certificate that was issued to a site, with its name, in the order of their issue."""
        with self._use() as connection:
            rows = connection.execute("SELECT name, pem FROM certificates ORDER BY rowid")
            return tuple((row["name"], parse_certificate(bytes(row["pem"]))) for row in rows)

    def revoke(self, name: str, *, now: datetime | None = None, noted: Callable[[SiteRow], object] = _unnoted) -> bool:
        """Ends a site, its certificates and its open invitations; returns whether there was anything to end.

        `noted` is called with a site that is ended, within the transaction: what it raises undoes everything.
        """
        moment = (now or utc_now()).timestamp()
        with self._change() as connection:
            row = _one(connection, "SELECT * FROM sites WHERE name = ? AND revoked_at IS NULL", name)
            ended = sum([_end(connection, table, name, moment) for table in _REVOCABLE]) > 0
            if row is not None:
                noted(_site(connection, row))
            return ended

    # --- proposals and approvals ---

    def propose(self, digest: str, envelope: bytes, *, noted: Callable[[], object] = _unnoted) -> bool:
        """Puts a plan before the sites; returns whether it is new. The first proposal of a plan stays.

        `noted` is called within the transaction if it is new: what it raises undoes everything.
        """
        with self._change() as connection:
            query = "INSERT INTO proposals (digest, envelope) VALUES (?, ?) ON CONFLICT (digest) DO NOTHING"
            new = connection.execute(query, (digest, envelope)).rowcount > 0
            if new:
                noted()
            return new

    def proposals(self) -> tuple[bytes, ...]:
        """The envelopes of all proposals, newest first."""
        with self._use() as connection:
            rows = connection.execute("SELECT envelope FROM proposals ORDER BY number DESC")
            return tuple(bytes(row["envelope"]) for row in rows)

    def proposal(self, digest: str) -> tuple[str, bytes]:
        """A proposal's whole digest and envelope, found by the digest or its first six digits or more.

        Raises:
            RunError: there is none, or more than one.
        """
        text = digest.lower()
        if len(text) < _LEAST_PREFIX or not set(text) <= set("0123456789abcdef"):
            raise RunError(f"'{digest}' is no digest", f"give at least {_LEAST_PREFIX} hexadecimal digits of it")
        with self._use() as connection:
            query = "SELECT digest, envelope FROM proposals WHERE substr(digest, 1, ?) = ? ORDER BY digest"
            found = connection.execute(query, (len(text), text)).fetchall()
        if not found:
            raise RunError(f"no plan {digest} was proposed", "propose it: locum propose PLAN")
        if len(found) > 1:
            names = ", ".join(row["digest"][:16] for row in found)
            raise RunError(f"{digest} names {len(found)} plans: {names}", "give more digits")
        return found[0]["digest"], bytes(found[0]["envelope"])

    def record_approval(
        self,
        site: str,
        digest: str,
        *,
        approved: bool,
        at: float,
        envelope: bytes,
        noted: Callable[[], object] = _unnoted,
    ) -> bool:
        """Notes a site's word on a plan, signed with its present key; returns whether it is the newest.

        An older word than the one known is ignored, so a replay changes nothing; of two at the same time the revocation
        stands. `noted` is called within the transaction unless the word is older: what it raises undoes everything.
        Raises RefusedError for a site that is not enrolled.
        """
        with self._change() as connection:
            row = _one(connection, "SELECT key FROM sites WHERE name = ? AND revoked_at IS NULL", site)
            if row is None:
                raise RefusedError(f"{site} is not enrolled", "enrol it first")
            done = connection.execute(
                "INSERT INTO approvals (site, key, digest, at, approved, envelope) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (site, key, digest) DO UPDATE SET at = excluded.at, approved = excluded.approved, "
                "envelope = excluded.envelope "
                "WHERE excluded.at > at OR (excluded.at = at AND excluded.approved < approved)",
                (site, row["key"], digest, at, int(approved), envelope),
            )
            newest = done.rowcount > 0
            if newest or _one(connection, _SAID, site, row["key"], digest, envelope) is not None:
                noted()
            return newest

    def approvals(self, digest: str) -> dict[str, ApprovalRow]:
        """Standing approvals of a plan, by site, of sites that are not revoked."""
        with self._use() as connection:
            rows = connection.execute(f"SELECT site, at, envelope {_STANDING} ORDER BY site", (digest,))
            return {row["site"]: ApprovalRow(row["at"], bytes(row["envelope"])) for row in rows}

    def approved(self, site: str, digest: str) -> bool:
        """Whether a site that is not revoked approves a plan."""
        with self._use() as connection:
            return _one(connection, f"SELECT 1 {_STANDING} AND site = ?", digest, site) is not None

    def state(self) -> int:
        """A number that grows with every proposal and every question."""
        newest = "SELECT COALESCE(MAX(number), 0) FROM"
        with self._use() as connection:
            row = _one(connection, f"SELECT ({newest} proposals) + ({newest} questions) AS state")
            return int(row["state"])

    # --- cohort questions and answers

    def ask(self, digest: str, until: float, envelope: bytes, *, noted: Callable[[], object] = _unnoted) -> bool:
        """Puts a question before the sites; returns whether it is new. One that was asked before stays as it was.

        `noted` is called within the transaction if it is new: what it raises undoes everything.
        """
        with self._change() as connection:
            query = "INSERT INTO questions (digest, until, envelope) VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING"
            new = connection.execute(query, (digest, until, envelope)).rowcount > 0
            if new:
                noted()
            return new

    def questions(self, *, open_at: float = 0.0) -> tuple[bytes, ...]:
        """The envelopes of the questions that are open at a time, the newest first."""
        with self._use() as connection:
            query = "SELECT envelope FROM questions WHERE until > ? ORDER BY number DESC"
            return tuple(bytes(row["envelope"]) for row in connection.execute(query, (open_at,)))

    def question(self, digest: str) -> bytes | None:
        """The envelope of a question."""
        with self._use() as connection:
            row = _one(connection, "SELECT envelope FROM questions WHERE digest = ?", digest)
        return None if row is None else bytes(row["envelope"])

    def record_answer(self, site: str, question: str, envelope: bytes, *, noted: Callable[[], object]) -> bool:
        """Notes a site's answer, signed with its present key; returns whether it is new. The first one stays.

        `noted` is called within the transaction unless there is another answer: what it raises undoes everything.
        Raises RefusedError for a site that is not enrolled, and for another answer than the one that is there.
        """
        with self._change() as connection:
            row = _one(connection, "SELECT key FROM sites WHERE name = ? AND revoked_at IS NULL", site)
            if row is None:
                raise RefusedError(f"{site} is not enrolled", "enrol it first")
            query = "INSERT INTO answers (site, key, question, envelope) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
            new = connection.execute(query, (site, row["key"], question, envelope)).rowcount > 0
            if not new and _one(connection, _ANSWERED, site, row["key"], question, envelope) is None:
                raise RefusedError("this question has another answer of this site already", "ask it anew: edition")
            noted()
            return new

    def answers(self, question: str) -> dict[str, bytes]:
        """The answers to a question, by site, of sites that are not revoked, under their present keys."""
        with self._use() as connection:
            rows = connection.execute(
                "SELECT site, envelope FROM answers JOIN sites ON sites.name = answers.site AND sites.key = answers.key"
                " WHERE sites.revoked_at IS NULL AND question = ? ORDER BY site",
                (question,),
            )
            return {row["site"]: bytes(row["envelope"]) for row in rows}

    # --- readiness ---

    def record_readiness(self, site: str, plan: str, *, at: float, envelope: bytes) -> bool:
        """Notes what a site says of its data for a plan, signed with its present key; returns whether it is newer.

        Raises RefusedError for a site that is not enrolled.
        """
        with self._change() as connection:
            row = _one(connection, "SELECT key FROM sites WHERE name = ? AND revoked_at IS NULL", site)
            if row is None:
                raise RefusedError(f"{site} is not enrolled", "enrol it first")
            query = (
                "INSERT INTO readiness (site, key, plan, at, envelope) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " at = excluded.at, envelope = excluded.envelope WHERE excluded.at > readiness.at"
            )
            return connection.execute(query, (site, row["key"], plan, at, envelope)).rowcount > 0

    def readiness(self, plan: str) -> dict[str, bytes]:
        """What sites said of their data for a plan before any run, of those that are not revoked, by site."""
        with self._use() as connection:
            rows = connection.execute(
                "SELECT site, envelope FROM readiness JOIN sites"
                " ON sites.name = readiness.site AND sites.key = readiness.key"
                " WHERE sites.revoked_at IS NULL AND plan = ? ORDER BY site",
                (plan,),
            )
            return {row["site"]: bytes(row["envelope"]) for row in rows}

    # --- the file ---

    @contextmanager
    def _use(self, *, new: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._open(new=new)
            except (sqlite3.Error, OSError) as error:
                self.close()
                reason = f"the registry {self.path} cannot be used: {error}"
                raise RegistryError(reason, "restore it from a backup, or free what holds it") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._use() as connection, transaction(connection):
            yield connection

    def _open(self, *, new: bool) -> sqlite3.Connection:
        status = self.path.stat()
        here = (os.getpid(), status.st_dev, status.st_ino)
        if self._connection is None or self._opened != here:
            self.close()
            self._connection, self._opened = _connect(self.path), here
            if not new:
                _upgrade(self._connection)
                _check_version(self._connection)
        return self._connection


def _connect(path: Path) -> sqlite3.Connection:
    # rw, not rwc: a registry that is missing is an error, not an empty one.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _upgrade(connection: sqlite3.Connection) -> None:
    """Version 1 knew no questions."""
    if _one(connection, "PRAGMA user_version")[0] != 1:
        return
    with transaction(connection):
        if _one(connection, "PRAGMA user_version")[0] == 1:
            for statement in _QUESTIONS.strip().split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_VERSION}")


def _check_version(connection: sqlite3.Connection) -> None:
    found = _one(connection, "PRAGMA user_version")[0]
    if found != _VERSION:
        raise sqlite3.DatabaseError(f"its form is {found}, and this version of Locum knows {_VERSION}")


def _one(connection: sqlite3.Connection, query: str, *values: object) -> Any:
    return connection.execute(query, values).fetchone()


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _invitation(row: sqlite3.Row) -> InvitationRow:
    return InvitationRow(
        name=row["name"],
        fingerprint=row["fingerprint"],
        token_sha256=bytes(row["token_sha256"]),
        expires=datetime.fromtimestamp(row["expires"], UTC),
        used_at=_time(row["used_at"]),
        revoked_at=_time(row["revoked_at"]),
    )


def _site(connection: sqlite3.Connection, row: sqlite3.Row) -> SiteRow:
    certificate = _newest(connection, row["name"], row["key"])
    return SiteRow(
        name=row["name"],
        enrolled_at=datetime.fromtimestamp(row["enrolled_at"], UTC),
        node_id=None if row["node_id"] is None else int(row["node_id"]),
        revoked_at=_time(row["revoked_at"]),
        expires=certificate.not_valid_after_utc,
        certificate=certificate,
    )


def _check_open(row: Any, key: str, moment: float) -> None:
    if row is None:
        raise RefusedError("this invitation is not known here", "ask the coordinator for another")
    if row["revoked_at"] is not None:
        raise RefusedError("this invitation was revoked", "ask the coordinator for another")
    if moment >= row["expires"]:
        raise RefusedError("this invitation expired", "ask the coordinator for another")
    if row["used_at"] is not None and row["used_key"] != key:
        raise RefusedError("this invitation was used already", "ask the coordinator for another")


def _end(connection: sqlite3.Connection, table: str, name: str, moment: float) -> int:
    query = f"UPDATE {table} SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL"  # noqa: S608 - our own names
    return connection.execute(query, (moment, name)).rowcount


def _note_certificate(connection: sqlite3.Connection, name: str, certificate: x509.Certificate) -> None:
    connection.execute(
        "INSERT INTO certificates (serial, name, key, fingerprint, not_after, pem) VALUES (?, ?, ?, ?, ?, ?)",
        (
            serial_of(certificate),
            name,
            public_key_sha256(certified_key(certificate)),
            fingerprint_of(certificate),
            certificate.not_valid_after_utc.timestamp(),
            certificate_pem(certificate),
        ),
    )


def _newest(connection: sqlite3.Connection, name: str, key: str) -> x509.Certificate:
    query = "SELECT pem FROM certificates WHERE name = ? AND key = ? ORDER BY not_after DESC LIMIT 1"
    return parse_certificate(bytes(_one(connection, query, name, key)["pem"]))


def _certificate(connection: sqlite3.Connection, serial: str) -> x509.Certificate:
    return parse_certificate(bytes(_one(connection, "SELECT pem FROM certificates WHERE serial = ?", serial)["pem"]))
