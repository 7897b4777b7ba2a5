"""A patient's name is everywhere at the hospitals, and whatever can go wrong goes wrong: it is nowhere else.

The name is in the tags of every DICOM file, in the names of files and folders, in the table of labels, in the texts of
exceptions, in what workers print, in the names of metrics and tensors. The hospitals are real agents, the coordinator
is a real one; everything that lies there is searched, while the run goes on and afterwards, and the reviewer's bundle.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import sqlite3
import sys
import threading
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
import pytest

from locum.common.log.entries import ReleaseEntry, read_entry
from locum.server.runs import Run
from locum.simulations.engines import rehearse
from locum.simulations.engines.rehearse import Rehearsal, run_rehearsal
from locum.simulations.federations import FederationSpec, federation
from locum.simulations.hospitals import write_hospital
from locum.site_client.imaging.catalog import FILE_NAME
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site
from locum.site_client.released import account
from tests.plans import plan
from tests.wire import scan
from tests.wire.federation import locum

FAMILY, GIVEN = "Zwölfender-Quitt", "Ådasleiv"
NAME = f"{FAMILY}^{GIVEN}"
PATTERNS = {"family": scan.text(FAMILY), "given": scan.text(GIVEN), "whole": scan.text(NAME)}
#: What each hospital does; `unreadable` has images that were damaged after they were ingested, `closed` is closed.
SITES = {"north": "talks", "riverside": "fails", "hilltop": "dies", "lakeside": "unreadable", "harbour": "closed"}
STORE = f"store of {NAME}"
OF = plan(
    rounds=3,
    contract__least_patients=1,
    contract__split={"train": 0.6, "validation": 0.2, "test": 0.2},
    participation={"quorum": 1, "deadline": "120 s"},
)


# --- hospitals


def _write(folder: Path, spec: object) -> None:
    """A hospital whose files all name the patient, ingested."""
    raw = folder / "raw"
    write_hospital(spec, raw)  # type: ignore[arg-type]
    for number, path in enumerate(sorted((raw / "dicom").rglob("*"))):
        if path.is_file():
            _name_in(path, number)
    (raw / "dicom" / f"{NAME} unreadable.dcm").write_bytes(NAME.encode() * 100)
    _name_labels(raw / "labels.csv")
    assert ingest(load_site(raw / "site.yaml"), folder / STORE, keys=Keys.of(bytes(range(32)))).cases


def _name_in(path: Path, number: int) -> None:
    try:
        image = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        return
    image.SpecificCharacterSet = "ISO_IR 192"
    image.PatientID = f"{NAME} {image.PatientID}"
    tags = ("PatientName", "StudyDescription", "SeriesDescription", "InstitutionName", "Manufacturer", "StudyID")
    for tag in (*tags, "ManufacturerModelName", "ReferringPhysicianName", "ProtocolName"):
        setattr(image, tag, NAME if tag != "StudyID" else GIVEN)
    image.save_as(path)
    path.rename(path.with_name(f"{NAME} {number}.dcm"))


def _name_labels(path: Path) -> None:
    """A column with the name, and a row of an examination that has no image."""
    text = path.read_text(encoding="utf-8-sig")
    delimiter = csv.Sniffer().sniff(text.splitlines()[0], ",;\t").delimiter
    head, *rows = list(csv.reader(text.splitlines(), delimiter=delimiter))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([*head, "Name"])
        writer.writerows([*row, NAME] for row in rows)
        writer.writerow([NAME, *rows[0][1:], NAME])


def _damage(store: Path) -> None:
    """Cuts every volume short, as a disk does that fails."""
    for path in store.rglob("*"):
        if path.is_file() and not path.name.startswith(FILE_NAME):
            path.write_bytes(path.read_bytes()[:50])


def _agent(folder: Path) -> Sequence[str]:
    """The command that runs a hospital's agent, and its configuration."""
    behaviour = SITES[folder.name]
    lines = [f"stores: ['{STORE}']", "resources: {threads: 1}"]
    if behaviour == "closed":
        lines.append(f"policy: {{hours: ['{time.strftime('%a', time.localtime(time.time() + 259_200))} 00:00-01:00']}}")
    (folder / "site.yaml").write_text("\n".join(lines) + "\n")
    if behaviour in {"unreadable", "closed"}:
        return rehearse._site_start(folder)
    return [sys.executable, "-m", "tests.wire.planted", str(folder), behaviour, NAME]


# --- the run


@dataclass
class Scene:
    """What a rehearsal left.

    Attributes:
        folder: the rehearsal's.
        during: what was found at the coordinator while the run went on.
        looks: how often it was looked through.
    """

    folder: Path
    during: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    looks: int = 0
    run: str = ""

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """Looks through the coordinator's disk again and again while a run goes on."""
        self.run, over = run.id, threading.Event()

        def look() -> None:
            while not over.wait(0.5):
                self.look()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def look(self) -> None:
        try:
            found = scan.found(self.coordinator, PATTERNS)
        except sqlite3.Error:  # a database was busy, or gone, while it was read
            return
        self.looks += 1
        for name, files in found.items():
            self.during[name] |= files


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    made = Scene(tmp_path_factory.mktemp("leaks"))
    spec = FederationSpec(sites=len(SITES), seed=3, patients=12, shape=(8, 16, 16), spacing=(10.0, 8.0, 8.0))
    for name, hospital in zip(SITES, federation(spec), strict=True):
        _write(made.site(name), hospital)
    _damage(made.site("lakeside") / STORE)
    (made.folder / "plan.yaml").write_text(OF.to_yaml())
    run_rehearsal(Rehearsal(made.folder, OF, list(SITES), _agent), made.watch)
    return made


