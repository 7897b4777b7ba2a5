"""One retrieval from a PACS, from the query to the last image: the one loop, whatever the PACS speaks.

Rules:
  * What is in the store is not fetched again: a retrieval that was cut off at any moment goes on from there.
  * Counted against what the PACS says: a study of which it gives fewer images than it said, or listed, is incomplete,
    and is asked for again at the next retrieval. If it gives more, they are taken.
  * Nothing of an original is written: each image is cleaned in memory when it comes, and all names are keyed.
  * A series that cannot be had leaves its study incomplete and holds up no other; a PACS that does not answer, or
    refuses this site, ends the retrieval with one error that says what to do.

Steps: name the studies → their series → what is missing of each → fetch, clean, keep → what is still missing? → settle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from locum.common.errors import DataError
from locum.site_client.imaging.consent import withdrawn
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.ingest import Progress
from locum.site_client.imaging.inventory import batches
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.retrieve.ahead import fetched
from locum.site_client.imaging.retrieve.arrival import Desk, arrived, is_of_no_use, unusable
from locum.site_client.imaging.retrieve.dicomweb import DicomWeb
from locum.site_client.imaging.retrieve.dimse import Dimse
from locum.site_client.imaging.retrieve.pace import Pace, wait_after
from locum.site_client.imaging.retrieve.peer import AwayError, Pacs, Series, SeriesError, Study, Take, Want
from locum.site_client.imaging.retrieve.query import has_day, has_kind
from locum.site_client.imaging.retrieve.spool import Spool, Tally
from locum.site_client.imaging.sources import DicomWebSource, PacsSource, Query, SiteData

#: Studies that are planned and fetched together.
_TOGETHER = 32
#: Attempts in a row that bring nothing, until a PACS counts as away.
_TRIES = 5
T = TypeVar("T")


@dataclass
class Retrieval:
    """What one retrieval needs, and how far it is.

    Attributes:
        done: images that are here, of `total` that the PACS speaks of so far.
        came: images that came and were new.
        trouble: the last series that was not given, in words.
    """

    pacs: Pacs
    query: Query
    spool: Spool
    desk: Desk
    pace: Pace
    tell: Callable[[Progress], None]
    sleep: Callable[[float], object] = time.sleep
    done: int = 0
    total: int = 0
    came: int = 0
    trouble: str = ""

    def fetch(self, want: Want, take: Take) -> None:
        """Fetch at the site's pace."""

        def paced(content: bytes) -> None:
            self.pace.take()
            take(content)

        self.pacs.fetch(want, paced)


@dataclass
class _Plan:
    """What is wanted of one study.

    Attributes:
        wanted: its series that the query names; None if the PACS does not list them.
        unlisted: images that the study has, as the PACS says, and that are in none of the series it lists.
        expected: keyed series UID to the number of images it should have.
    """

    study: Study
    wanted: Sequence[Series] | None
    unlisted: int = 0
    expected: dict[str, int] = field(default_factory=dict)


def retrieve(site: SiteData, store: Path, keys: Keys, clean: Deidentifier, tell: Callable[[Progress], None]) -> None:
    """Bring what the site's PACSs have into the store's `incoming` folder.

    The caller holds the store (`store.exclusive`).

    Raises:
        DataError: a PACS refuses this site, or names nothing.
        AwayError: a PACS does not answer; what came stays.
        OSError: the store cannot be written; what was committed stays.
    """
    gone = withdrawn(site.consent, keys)
    for number, source in enumerate(site.sources):
        if isinstance(source, PacsSource):
            made = f"{clean.profile} {keys.fingerprint}"
            desk = Desk(source.query, keys, clean, gone)
            with closing(opened(source)) as pacs, Spool.opened(store, number, made=made) as spool:
                spool.refresh(gone, asked=desk.asked)
                _retrieve(Retrieval(pacs, source.query, spool, desk, Pace(source.rate), tell))


def opened(source: PacsSource) -> Pacs:
    """The PACS of a source; nothing is sent yet."""
    return DicomWeb(source) if isinstance(source, DicomWebSource) else Dimse(source)


def _retrieve(run: Retrieval) -> None:
    studies = patiently(
        lambda: [study for study in run.pacs.studies(run.query) if has_day(run.query, study)], run.sleep
    )
    run.total = sum(study.said or 0 for study in studies)
    kept: list[str] = []
    for some in batches(studies, _TOGETHER):
        plans = [_plan(run, study) for study in some]
        _complete(run, plans)
        kept += [run.desk.keys.uid(plan.study.uid) for plan in plans if _settle(run, plan)]
        if run.trouble and run.spool.is_empty():
            raise DataError(
                f"{run.pacs.name} gives nothing of what it names: {run.trouble}", run.pacs.when_nothing_comes
            )
    if not kept:
        raise DataError(f"{run.pacs.name} names no image for the query", "check the query: locum site pacs SITE.yaml")
    run.spool.keep_only(kept)


# Plan: what is wanted of a study.


def _plan(run: Retrieval, study: Study) -> _Plan:
    try:
        every = patiently(lambda: run.pacs.series(study), run.sleep)
    except SeriesError as error:
        run.trouble = str(error)
        return _Plan(study, None)
    wanted = [series for series in every if has_kind(run.query, series)]
    listed = sum(series.said or 0 for series in every)
    unlisted = max(0, (study.said or 0) - listed) if all(series.said is not None for series in every) else 0
    plan = _Plan(study, wanted, unlisted, {run.desk.keys.uid(series.uid): series.said or 0 for series in wanted})
    here = sum(run.spool.count(series) for series in plan.expected)
    run.done += here
    run.total += max(here, sum(plan.expected.values())) - (study.said or 0)
    return plan


