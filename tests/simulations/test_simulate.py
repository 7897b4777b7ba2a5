"""`locum simulate` from the command line, on small emulated hospitals with real agents, workers, DICOM and disk."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from locum.common.cli import main
from locum.simulations.hospitals import HospitalSpec, write_hospital
from tests.plans import CLASSIFY, with_changes

SMALL = {"sites": 3, "patients": 12, "shape": [6, 20, 20], "spacing": [8.0, 6.0, 6.0], "follow_ups": 0.0}
SPLIT = {"train": 0.5, "validation": 0.2, "test": 0.3}


def _write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _plan(folder: Path, **changes: Any) -> Path:
    return _write(folder / "plan.yaml", with_changes(CLASSIFY, contract__split=SPLIT, **changes))


def _emulated(folder: Path, **changes: Any) -> Path:
    return _write(folder / "sites.yaml", {"emulate": {**SMALL, **changes}})


def _hospitals(folder: Path, *specs: HospitalSpec) -> Path:
    """Hospitals that have been written already, and the sites file that lists them as a team would."""
    listed = []
    for spec in specs:
        write_hospital(spec, folder / spec.name)
        site = yaml.safe_load((folder / spec.name / "site.yaml").read_text())
        listed.append({**site, "root": str(folder / spec.name / site.get("root", "."))})
    return _write(folder / "sites.yaml", {"sites": listed})


def _spec(name: str, seed: int, **changes: Any) -> HospitalSpec:
    given = {"patients": 10, "prevalence": 0.5, "shape": (6, 20, 20), "spacing": (8.0, 6.0, 6.0), **changes}
    return HospitalSpec(name=name, seed=seed, **given)


def _run(*arguments: object) -> int:
    code: int = main(["simulate", *map(str, arguments)]) or 0
    return code


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with baselines; three sites, two rounds."""
    folder = tmp_path_factory.mktemp("finished")
    plan, sites = _plan(folder, evaluation__metrics=["AUC", "accuracy", "confusion"]), _emulated(folder)
    assert _run(plan, "--sites-file", sites, "--out", folder / "out", "--baselines") == 0
    return folder


def test_a_run_leaves_everything_that_it_promises(finished: Path) -> None:
    out = finished / "out"
    names = {path.name for path in out.iterdir()}
    assert {
        "report.html",
        "metrics.json",
        "model.safetensors",
        "model_card.md",
        "model_card.json",
        "plan.yaml",
    } <= names
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rounds"] == 2
    assert len(metrics["sites"]) == 3
    assert metrics["seconds_total"] > metrics["seconds_per_round"] > 0
    for who in ("federated", "pooled", "local"):
        assert set(metrics["test"][who]["all"]) >= {"AUC", "accuracy"}
        assert set(metrics["test"][who]["per_site"]) == set(metrics["sites"])
    report = (out / "report.html").read_text()
    assert all(site in report for site in metrics["sites"])


def test_the_released_sums_and_the_cases_themselves_agree(finished: Path) -> None:
    run = json.loads((finished / "out" / "run.json").read_text())
    metrics = json.loads((finished / "out" / "metrics.json").read_text())
    assert run["test"]["overall"]["accuracy"] == pytest.approx(metrics["test"]["federated"]["all"]["accuracy"])
    assert run["test"]["overall"]["confusion"] == metrics["test"]["federated"]["all"]["confusion"]


def test_no_patient_name_stands_in_what_the_coordinator_keeps(finished: Path) -> None:
    import pydicom

    out = finished / "out"
    files = [path for path in (out / "sites").rglob("*") if path.is_file() and "dicom" in path.parts]
    names = set()
    for path in files[::7]:
        with suppress(pydicom.errors.InvalidDicomError):
            names |= {part for part in str(pydicom.dcmread(path).get("PatientName", "")).split("^") if len(part) > 3}
    kept = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file() and "sites" not in p.relative_to(out).parts)
    assert names
    assert [name for name in names if name.encode() in kept] == []


