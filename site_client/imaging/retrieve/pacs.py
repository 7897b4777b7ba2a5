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
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
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
from locum.site_client.imaging.retrieve.peer import AwayError, Instance, Pacs, Series, SeriesError, Study, Take, Want
from locum.site_client.imaging.retrieve.query import has_kind, named
from locum.site_client.imaging.retrieve.spool import Spool, Tally
from locum.site_client.imaging.sources import DicomWebSource, PacsSource, Query, SiteData

#: Studies that are planned and fetched together.
_TOGETHER = 32
#: Attempts in a row that bring nothing, until a PACS counts as away.
_TRIES = 5
#: The same, of series that it does not give although it answers.
_TRIES_OF_A_SERIES = 2
#: Images that may come besides twice those that were asked for, and if it does not say how many there are.
_BESIDES, _TOO_MANY = 1000, 100_000
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
        """Fetch at the site's pace; raises SeriesError if there is no end of it."""
        asked = len(want.instances) if want.instances is not None else want.series.said
        most = _TOO_MANY if asked is None else 2 * asked + _BESIDES
        came = count(1)

        def paced(content: bytes) -> None:
            self.pace.take()
            if next(came) > most:
                raise SeriesError("the PACS does not stop sending")
            take(content)

        self.pacs.fetch(want, paced)


@dataclass
class _Plan:
    """What is wanted of one study.

    Attributes:
        wanted: its series that the query names; None if the PACS does not list them.
        unlisted: images that the study has, as the PACS says, and that are in none of the series it lists.
        expected: keyed series UID to the number of images it should have.
        trouble: why something is not given, in words.
    """

    study: Study
    wanted: Sequence[Series] | None
    unlisted: int = 0
    expected: dict[str, int] = field(default_factory=dict)
    trouble: str = ""


