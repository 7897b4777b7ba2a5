"""Labels from the text of reports, and how far they can be trusted.

Rules:
  * A class is affirmed by a mention that is there, now, in the patient. The first class of the site file that a report
    affirms is its label.
  * A class that a report only holds possible, or that lies in the past, makes the label uncertain unless a class before
    it is affirmed: uncertain images go to quarantine.
  * Several reports of one image must say the same.
  * Precision and recall are measured on a sample that a person has labelled without seeing what the rules say.
  * The text of a report is read here and goes nowhere else: into no catalog, no log, no error.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from locum.common.canonical import digest
from locum.common.durable import replace_file
from locum.common.errors import DataError
from locum.common.intervals import Interval, wilson
from locum.common.names import suggestion
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys, keyed
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.labels.negation import Status, looked_for, plain, rules
from locum.site_client.imaging.labels.tables import Named, keyed_name
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sheets import Row, Sheet, read_sheet
from locum.site_client.imaging.sources import Labels, ReportLabels
from locum.site_client.imaging.terminology import Terminology

FILE_NAME = "reports.json"
#: The column of a reviewed sample that holds what the person says.
LABEL = "label"


@dataclass(frozen=True)
class Verdict:
    """What one report says.

    Attributes:
        name: the class, or None.
        phrases: the phrases that affirm it.
        doubtful: the class that the report leaves open, or empty.
    """

    name: str | None
    phrases: tuple[str, ...] = ()
    doubtful: str = ""


@dataclass(frozen=True)
class Measured:
    """How the rules did for one class, on reviewed reports.

    Attributes:
        right: reports that rules and person give the class.
        wrong: those that only the rules give it.
        missed: those that only the person gives it, uncertain ones included.
    """

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float | None:
        """The share of what the rules give the class that is right; None if they give it to none."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else None

    @property
    def recall(self) -> float | None:
        """The share of what is of the class that the rules give it; None if there is none."""
        return self.right / (self.right + self.missed) if self.right + self.missed else None

    @property
    def precision_interval(self) -> Interval | None:
        """95 % (Wilson)."""
        return wilson(self.right, self.right + self.wrong)

    @property
    def recall_interval(self) -> Interval | None:
        """95 % (Wilson)."""
        return wilson(self.right, self.right + self.missed)

    def as_dict(self) -> dict[str, object]:
        """Counts, shares and intervals."""
        intervals = {"precision_interval": self.precision_interval, "recall_interval": self.recall_interval}
        return asdict(self) | {"precision": self.precision, "recall": self.recall} | intervals


@dataclass(frozen=True)
class Review:
    """What the reviewed sample says of the rules.

    Attributes:
        reports: reviewed.
        uncertain: those of them that the rules leave open.
        classes: by class.
    """

    reports: int
    uncertain: int
    classes: dict[str, Measured]

    def as_dict(self) -> dict[str, object]:
        """As plain data."""
        classes = {name: each.as_dict() for name, each in self.classes.items()}
        return {"reports": self.reports, "uncertain": self.uncertain, "classes": classes}