def test_the_same_seed_gives_the_same_model_to_the_bit_and_another_seed_another(finished: Path, tmp_path: Path) -> None:
    plan, sites = finished / "plan.yaml", finished / "sites.yaml"
    # A plan of other metrics has another digest, but not another model.
    assert _run(plan, "--sites-file", sites, "--out", tmp_path / "again") == 0
    first = (finished / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert _run(plan, "--sites-file", sites, "--out", tmp_path / "other", "--seed", 7) == 0
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != first


def test_a_run_with_committed_rounds_is_not_overwritten_unless_told(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "out" / "model.safetensors").read_bytes()
    code = _run(finished / "plan.yaml", "--sites-file", finished / "sites.yaml", "--out", finished / "out")
    assert code == 1
    assert "--resume" in capsys.readouterr().err
    assert (finished / "out" / "model.safetensors").read_bytes() == before


def test_a_finished_run_resumed_is_the_same_run(finished: Path) -> None:
    before = (finished / "out" / "model.safetensors").read_bytes()
    assert _run("--resume", finished / "out") == 0
    assert (finished / "out" / "model.safetensors").read_bytes() == before


def test_json_prints_the_metrics_and_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, rounds=1)
    assert _run(plan, "--sites-file", finished / "sites.yaml", "--sites", 2, "--out", tmp_path / "o", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["sites"]) == 2
    assert printed["rounds"] == 1


# --- under secure aggregation

SECURED = {"protection__secure_aggregation": "required", "admission": {"norm_bound": 20, "weight_cap": 100}}


def test_a_secure_sum_gives_the_model_of_a_plain_one_but_for_rounding(finished: Path, tmp_path: Path) -> None:
    metrics = ["AUC", "accuracy", "confusion"]
    plan = _plan(tmp_path, evaluation__metrics=metrics, **SECURED)
    out = tmp_path / "out"
    assert _run(plan, "--sites-file", finished / "sites.yaml", "--out", out) == 0
    plain, masked = (load_file(folder / "model.safetensors") for folder in (finished / "out", out))
    assert max(float(np.abs(plain[name] - masked[name]).max()) for name in plain) < 1e-4
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "completed"
    assert run["test"]["per_site"] == {}
    found = json.loads((out / "metrics.json").read_text())["test"]["federated"]
    assert run["test"]["total"] == found["total"]
    assert run["test"]["overall"]["confusion"] == found["all"]["confusion"]
    assert set(found["per_site"]) == set(run["sites"])
    report = (out / "report.html").read_text()
    assert "A roster of 3 sites" in report
    assert "not told" not in report[report.index('id="data"') : report.index('id="protection"')]


