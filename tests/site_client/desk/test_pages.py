"""The desk in a real browser: a steward sees what is in quarantine, decides, and the next ingest does it."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
from PIL import Image

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.quarantine import Wish, decide, handle, held
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.store import exclusive
from tests.site_client.desk.conftest import RADIOGRAPH, SCRIPT, ingest, radiograph, ramp
from tests.site_client.imaging.conftest import Series

PICTURE = "document.getElementById('picture')"
FIELDS = "['left', 'top', 'width', 'height'].map(name => document.forms[0].elements.namedItem(name).value)"


@pytest.fixture(scope="module")
def desk(filled, open_desk):
    with open_desk(filled.store) as running:
        yield running.enter()


@pytest.fixture(scope="module")
def viewing(masked, open_desk):
    with open_desk(masked.store) as running:
        yield running.enter()


def opened(tab, desk):
    """The browser at the desk, as the link leads there."""
    tab.asked.clear()
    tab.said.clear()
    if desk.cookie:
        name, _, value = desk.cookie.partition("=")
        tab.call("Network.setCookie", name=name, value=value, url=desk.base, httpOnly=True, sameSite="Strict")
    tab.open(f"{desk.base}/" if desk.cookie else desk.link)
    tab.until("document.title.startsWith('Overview')")
    return tab


def of_reason(hospital, reason):
    """The one entry of the quarantine with one file and this reason."""
    catalog = Catalog.open(hospital.store)
    found = [one for one in held(catalog.connection, reason=reason) if one.files == 1]
    catalog.close()
    assert len(found) == 1
    return found[0]


def press(tab, decision):
    tab.follow(f"document.querySelector('button[value={decision}]').click()")


def test_the_overview_adds_up(tab, filled, desk):
    page = opened(tab, desk)
    assert "28 found = 21 stored + 7 in quarantine; 3 cases." in page.text
    assert "Site north" in page.text


def test_the_picture_in_quarantine_is_that_of_the_file(tab, filled, desk):
    one = of_reason(filled, Reason.BURNED_IN)
    page = opened(tab, desk)
    page.open(f"{desk.base}/quarantine")
    page.until("[...document.images].every(image => image.complete)")
    assert page.run("[...document.images].filter(image => image.naturalWidth > 90).length") == 2, (
        "the radiograph, and 'no picture' of the text"
    )
    page.open(f"{desk.base}/quarantine/{one.handle}")
    source = page.run(f"{PICTURE}.src")
    assert page.run(f"[{PICTURE}.naturalHeight, {PICTURE}.naturalWidth]") == list(RADIOGRAPH)
    assert one.sentence in page.text
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))), float)
    values = ramp().astype(float)
    low, high = np.percentile(values, (1, 99))
    expected = np.clip((values - low) * 255 / (high - low), 0, 255)
    assert np.abs(shown - expected).max() <= 1, "grey levels from 1 % to 99 % of the values, the right way up"


def test_what_is_released_is_a_case_after_the_next_ingest(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        page.run("document.querySelector('input[name=by]').value = 'Dr. Ada Müller'")
        press(page, "release")
        assert "Released by Dr. Ada Müller" in page.text
        assert "takes effect at the next ingest" in page.text
        assert ingest(own).cases == 4
        page.open(f"{desk.base}/quarantine/{one.handle}")
        assert "Not in quarantine" in page.text
        page.open(f"{desk.base}/cases?modality=DX")
        assert "1 to 1 of 1" in page.text


def test_a_box_drawn_on_the_picture_is_what_is_kept(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        left, top, width, height = page.run(
            f"(() => {{ const r = {PICTURE}.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }})()"
        )
        rows, columns = RADIOGRAPH
        page.drag((left + width * 50 / columns, top + height * 30 / rows), (left + width * 150 / columns, top + height))
        drawn = [int(cell) for cell in page.run(FIELDS)]
        assert np.abs(np.subtract(drawn, [50, 30, 100, 90])).max() <= 1
        press(page, "release")
        assert "is kept" in page.text
    assert ingest(own).cases == 4
    catalog = Catalog.open(own.store)
    image = next(
        own.store / row[0] for row in catalog.connection.execute("SELECT image FROM cases WHERE modality = 'DX'")
    )
    catalog.close()
    left, top, width, height = drawn
    kept = np.asarray(nibabel.load(image).dataobj).squeeze()
    assert kept.shape == (width, height)
    assert sorted(kept.ravel()) == sorted((ramp()[top : top + height, left : left + width]).ravel() - 1024.0)


def test_what_is_rejected_stays_out_whatever_becomes_of_its_file(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        press(page, "reject")
        assert "Rejected by" in page.text
        assert ingest(own).quarantined[Reason.REJECTED] == 1
        own.write(radiograph(BurnedInAnnotation="NO"))
        assert ingest(own).quarantined[Reason.REJECTED] == 1
        page.open(f"{desk.base}/quarantine/{one.handle}")
        assert "In quarantine: rejected" in page.text


def test_a_case_with_which_something_is_wrong_can_be_rejected_from_the_viewer(tab, own, open_desk):
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/cases")
        page.follow("document.querySelector('tbody a').click()")
        page.run("document.querySelector('details').open = true")
        press(page, "reject")
        assert "Rejected by" in page.text
    counts = ingest(own)
    assert (counts.cases, counts.quarantined[Reason.REJECTED]) == (2, 7)


def test_a_decision_during_an_ingest_is_refused_and_says_so(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk, exclusive(own.store):
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        press(page, "release")
        assert "another ingest is writing to" in page.text
        assert "next: wait for it to end" in page.text
    assert ingest(own).cases == 3


def test_a_file_that_changed_under_the_page_is_not_decided_on(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        own.write(radiograph(ImageComments="another"))
        press(page, "release")
        assert "the files have changed since the page was opened" in page.text


def test_what_files_say_is_shown_as_text(tab, own, open_desk):
    one = of_reason(own, Reason.BURNED_IN)
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{one.handle}")
        assert SCRIPT in page.text
        page.open(f"{desk.base}/quarantine")
        assert "notes<b>.txt" in page.text
        page.open(f"{desk.base}/cases")
        assert "<img src=x onerror=alert(1)>" in page.text
        page.open(f"{desk.base}/cases?label=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E")
        assert "1 to 1 of 1" in page.text
        page.follow("document.querySelector('tbody a').click()")
        assert "<img src=x onerror=alert(1)>" in page.text
        for name in ("%3Cscript%3Ealert(1)%3C/script%3E", "%22%3E%3Cimg%20src=x%20onerror=alert(1)%3E"):
            page.open(f"{desk.base}/quarantine/{name}")
            assert page.run("document.querySelectorAll('main img, main script').length") == 0
        assert page.run("document.title") != "owned"


def test_no_page_asks_anything_of_another_machine(tab, masked, filled, open_desk):
    for hospital in (masked, filled):
        with open_desk(hospital.store) as desk:
            page = opened(tab, desk)
            (hospital.store / "readiness").mkdir(exist_ok=True)
            report = '<style>p{color:red}</style><p>ready</p><script>document.title="x"</script>'
            outside = '<img src="https://example.org/x.png"><link rel="stylesheet" href="https://example.org/x.css">'
            (hospital.store / "readiness" / "plan-1.html").write_text(report + outside)
            for path in ("/", "/quarantine", "/cases", "/readiness"):
                page.open(desk.base + path)
            page.open(f"{desk.base}/cases")
            page.follow("document.querySelector('tbody a').click()")
            page.until("document.body?.dataset.state === 'ready'")
            foreign = [one for one in page.asked if not one.startswith((desk.base, "data:", "blob:"))]
            tried = [one for one in foreign if "example.org" not in one]
            assert tried == [], "nothing but what the report names was even tried"
            refused = [one for one in page.said if "example.org" in one]
            assert len(refused) >= 2, "and that was stopped by the policy"
            ours = [one for one in page.said if "Content Security Policy" in one and "example.org" not in one]
            assert [one for one in ours if "script" not in one.lower()] == [], "the desk's own pages need no exception"


def test_a_report_is_shown_and_runs_nothing(tab, own, open_desk):
    (own.store / "readiness").mkdir(exist_ok=True)
    case = next((own.store / "volumes").glob("*.nii")).stem
    link = f'<p>ready</p><a id="to" target="_top" href="/cases/{case}">see it</a>'
    (own.store / "readiness" / "plan-1.html").write_text(f"<script>parent.document.title='owned'</script>{link}")
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/readiness")
        inside = "document.querySelector('iframe').contentDocument"
        assert page.until(f"{inside} && {inside}.body && {inside}.body.innerText").startswith("ready")
        assert page.run("document.title").startswith("Readiness")
        where = page.run(
            "(() => { const f = document.querySelector('iframe'), o = f.getBoundingClientRect();"
            " const r = f.contentDocument.getElementById('to').getBoundingClientRect();"
            " return [o.left + r.left + r.width / 2, o.top + r.top + r.height / 2]; })()"
        )
        page.click(where)
        assert page.run("document.title").startswith(f"Case {case}")


DAMAGED = {
    "truncated": lambda content: content[: len(content) - 20_000],
    "no_pixels": lambda content: content.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x12\x00OW"),
    "rows": lambda content: content.replace(
        b"\x28\x00\x10\x00US\x02\x00\x78\x00", b"\x28\x00\x10\x00US\x02\x00\xff\xff"
    ),
    "bits": lambda content: content.replace(
        b"\x28\x00\x01\x01US\x02\x00\x0c\x00", b"\x28\x00\x01\x01US\x02\x00\x40\x00"
    ),
    "frames": lambda content: content.replace(b"\x28\x00\x02\x00US\x02\x00\x01\x00", b"\x28\x00\x08\x00IS\x02\x00-1"),
    "window": lambda content: content.replace(b"\x28\x00\x02\x00US\x02\x00\x01\x00", b"\x28\x00\x50\x10DS\x02\x00xx"),
    "text": lambda content: b"\x00" * 128 + b"DICM" + b"\xff" * 400,
}


def test_damaged_files_do_not_break_the_page(own, open_desk):
    (path,) = own.write(radiograph(40))
    content = path.read_bytes()
    for number, (name, damage) in enumerate(DAMAGED.items()):
        damaged = damage(content).replace(b"1.2.826.0.1.3680043.10.40.1.1", b"1.2.826.0.1.3680043.10.40.1.%d" % number)
        assert damaged != content
        path.with_name(name).write_bytes(damaged)
    ingest(own)
    catalog = Catalog.open(own.store)
    everything = held(catalog.connection)
    catalog.close()
    assert len(everything) > len(DAMAGED)
    with open_desk(own.store) as desk:
        desk.enter()
        for one in everything:
            status, _, page = desk.ask(f"/quarantine/{one.handle}")
            assert status == 200
            assert b'id="picture"' in page or b"There is no picture." in page
            assert desk.ask(f"/pictures/{one.handle}")[0] == 200


def test_real_damaged_files_do_not_break_the_page(shared_data, tmp_path, open_desk):
    from tests.site_client.imaging.conftest import Hospital

    hospital = Hospital(tmp_path)
    hospital.dicom.symlink_to(shared_data / "dicom_codecs_objects")
    hospital.ingest()
    catalog = Catalog.open(hospital.store)
    everything = held(catalog.connection)
    catalog.close()
    with open_desk(hospital.store) as desk:
        desk.enter()
        answers = [desk.ask(f"/quarantine/{one.handle}") for one in everything]
    assert {status for status, _, _ in answers} == {200}
    assert sum(b'id="picture"' in page for _, _, page in answers) > len(answers) / 3


def test_a_desk_that_is_killed_loses_no_decision_that_it_has_answered(own, open_desk):
    for number in range(50, 58):
        own.write(radiograph(number))
    own.ingest()
    catalog = Catalog.open(own.store)
    units = [one.unit for one in held(catalog.connection, reason=Reason.BURNED_IN) if one.files == 1]
    catalog.close()
    answered = []
    with open_desk(own.store) as desk:
        desk.enter()
        for number, unit in enumerate(units):
            if desk.decide(decision="release", unit=handle(unit))[0] == 303:
                answered.append(unit)
            if number == 4:
                desk.process.kill()
                desk.process.wait()
                break
    catalog = Catalog.open(own.store)
    kept = [row[0] for row in catalog.connection.execute("SELECT unit FROM decisions")]
    assert catalog.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    catalog.close()
    assert sorted(kept) == sorted(answered)
    assert len(kept) == 5
    assert own.ingest().cases == 8


def test_a_withdrawn_patients_image_is_not_shown(own, open_desk):
    (own.folder / "withdrawn.txt").write_text("P11\n")
    ingest(own, consent={"withdrawn": "withdrawn.txt"})
    one = of_reason(own, Reason.CONSENT_WITHDRAWN)
    with open_desk(own.store) as desk:
        desk.enter()
        page = desk.ask(f"/quarantine/{one.handle}")[2]
        assert b"The patient has withdrawn: the image is not shown." in page
        assert b'id="picture"' not in page
        assert desk.ask(f"/pictures/{one.handle}")[1]["content-type"].startswith("image/svg")
        assert desk.decide(decision="release", unit=one.handle)[0] == 409
    with pytest.raises(DataError, match="nobody can release this"):
        decide(own.store, Wish(one.handle, "release", "Ada"))


# --- the viewer


def show(tab, desk, case):
    tab.open(f"{desk.base}/cases/{case}")
    state = tab.until("document.body?.dataset.state")
    assert state == "ready", tab.text
    return tab


def case_of(hospital):
    return next((hospital.store / "volumes").glob("*.nii")).stem


def slide(tab, number):
    tab.run(f"(s => {{ s.value = {number}; s.dispatchEvent(new Event('input')); }})(document.getElementById('slice'))")


def choose(tab, name, value):
    tab.run(
        f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))"
    )


def test_the_viewer_tells_the_values_of_the_store(tab, masked, viewing):
    case = case_of(masked)
    volume = nibabel.as_closest_canonical(nibabel.load(masked.store / "volumes" / f"{case}.nii"))
    mask = nibabel.as_closest_canonical(nibabel.load(masked.store / "masks" / f"{case}.nii"))
    values, classes = np.asarray(volume.dataobj), np.asarray(mask.dataobj)
    assert set(np.unique(classes)) == {0, 1, 2}
    page = show(opened(tab, viewing), viewing, case)
    middle = [along.mean() for along in np.nonzero(classes)]
    start = page.run("Array.from(viewer.frac2vox(viewer.scene.crosshairPos))")
    assert start == pytest.approx(middle, abs=0.6), "it opens where the mask is"
    for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        choose(page, "plane", plane)
        for number in range(values.shape[axis]):
            slide(page, number)
            place, _, told = (
                page.run("document.getElementById('said').textContent").removeprefix("voxel ").partition(":")
            )
            at = tuple(int(part) for part in place.split(","))
            assert at[axis] == number
            value, _, named = told.partition(", mask ")
            assert float(value) == pytest.approx(float(values[at]))
            assert int(named) == classes[at]
    shown = page.run("[1, 2].map(c => viewer.volumes[1].img.filter(v => v === c).length)")
    assert shown == [int((classes == 1).sum()), int((classes == 2).sum())]


def colours(page):
    """What the canvas shows, rows × columns × RGB."""
    frame = page.run(
        "(() => { const r = document.getElementById('canvas').getBoundingClientRect();"
        " return [r.left, r.top, r.right, r.bottom].map(Math.round); })()"
    )
    return np.asarray(Image.open(io.BytesIO(page.picture())).convert("RGB").crop(frame), int)


def test_the_mask_lies_over_the_image_where_it_belongs(tab, masked, viewing):
    case = case_of(masked)
    classes = np.asarray(nibabel.as_closest_canonical(nibabel.load(masked.store / "masks" / f"{case}.nii")).dataobj)
    page = show(opened(tab, viewing), viewing, case)
    slide(page, 3)
    page.run("viewer.setCrosshairWidth(0); viewer.setOpacity(1, 1); viewer.drawScene()")
    page.painted()
    with_mask = colours(page)
    page.run("viewer.setOpacity(1, 0); viewer.drawScene()")
    page.painted()
    without = colours(page)
    slide(page, 0)
    page.run("viewer.setOpacity(1, 1); viewer.drawScene()")
    page.painted()
    elsewhere = colours(page)
    assert np.abs(without - without[..., :1]).max() <= 6, "the image is grey"
    assert np.abs(elsewhere - elsewhere[..., :1]).max() <= 6, "and so is a slice without a mask"
    red = (with_mask[..., 0] > with_mask[..., 2] + 60) & (with_mask[..., 0] > 150)
    blue = with_mask[..., 2] > with_mask[..., 0] + 60
    image = without.max(axis=2) > 8
    rows, columns = np.flatnonzero(image.mean(axis=1) > 0.5), np.flatnonzero(image.any(axis=0))
    # As radiologists look: the patient's left is at the right of the picture, anterior is above.
    for place, value in ((red, 1), (blue, 2)):
        across, along = np.nonzero(classes[:, :, 3] == value)
        x = 1 - (across.mean() + 0.5) / classes.shape[0]
        y = 1 - (along.mean() + 0.5) / classes.shape[1]
        found_y, found_x = np.nonzero(place)
        assert (found_x.mean() - columns[0]) / np.ptp(columns) == pytest.approx(x, abs=0.03)
        assert (found_y.mean() - rows[0]) / np.ptp(rows) == pytest.approx(y, abs=0.03)
        share = (classes[:, :, 3] == value).sum() / classes[:, :, 3].size
        assert place.sum() / (np.ptp(rows) * np.ptp(columns)) == pytest.approx(share, rel=0.2)


def test_the_window_darkens_and_brightens(tab, masked, viewing):
    page = show(opened(tab, viewing), viewing, case_of(masked))
    page.run("viewer.setOpacity(1, 0)")
    levels = []
    for low, high in ((-5000, 5000), (4000, 9000), (-9000, -4000)):
        page.run(f"document.getElementById('low').value = {low}; document.getElementById('high').value = {high}")
        choose(page, "high", high)
        choose(page, "low", low)
        choose(page, "high", high)
        page.painted()
        shown = colours(page)[..., 2]
        middle = shown[len(shown) // 2 - 40 : len(shown) // 2 + 40, shown.shape[1] // 2 - 40 : shown.shape[1] // 2 + 40]
        levels.append(float(np.median(middle)))
    assert levels[1] < 20
    assert 60 < levels[0] < 220
    assert levels[2] > 240


def test_a_flat_picture_is_shown_too(tab, own, open_desk):
    decide(own.store, Wish(of_reason(own, Reason.BURNED_IN).handle, "release", "Ada"))
    ingest(own)
    catalog = Catalog.open(own.store)
    (case,) = catalog.connection.execute("SELECT id FROM cases WHERE modality = 'DX'").fetchone()
    catalog.close()
    stored = np.asarray(nibabel.load(own.store / "volumes" / f"{case}.nii").dataobj).squeeze()
    with open_desk(own.store) as desk:
        page = show(opened(tab, desk), desk, case)
        assert sorted(page.run("viewer.volumes[0].dimsRAS.slice(1, 4)"))[1:] == sorted(RADIOGRAPH)
        told = page.run("document.getElementById('said').textContent").partition(":")[2]
        assert float(told) in set(stored.ravel())
        assert colours(page).max() > 150


def test_a_series_in_quarantine_can_be_scrolled_through_before_it_is_decided_on(tab, filled, desk):
    catalog = Catalog.open(filled.store)
    (series,) = [one for one in held(catalog.connection, reason=Reason.BURNED_IN) if one.files > 1]
    catalog.close()
    page = opened(tab, desk)
    page.open(f"{desk.base}/quarantine/{series.handle}")
    page.follow("[...document.links].find(link => link.textContent.startsWith('scroll through all')).click()")
    assert page.until("document.body?.dataset.state") == "ready"
    shape = page.run("viewer.volumes[0].dimsRAS.slice(1, 4)")
    expected = Series(12, slices=5)
    assert shape == [expected.shape[1], expected.shape[0], expected.slices]
    slide(page, 2)
    value = float(page.run("document.getElementById('said').textContent").partition(":")[2])
    assert value in set((expected.pixels()[2].astype(float) - 1024).ravel())


def test_what_makes_no_volume_is_told_in_the_viewer(tab, own, open_desk):
    images = Series(60, "P60", "A1", over={"BurnedInAnnotation": "YES"}).images()
    images[2].ImagePositionPatient = [0, 0, 500]
    own.write(images)
    ingest(own)
    catalog = Catalog.open(own.store)
    (uid,) = {one.handle for one in held(catalog.connection) if one.name.startswith("dicom/s.10.60")}
    catalog.close()
    with open_desk(own.store) as desk:
        page = opened(tab, desk)
        page.open(f"{desk.base}/quarantine/{uid}/viewer")
        assert page.until("document.body?.dataset.state") == "failed"
        assert "The image cannot be shown:" in page.text


def test_pages_answer_while_an_ingest_is_at_work(own, open_desk):
    for number in range(200, 240):
        own.write(Series(number, "P1", "A1", slices=20))
    with open_desk(own.store) as desk, ThreadPoolExecutor(1) as beside:
        desk.enter()
        running, answers = beside.submit(ingest, own), []
        while not running.done():
            answers += [desk.ask(path)[0] for path in ("/", "/quarantine", "/cases")]
        assert running.result().cases == 43
        assert len(answers) >= 3
        assert set(answers) <= {200, 409}, "409: the ingest began between two questions to the catalog"
        assert answers.count(200) > 0.8 * len(answers)


def test_a_case_that_has_left_the_store_is_told(tab, filled, desk):
    page = opened(tab, desk)
    page.open(f"{desk.base}/cases/0123456789abcdef")
    assert "there is no such case" in page.text


def test_a_second_series_in_the_quarantine_is_paged(own, open_desk):
    for number in range(100, 160):
        own.write(Series(number, f"P{number}", f"A{number}", slices=1, over={"BurnedInAnnotation": "YES"}))
    ingest(own)
    with open_desk(own.store) as desk:
        desk.enter()
        first = desk.ask("/quarantine?reason=burned_in")[2].decode()
        second = desk.ask("/quarantine?reason=burned_in&first=50")[2].decode()
    assert first.count("/pictures/") == 50
    assert second.count("/pictures/") == 12
    assert "1 to 50 of 62" in first
    assert 'rel="next"' in first
    assert 'rel="next"' not in second


@pytest.mark.parametrize("first", ["-1", str(2**63), str(10**30)])
def test_a_page_that_is_far_beyond_the_end_is_empty_and_no_error(desk, first):
    for path in (f"/cases?first={first}", f"/quarantine?first={first}"):
        assert desk.ask(path)[0] == 200