def _events(scene: Scene) -> list[dict[str, object]]:
    lines = (scene.coordinator / "runs" / scene.run / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_everything_that_should_go_wrong_went_wrong(scene: Scene) -> None:
    told = json.dumps(_events(scene))
    codes = {code for name in SITES for code in _codes(scene, name)}
    wanted = {"INTERNAL", "DISK_FULL", "UPDATE_REFUSED", "WORKER_DIED", "DATA_UNREADABLE", "POLICY_REFUSED"}
    assert wanted <= codes, codes
    assert all(name in told for name in ("riverside", "hilltop", "lakeside"))


def _codes(scene: Scene, name: str) -> set[str]:
    found = (one.entry.code for one in account(scene.site(name)).releases())
    return {code for code in found if code is not None}


@pytest.mark.parametrize("name", SITES)
def test_the_name_is_all_over_a_hospital(name: str, scene: Scene) -> None:
    found = scan.found(scene.site(name), PATTERNS)
    assert set(found) == set(PATTERNS)


@pytest.mark.parametrize(
    ("name", "file"), [("north", "worker.log"), ("riverside", "site.log"), ("hilltop", "worker.log")]
)
def test_what_went_wrong_told_the_name_to_the_hospitals_own_files(name: str, file: str, scene: Scene) -> None:
    (path,) = scene.site(name).rglob(file)
    assert NAME in path.read_text()


def test_it_was_never_at_the_coordinator_while_the_run_went_on(scene: Scene) -> None:
    assert scene.looks > 3
    assert scene.during == {}


def test_it_is_nowhere_at_the_coordinator_afterwards(scene: Scene) -> None:
    """Registry, SuperLink, spool, runs with events, model, report and card, the log, and the logs of processes."""
    there = {path.relative_to(scene.coordinator).parts[0] for path in scene.coordinator.rglob("*") if path.is_file()}
    assert {"log", "logs", "runs", "registry.sqlite"} <= there, there
    assert scan.found(scene.coordinator, PATTERNS) == {}


def test_it_is_in_nothing_that_the_rehearsal_gives(scene: Scene) -> None:
    own = [path for path in scene.folder.iterdir() if path.is_file()]
    assert len(own) > 2
    for path in own:
        assert scan.found_in(path, PATTERNS) == set(), path


def test_it_is_in_no_bundle_and_the_logs_of_both_ends_agree(scene: Scene, tmp_path: Path) -> None:
    bundle, unpacked = tmp_path / "bundle.zip", tmp_path / "unpacked"
    locum("audit", "bundle", scene.run, "--home", scene.coordinator, "--out", bundle)
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(unpacked)
    assert len(list(unpacked.rglob("*"))) > 5
    assert scan.found(tmp_path, PATTERNS) == {}
    for name in SITES:
        locum("audit", "diff", bundle, scene.site(name) / "log")


@pytest.mark.parametrize("name", SITES)
def test_it_is_not_in_a_sites_own_log_of_what_left(name: str, scene: Scene) -> None:
    log = scene.site(name) / "log"
    assert [entry for leaf in (log / "entries.jsonl").read_bytes().splitlines() if _is_release(entry := leaf)]
    assert scan.found(log, PATTERNS) == {}


def _is_release(leaf: bytes) -> bool:
    return isinstance(read_entry(leaf.rstrip()), ReleaseEntry)


# --- the scanner finds it


_FORMS: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "latin-1": lambda text: text.encode("latin-1"),
    "json": lambda text: json.dumps({"reason": text}).encode(),
    "repr": lambda text: ascii(text).encode(),
    "hex": lambda text: text.encode().hex().encode(),
    "HEX": lambda text: text.encode().hex().upper().encode(),
    "base64": lambda text: base64.b64encode(b"some words before " + text.encode()),
    "base64url": lambda text: base64.urlsafe_b64encode(b"three more " + text.encode()),
    "zlib": lambda text: b"head" + zlib.compress(text.encode() * 3),
    "gzip": lambda text: gzip.compress(text.encode() * 3),
    "lower": lambda text: text.lower().encode(),
}


@pytest.mark.parametrize("form", _FORMS)
def test_the_scanner_finds_the_name_in_every_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x00\x01 before " + _FORMS[form](NAME) + b" after \xff")
    with closing(sqlite3.connect(tmp_path / "database")) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE message (content BLOB)")
        database.execute("INSERT INTO message VALUES (?)", [_FORMS[form](NAME)])
        database.commit()
        found = scan.found(tmp_path, PATTERNS)
    assert {"file", "database"} <= found["whole"]


def test_the_scanner_finds_the_name_where_an_error_would_have_put_it(scene: Scene, tmp_path: Path) -> None:
    """A control with the coordinator's own files: the same search finds a name that is added to a copy of one."""
    (database, *_) = (path for path in scene.coordinator.rglob("*") if _is_database(path))
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(tmp_path / "copy")) as copy:
        source.backup(copy)
        copy.execute("CREATE TABLE planted (reason TEXT)")
        copy.execute("INSERT INTO planted VALUES (?)", [json.dumps({"reason": f"cannot read {NAME}.npy"})])
        copy.commit()
    assert scan.found(tmp_path, PATTERNS)["whole"] == {"copy"}


def _is_database(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:15] == b"SQLite format 3"