@pytest.mark.parametrize("engine", ["local", "rehearse"])
def test_fewer_sites_than_a_secure_sum_needs_are_told_before_anything_is_made(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, sites = _plan(tmp_path, **SECURED), _emulated(tmp_path, sites=2)
    assert _run(plan, "--sites-file", sites, "--engine", engine, "--out", tmp_path / "out") == 1
    text = _error(capsys)
    assert "at least 3 sites; there are 2" in text
    assert "secure_aggregation: off" in text
    assert not (tmp_path / "out").exists()


# --- processes that die

RUNNER = [sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())", "simulate"]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def _committed(out: Path) -> int:
    """The last committed round. A round's folder is gone soon after it: who looks for one of them can miss it."""
    return max((int(path.name.removeprefix("round-")) for path in (out / "checkpoints").glob("round-*")), default=0)


def test_kill_9_of_the_whole_run_and_a_resume_give_the_same_model_to_the_bit(tmp_path: Path) -> None:
    plan, sites = _plan(tmp_path, rounds=6), _emulated(tmp_path)
    assert _run(plan, "--sites-file", sites, "--out", tmp_path / "whole") == 0
    command = [*RUNNER, str(plan), "--sites-file", str(sites), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    _wait_for(lambda: _committed(tmp_path / "cut") >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert _run("--resume", tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_ctrl_c_stops_at_once_keeps_the_rounds_and_leaves_the_terminal_sane(tmp_path: Path) -> None:
    plan, sites = _plan(tmp_path, rounds=500), _emulated(tmp_path)
    ours, theirs = pty.openpty()
    command = [*RUNNER, str(plan), "--sites-file", str(sites), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=_take_terminal)  # noqa: PLW1509  # fmt: skip
    os.close(theirs)
    shown = bytearray()

    def two_rounds() -> bool:
        shown.extend(_available(ours))
        return _committed(tmp_path / "out") >= 2

    _wait_for(two_rounds, process)
    os.write(ours, b"\x03")
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        shown.extend(_available(ours))
    assert process.wait(timeout=5) == 130
    shown.extend(_available(ours))
    text = shown.decode(errors="replace")
    assert "committed rounds are kept" in text
    assert "--resume" in text
    assert "Traceback" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor stays hidden"
    assert not _children_of(process.pid)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _available(descriptor: int, at_most: int = 64) -> bytes:
    """What the terminal holds now, in at most so many reads: the live view writes faster than a reader waits."""
    import select

    content = b""
    for _ in range(at_most):
        if not select.select([descriptor], [], [], 0.05)[0]:
            break
        try:
            read = os.read(descriptor, 65536)
        except OSError:
            break
        if not read:
            break
        content += read
    return content


def _children_of(group: int) -> list[str]:
    """What is left of a process group; on a busy machine a process that was told to end takes a moment."""
    until = time.monotonic() + 20
    while (left := _listed(group)) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def _listed(group: int) -> list[str]:
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=,args=", "-g", str(group)], capture_output=True, text=True, check=False
    )
    return [line for line in listed.stdout.splitlines() if " Z" not in line]


# --- bad input


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("error: ") == 1
    assert " next: " in text
    assert "Traceback" not in text
    return text


def test_a_plan_with_a_typo_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, training__local_step=3)
    assert _run(plan, "--sites-file", _emulated(tmp_path), "--out", tmp_path / "out") == 2
    assert "did you mean 'local_steps'" in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_network_that_does_not_match_the_classes_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = with_changes(
        CLASSIFY,
        contract={"task": "segmentation", "classes": ["background", "lesion"]},
        network={"name": "VNet"},
        loss={"name": "DiceLoss"},
        training={"input_size": [24, 24, 24], "local_steps": 1},
        evaluation={"metrics": ["Dice"]},
    )
    plan = _write(tmp_path / "plan.yaml", content)
    assert _run(plan, "--sites-file", _emulated(tmp_path), "--out", tmp_path / "out") == 2
    assert "VNet" in _error(capsys)


def test_a_missing_folder_is_named_with_its_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = _write(tmp_path / "sites.yaml", {"sites": [{"name": "a", "sources": [{"kind": "dicom", "path": "gone"}]}]})
    assert _run(_plan(tmp_path), "--sites-file", sites, "--out", tmp_path / "out") == 2
    text = _error(capsys)
    assert "site a" in text
    assert "gone" in text


def test_a_missing_or_wrong_sites_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_plan(tmp_path), "--sites-file", tmp_path / "no.yaml", "--out", tmp_path / "out") == 2
    assert "no.yaml" in _error(capsys)
    sites = _write(tmp_path / "sites.yaml", {"emulate": {"patient": 3}})
    assert _run(_plan(tmp_path), "--sites-file", sites, "--out", tmp_path / "out") == 2
    assert "did you mean 'patients'" in _error(capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"sites": []}, "'sites'"),
        ({"defaults": ["a"], "sites": [{"name": "a"}]}, "'defaults'"),
        ({"defaults": 0, "sites": [{"name": "a"}]}, "'defaults'"),
        ({"sites": [{"name": "a"}, {"name": 1}, {"name": "1"}]}, "2 sites are called '1'"),
        ({"emulate": 5}, "'emulate'"),
        ({"emulate": []}, "'emulate'"),
    ],
)
def test_a_sites_file_of_the_wrong_form_is_told_before_anything_is_made(
    content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = _write(tmp_path / "sites.yaml", content)
    assert _run(_plan(tmp_path), "--sites-file", sites, "--out", tmp_path / "out") == 2
    text = _error(capsys)
    assert "sites.yaml" in text
    assert said in text
    assert not (tmp_path / "out").exists()


def test_label_rows_that_name_no_image_are_told_and_the_rest_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = _hospitals(tmp_path, _spec("a", 1), _spec("b", 2))
    labels = tmp_path / "a" / "labels.csv"
    first, second, *_ = labels.read_text(encoding="utf-8-sig").splitlines()
    width = first.count(";") if ";" in first else first.count(",")
    mark = ";" if ";" in first else ","
    code = second.split(mark)[-1]
    with labels.open("a", encoding="utf-8") as file:
        file.write(mark.join(["NOBODY"] * width + [code]) + "\n")
    assert _run(_plan(tmp_path, rounds=1), "--sites-file", sites, "--out", tmp_path / "out") == 0
    assert "1 label rows name no image" in capsys.readouterr().out


def test_an_empty_site_and_a_site_of_one_class_are_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = _hospitals(
        tmp_path, _spec("a", 1), _spec("b", 2), _spec("healthy", 3, prevalence=0.0), _spec("empty", 4, patients=0)
    )
    assert _run(_plan(tmp_path, rounds=1), "--sites-file", sites, "--out", tmp_path / "out") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "healthy has no training case of lesion" in shown
    assert "contract.single_class: exclude" in shown
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["status"] == "completed with losses"
    assert set(run["excluded"]) == {"empty"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test"]["federated"]["per_site"]["healthy"]["AUC"] is None


def test_a_run_without_a_test_fold_says_so_instead_of_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, rounds=1)
    content = yaml.safe_load(plan.read_text())
    content["contract"]["split"] = {"train": 0.9, "validation": 0.1, "test": 0.0}
    sites = _emulated(tmp_path, sites=2)
    assert _run(_write(plan, content), "--sites-file", sites, "--out", tmp_path / "out", "--baselines") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test"]["federated"]["all"] == {"AUC": None, "accuracy": None}
    assert "Traceback" not in capsys.readouterr().err


def test_a_nan_loss_stops_the_run_with_the_reason_and_the_committed_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, optimiser__lr=1e30, training__local_steps=3)
    assert _run(plan, "--sites-file", _emulated(tmp_path, sites=2), "--out", tmp_path / "out") == 1
    text = _error(capsys)
    assert "the loss became NaN or infinite" in text
    assert "lower the learning rate" in text
    assert "site.log" in text


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_no_committed_round_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"name": "Classifier", "channels": [32, 64]}
    plan, sites = _plan(tmp_path, network=wide, rounds=4), _hospitals(tmp_path, _spec("a", 1), _spec("b", 2))
    assert _run(plan, "--sites-file", sites, "--out", tmp_path / "whole") == 0
    capsys.readouterr()
    filler = small_disk / "filler"
    out = small_disk / "out"
    process = subprocess.Popen(
        [*RUNNER, str(plan), "--sites-file", str(sites), "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    _wait_for(lambda: _committed(out) >= 1, process)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    told = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1, told
    assert "committed rounds are kept" in told
    assert "Traceback" not in told
    filler.unlink()
    assert _run("--resume", out) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_an_unknown_engine_and_a_resume_of_nothing_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--engine", "warp", "--out", tmp_path / "out") == 2
    assert "there is no engine 'warp'" in _error(capsys)
    assert _run("--resume", tmp_path) == 1
    assert "holds no run" in _error(capsys)


# --- the run's folder


def _gone(folder: Path) -> Path:
    """Sites whose data is not there: the run's folder is made, and the run ends at once."""
    return _write(folder / "gone.yaml", {"sites": [{"name": "a", "sources": [{"kind": "dicom", "path": "gone"}]}]})


@pytest.mark.parametrize("forced", [[], ["--force"]])
def test_a_folder_that_holds_something_else_is_left_as_it_is_whether_forced_or_not(
    forced: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"README.md": "mine", "package.json": "{}", "plan.yaml": "mine", "sites/a.txt": "mine"}
    (tmp_path / "mine" / "sites").mkdir(parents=True)
    for name, content in mine.items():
        (tmp_path / "mine" / name).write_text(content)
    monkeypatch.chdir(tmp_path / "mine")
    assert _run(_plan(tmp_path), "--sites-file", _gone(tmp_path), "--out", ".", *forced) == 1
    assert "holds no run" in _error(capsys)
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "mine")): path.read_text() for path in files} == mine