class ReportBook:
    """The labels of a table of reports."""

    def __init__(self, labels: ReportLabels, keys: Keys, terms: Terminology | None = None) -> None:
        self._labels = labels
        self._keys = keys
        self._terms = terms
        self._rules = rules(labels.words)
        self._phrases = looked_for(phrase for phrases in labels.findings.values() for phrase in phrases)
        self._class = {plain(phrase): name for name, phrases in labels.findings.items() for phrase in phrases}
        self._rows = report_rows(labels)
        as_table = Labels(
            file=labels.file, key=labels.key, key_column=labels.key_column, label_column=labels.text_column
        )
        self._named = Named(as_table, self._rows, keys)

    def label(self, unit: Unit) -> Label:
        """The label of an image.

        Raises:
            RefusedError: no_label, uncertain_label or conflicting_labels.
        """
        rows = self._named.of(unit)
        if not rows:
            raise RefusedError(Reason.NO_LABEL, "no report")
        found = [self._decided(row) for row in rows]
        names = sorted({verdict.name for verdict in found if verdict.name is not None})
        if len(names) > 1:
            lines = ", ".join(str(row.line) for row in rows)
            raise RefusedError(Reason.CONFLICTING_LABELS, f"{', '.join(names)} in lines {lines}")
        codes = {code for verdict in found for phrase in verdict.phrases for code in self._codes(phrase)}
        return Label(names[0], tuple(sorted(codes)))

    def unmatched(self) -> list[str]:
        """As :class:`Named` has it."""
        return self._named.unmatched()

    def verdict(self, report: str) -> Verdict:
        """What the text of a report says."""
        affirmed: dict[str, list[str]] = {}
        doubtful: set[str] = set()
        for phrase, status in self._rules.mentions(report, self._phrases):
            name = self._class[phrase]
            if status == _THERE:
                affirmed.setdefault(name, []).append(phrase)
                if name == next(iter(self._labels.findings)):
                    break  # no other class can come before it
            elif _leaves_open(status):
                doubtful.add(name)
        for name in self._labels.findings:
            if name in affirmed:
                return Verdict(name, tuple(sorted(set(affirmed[name]))))
            if name in doubtful:
                return Verdict(None, doubtful=name)
        return Verdict(self._labels.otherwise)

    def tally(self) -> Counter[str]:
        """Lines by the class they get; `uncertain` and `without a finding` are no classes."""
        return Counter(_word(self.verdict(row.cells[self._labels.text_column])) for row in self._rows)

    def review(self) -> Review | None:
        """How the rules do on the reviewed sample; None if the site has none.

        Raises:
            DataError: the sample cannot be read, names no report, or holds a label that is no class.
        """
        if self._labels.reviewed is None:
            return None
        pairs = list(self._reviewed(reviewed_rows(self._labels)))
        if not pairs:
            raise DataError(
                f"no line of {self._labels.reviewed} names a report of {self._labels.file} and has a label",
                f"fill the column '{LABEL}'; by {self._labels.key_column} both files must name the same",
            )
        said = [(self.verdict(report), person) for report, person in pairs]
        return Review(
            reports=len(said),
            uncertain=sum(bool(verdict.doubtful) for verdict, _ in said),
            classes={name: _measured(name, said) for name in _classes(self._labels)},
        )

    def sample(self, number: int) -> str:
        """A table of so many reports to review, drawn with the site's key: the same at every call, and blind.

        Raises:
            DataError: there are no reports.
        """
        if not self._rows:
            raise DataError(f"{self._labels.file} holds no report", "check text_column in the site file")
        text, name = self._labels.text_column, self._labels.key_column
        drawn = sorted(self._rows, key=lambda row: keyed(self._keys.names, "sample", f"{row.cells[name]}\n{row.line}"))
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow([name, LABEL, text])
        writer.writerows([row.cells[name], "", row.cells[text]] for row in drawn[:number])
        return out.getvalue()

    def as_dict(self) -> dict[str, object]:
        """What readiness is told of the rules: which they are, and how they did."""
        words, review = self._rules.words, self.review()
        asked = {"findings": {name: list(each) for name, each in self._labels.findings.items()}}
        return {
            "words": {"name": words.name, "version": words.version, "language": words.language},
            "digest": digest(asked | {"otherwise": self._labels.otherwise, "words": words.model_dump(mode="json")}),
            "reports": len(self._rows),
            "review": None if review is None else review.as_dict(),
        }

    def _decided(self, row: Row) -> Verdict:
        verdict = self.verdict(row.cells[self._labels.text_column])
        if verdict.doubtful:
            raise RefusedError(Reason.UNCERTAIN_LABEL, f"{verdict.doubtful} in line {row.line}")
        if verdict.name is None:
            raise RefusedError(Reason.NO_LABEL, f"no finding is affirmed in line {row.line}")
        return verdict

    def _codes(self, phrase: str) -> tuple[str, ...]:
        entry = self._terms.lookup(phrase) if self._terms is not None else None
        return entry.codes if entry is not None and entry.name == self._class[phrase] else ()

    def _reviewed(self, sheet: Sheet) -> Iterator[tuple[str, str]]:
        """(report, what the person says) of each reviewed line."""
        labels, text = self._labels, self._labels.text_column
        reports: dict[str, list[str]] = {}
        for row in self._rows:
            name = keyed_name(row.cells[labels.key_column], labels.key, self._keys)
            reports.setdefault(name, []).append(row.cells[text])
        known = _classes(labels)
        for row in sheet.rows:
            person = row.cells[LABEL]
            if person and person not in known:
                raise DataError(
                    f"{sheet.file}, line {row.line}, column '{LABEL}': '{person}' is no class",
                    suggestion(person, known),
                )
            name = keyed_name(row.cells[labels.key_column], labels.key, self._keys)
            # The sample carries the report that was read: of several under one name it is that one.
            read = [row.cells[text]] if text in sheet.columns else reports.get(name, [])
            if person and name in reports and len(read) == 1:
                yield read[0], person


_THERE = Status()


def _leaves_open(status: Status) -> bool:
    """Whether a mention neither affirms nor denies: possible, or of the patient's past."""
    if status.experiencer == "other" or status.temporality == "hypothetical":
        return False
    return status.certainty == "possible" or (status.certainty == "affirmed" and status.temporality == "historical")


def report_rows(labels: ReportLabels) -> tuple[Row, ...]:
    """The lines that hold a report; raises DataError as :func:`read_sheet`, or if a column is absent."""
    sheet = read_sheet(labels.file)
    sheet.require([labels.key_column, labels.text_column])
    return tuple(row for row in sheet.rows if row.cells[labels.text_column])


def reviewed_rows(labels: ReportLabels) -> Sheet:
    """The reviewed sample; raises DataError as :func:`read_sheet`, or if a column is absent."""
    if labels.reviewed is None:
        raise DataError("the site file names no reviewed sample", "draw one: locum site labels SITE.yaml --sample 200")
    sheet = read_sheet(labels.reviewed)
    sheet.require([labels.key_column, LABEL])
    return sheet


def keep(book: ReportBook, store: Path) -> None:
    """Write beside the catalog what readiness is told of the rules."""
    replace_file(store / FILE_NAME, json.dumps(book.as_dict(), indent=2).encode())


def write_sample(content: str, file: Path) -> None:
    """Write a sample for its owner alone; raises DataError if the file is there already or cannot be written."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise DataError(
            f"{file} is there already", "name another file with --out: a review is not overwritten"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}", "name another place with --out") from None
    with os.fdopen(descriptor, "w", encoding="utf-8-sig", newline="") as out:
        out.write(content)


def _classes(labels: ReportLabels) -> tuple[str, ...]:
    return (*labels.findings, *filter(None, [labels.otherwise]))


def _measured(name: str, said: Sequence[tuple[Verdict, str]]) -> Measured:
    pairs = Counter((verdict.name == name, person == name) for verdict, person in said)
    return Measured(right=pairs[True, True], wrong=pairs[True, False], missed=pairs[False, True])


def _word(verdict: Verdict) -> str:
    return verdict.name or ("uncertain" if verdict.doubtful else "without a finding")