# Complete: fetch until nothing is missing, or nothing more comes.


def _complete(run: Retrieval, plans: Sequence[_Plan]) -> None:
    expected = {name: number for plan in plans for name, number in plan.expected.items()}
    wants = [want for plan in plans for series in plan.wanted or () if (want := _first(run, series, expected))]
    idle = 0
    while wants:
        before = run.came
        failed = _fetch(run, wants)
        wants = _rest(run, wants, failed, expected)
        idle = idle + 1 if run.came == before else 0
        away = [error for error in failed.values() if isinstance(error, AwayError)]
        if wants and away and idle < _TRIES:
            run.sleep(wait_after(idle + 1, max(error.wait for error in away)))
        elif idle:
            if away:
                patiently(run.pacs.greet, run.sleep)  # it stumbles over this series alone, or else this says why
            break
    for plan in plans:
        plan.expected = {name: expected[name] for name in plan.expected}


def _first(run: Retrieval, series: Series, expected: dict[str, int]) -> Want | None:
    """What is fetched of a series at first: all of it if nothing is here, else what is missing."""
    if series.said is not None:
        here = run.spool.count(run.desk.keys.uid(series.uid))
        if here >= series.said:
            return None
        if not here:
            return Want(series)
    return _missing(run, series, expected)


def _rest(run: Retrieval, wants: Sequence[Want], failed: dict[Want, Exception], expected: dict[str, int]) -> list[Want]:
    """What is still missing after an attempt; what failed comes last, so that it holds up nothing else."""
    rest = sorted(wants, key=lambda want: want in failed)
    return [missing for want in rest if (missing := _missing(run, want.series, expected)) is not None]


def _missing(run: Retrieval, series: Series, expected: dict[str, int]) -> Want | None:
    """The images of a series that are not here; an object of no use is noted instead of fetched."""
    keys, name = run.desk.keys, run.desk.keys.uid(series.uid)
    if series.said is not None and run.spool.count(name) >= series.said:
        return None
    try:
        listed = patiently(lambda: run.pacs.instances(series), run.sleep)
    except SeriesError as error:
        run.trouble, listed = str(error), ()
    expected[name] = max(expected[name], len(listed))
    study = keys.uid(series.study)
    here = run.spool.has(study)
    missing = [instance for instance in listed if keys.uid(instance.uid) not in here]
    for instance in missing:
        if is_of_no_use(instance.sop_class):
            run.spool.put(name, study, unusable(keys.uid(instance.uid), instance.sop_class, study))
    run.spool.commit()
    rest = tuple(instance for instance in missing if not is_of_no_use(instance.sop_class))
    if listed:
        return Want(series, rest) if rest else None
    return Want(series) if run.spool.count(name) < expected[name] or series.said is None else None


def _fetch(run: Retrieval, wants: Sequence[Want]) -> dict[Want, Exception]:
    """Fetch, clean and keep; returns the fetches that failed. The first that finds the PACS away ends the attempt.

    Raises:
        DataError: the PACS refuses this site.
    """
    failed: dict[Want, Exception] = {}
    with fetched(run.fetch, wants, run.pacs.at_once) as events:
        for event in events:
            if event.content is not None:
                _keep(run, event.want.series, event.content)
            elif event.error is not None:
                failed[event.want] = event.error
                if not isinstance(event.error, SeriesError):
                    break
    run.spool.commit()
    for error in failed.values():
        if isinstance(error, SeriesError):
            run.trouble = str(error)
        elif not isinstance(error, AwayError):
            raise error
    return failed


def _keep(run: Retrieval, series: Series, content: bytes) -> None:
    arrival = arrived(content, series, run.desk)
    if arrival is not None and run.spool.put(run.desk.keys.uid(series.uid), run.desk.keys.uid(series.study), arrival):
        run.came += 1
        run.done += 1
        run.total = max(run.total, run.done)
        run.tell(Progress("retrieving", run.done, run.total))


# Settle: count a study.


def _settle(run: Retrieval, plan: _Plan) -> bool:
    """Record whether a study is complete; False if the query names nothing of it."""
    study = run.desk.keys.uid(plan.study.uid)
    if plan.wanted is None:
        run.spool.settle(study, Tally(plan.study.said, lacking=max(1, plan.study.said or 0), surplus=0), None)
        return True
    here = {name: run.spool.count(name) for name in plan.expected}
    lacking = sum(max(0, number - here[name]) for name, number in plan.expected.items()) + plan.unlisted
    surplus = sum(max(0, here[run.desk.keys.uid(one.uid)] - one.said) for one in plan.wanted if one.said is not None)
    run.spool.settle(study, Tally(plan.study.said, lacking, surplus), plan.expected)
    return bool(plan.wanted)


def patiently(step: Callable[[], T], sleep: Callable[[float], object] = time.sleep) -> T:
    """Do a step, again after longer and longer waits while the PACS is away.

    Raises:
        AwayError: it is away at the last attempt too.
    """
    for attempt in range(1, _TRIES):
        try:
            return step()
        except AwayError as error:
            sleep(wait_after(attempt, error.wait))
    return step()