def retrieve(
    site: SiteData,
    store: Path,
    keys: Keys,
    clean: Deidentifier,
    tell: Callable[[Progress], None],
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
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
            made = f"{clean.profile} {clean.digest} {keys.fingerprint}"
            desk = Desk(source.query, keys, clean, gone)
            with closing(opened(source)) as pacs, Spool.opened(store, number, made=made) as spool:
                spool.refresh(gone, asked=desk.asked)
                _retrieve(Retrieval(pacs, source.query, spool, desk, Pace(source.rate), tell, sleep))


def opened(source: PacsSource) -> Pacs:
    """The PACS of a source; nothing is sent yet."""
    return DicomWeb(source) if isinstance(source, DicomWebSource) else Dimse(source)


def _retrieve(run: Retrieval) -> None:
    studies = patiently(lambda: named(run.query, run.pacs.studies(run.query)), run.sleep)
    run.total = sum(study.said or 0 for study in studies)
    kept: list[str] = []
    for some in batches(studies, _TOGETHER):
        plans = [_plan(run, study) for study in some]
        _complete(run, plans)
        kept += [run.desk.keys.uid(plan.study.uid) for plan in plans if _settle(run, plan)]
        if run.spool.is_empty() and any(plan.wanted != [] for plan in plans):
            why = run.trouble or "it answers, and with nothing"
            raise DataError(f"{run.pacs.name} gives nothing of what it names: {why}", run.pacs.when_nothing_comes)
    if not kept:
        raise DataError(f"{run.pacs.name} names no image for the query", "check the query: locum site pacs SITE.yaml")
    run.spool.keep_only(kept)


# Plan: what is wanted of a study.


def _plan(run: Retrieval, study: Study) -> _Plan:
    try:
        every = patiently(lambda: run.pacs.series(study), run.sleep)
    except SeriesError as error:
        run.trouble = str(error)
        return _Plan(study, None, trouble=str(error))
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
    every = [(plan, series) for plan in plans for series in plan.wanted or ()]
    wants = [want for plan, series in every if (want := _missing(run, plan, series)) is not None]
    plan_of = {series: plan for plan, series in every}
    idle = 0
    while wants:
        before = run.came
        failed = _fetch(run, wants)
        # What failed comes last, so that it holds up nothing else.
        rest = sorted((want.series for want in wants), key=lambda series: series in failed)
        wants = [want for series in rest if (want := _missing(run, plan_of[series], series, failed=series in failed))]
        idle = idle + 1 if run.came == before else 0
        away = [error for error in failed.values() if isinstance(error, AwayError)]
        if idle >= (_TRIES if away else _TRIES_OF_A_SERIES):
            if away:
                patiently(run.pacs.greet, run.sleep)  # if it answers, it stumbles over these series alone
            break
        if wants and away:
            run.sleep(wait_after(idle + 1, max(error.wait for error in away)))
    for series, error in failed.items() if wants else ():
        plan_of[series].trouble = run.trouble = str(error)


def _missing(run: Retrieval, plan: _Plan, series: Series, *, failed: bool = False) -> Want | None:
    """What is to be fetched of a series: all of it, the images that are not here, or nothing."""
    name = run.desk.keys.uid(series.uid)
    here = run.spool.count(name)
    if series.said is not None and (here >= series.said or not (here or failed)):
        return None if here >= series.said else Want(series)
    try:
        listed = patiently(lambda: run.pacs.instances(series), run.sleep)
    except SeriesError as error:
        plan.trouble, listed = str(error), ()
    plan.expected[name] = max(plan.expected[name], len(listed))
    rest = tuple(_of_use(run, series, listed))
    run.spool.commit()
    if not listed:  # it does not answer at this level
        return Want(series) if here < plan.expected[name] or series.said is None else None
    return Want(series, rest if here or failed else None) if rest else None


def _of_use(run: Retrieval, series: Series, listed: Sequence[Instance]) -> Iterator[Instance]:
    """The images that are not here; an object that nothing reads is noted instead of fetched."""
    keys, name, study = run.desk.keys, run.desk.keys.uid(series.uid), run.desk.keys.uid(series.study)
    here = run.spool.has(study)
    for instance in listed:
        sop = keys.uid(instance.uid)
        if sop not in here and is_of_no_use(instance.sop_class):
            run.spool.put(name, study, unusable(sop, instance.sop_class, study))
            _tell(run)
        elif sop not in here:
            yield instance


def _fetch(run: Retrieval, wants: Sequence[Want]) -> dict[Series, AwayError | SeriesError]:
    """Fetch, clean and keep; returns the series that failed. The first that finds the PACS away ends the attempt.

    Raises:
        DataError: the PACS refuses this site.
    """
    failed: dict[Series, AwayError | SeriesError] = {}
    refusal: Exception | None = None
    with fetched(run.fetch, wants, run.pacs.at_once) as events:
        for event in events:
            if event.content is not None:
                _keep(run, event.want.series, event.content)
            elif isinstance(event.error, AwayError | SeriesError):
                failed[event.want.series] = event.error
            refusal = None if event.error in failed.values() else event.error
            if refusal is not None or isinstance(event.error, AwayError):
                break
    run.spool.commit()
    if refusal is not None:
        raise refusal
    return failed


def _keep(run: Retrieval, series: Series, content: bytes) -> None:
    arrival = arrived(content, series, run.desk)
    if arrival is not None and run.spool.put(run.desk.keys.uid(series.uid), run.desk.keys.uid(series.study), arrival):
        run.came += 1
        _tell(run)


def _tell(run: Retrieval) -> None:
    run.done += 1
    run.total = max(run.total, run.done)
    run.tell(Progress("retrieving", run.done, run.total))


# Settle: count a study.


def _settle(run: Retrieval, plan: _Plan) -> bool:
    """Record whether a study is complete; False if the query names nothing of it."""
    study = run.desk.keys.uid(plan.study.uid)
    if plan.wanted is None:
        run.spool.settle(study, Tally(plan.study.said, max(1, plan.study.said or 0), 0, plan.trouble), None)
        return True
    here = {name: run.spool.count(name) for name in plan.expected}
    lacking = sum(max(0, number - here[name]) for name, number in plan.expected.items()) + plan.unlisted
    surplus = sum(max(0, here[run.desk.keys.uid(one.uid)] - one.said) for one in plan.wanted if one.said is not None)
    run.spool.settle(study, Tally(plan.study.said, lacking, surplus, plan.trouble), plan.expected)
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