def test_force_removes_all_of_the_old_run_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out, ignore=shutil.ignore_patterns("raw"))
    mine = {"notes.md", "own.json", "slides.html", "other.safetensors"}
    for name in mine:
        (out / name).write_text("mine")
    assert _run(_plan(tmp_path), "--sites-file", _gone(tmp_path), "--out", out, "--force") == 2
    assert {path.name for path in out.iterdir()} == mine | {"simulation.json", "plan.yaml", "checkpoints", "sites"}
    assert [path.name for path in (out / "sites").iterdir()] == ["a"]


def test_a_run_that_was_half_made_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, sites, out = _plan(tmp_path), _gone(tmp_path), tmp_path / "out"
    assert _run(plan, "--sites-file", sites, "--out", out) == 2
    shutil.rmtree(out / "checkpoints")
    (out / "plan.yaml").unlink()
    capsys.readouterr()
    assert _run(plan, "--sites-file", sites, "--out", out) == 2
    assert "gone does not exist" in _error(capsys)
    assert (out / "plan.yaml").is_file()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "afile").write_text("mine")
    for out in (tmp_path / "afile", tmp_path / "afile" / "x"):
        assert _run(_plan(tmp_path), "--sites-file", _gone(tmp_path), "--out", out) == 1
        assert "cannot be written" in _error(capsys)
    assert (tmp_path / "afile").read_text() == "mine"
