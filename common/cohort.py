"""A cohort question: how many patients each site has who fit a description. Declarative, signed, answered by the site.

Rules:
  * A question is data, as a plan is: unknown keys are errors, with line and remedy. Its digest is that of its canonical
    form (RFC 8785), every default written out.
  * It counts patients who have a case that fits, never cases: one case must fit all of `where` and the group.
  * An answer holds numbers by cell, and nothing else of a patient. A cell that is not told is null or is not there: it
    has fewer patients than the site's least cell, none included, or its number would tell of so few.
  * A question is signed by the federation's log key, an answer by the site. An answer names its site and the digest of
    its question: it is none to another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from locum.common.canonical import digest
from locum.common.envelope import Digest, EnvelopeError, Person, Time, seal, unseal
from locum.common.errors import DataError
from locum.common.identity import PrivateKey, PublicKey, SiteName
from locum.common.names import suggestion
from locum.common.plan import AGE_BANDS, Coded, Months, Slug
from locum.common.yaml_source import Location, Source, YamlError, parse_yaml, read_yaml

QUESTION, ANSWER = "question", "answer"
#: Beyond so many cells an answer does not fit into an entry of the log.
MOST_CELLS = 500
_MOST_EDGES = 24

By = Literal["sex", "age", "vendor", "modality", "body_part", "year", "code", "label"]
#: DICOM keywords of numbers that a catalog keeps of a series.
Keyword = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z]{1,39}$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
Sex = Literal["F", "M", "O"]
AgeBand = Literal["0-17", "18-39", "40-64", "65-89", "90+"]
_SEXES = get_args(Sex)
if get_args(AgeBand) != AGE_BANDS:
    raise AssertionError("the bands of age are those of a plan")


def vendor_of(manufacturer: str) -> str:
    """The maker of a scanner in one word, the same at all sites: the first of what DICOM says, in capitals."""
    words = manufacturer.upper().replace("_", " ").replace(",", " ").split()
    return "GE" if words[:2] == ["GENERAL", "ELECTRIC"] else "".join(words[:1])


def _growing(edges: tuple[float, ...]) -> tuple[float, ...]:
    if list(edges) != sorted(set(edges)):
        raise ValueError("the edges of bins grow")
    return edges


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("one thing stands there twice")
    return names


Edges = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], ...],
    Field(min_length=2, max_length=_MOST_EDGES),
    AfterValidator(_growing),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Strict):
    """Bounds of a number, both included; null does not bound."""

    least: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least is None and self.most is None:
            raise ValueError("give 'least', 'most' or both")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError("'least' is larger than 'most'")
        return self


class Where(_Strict):
    """Which cases fit; what is left empty fits every case.

    Attributes:
        modality: as DICOM has them, such as CT.
        body_part: values of Body Part Examined.
        code: standard codes, of which a case must have one.
        label: the site's classes.
        vendor: makers of the scanner, as :func:`vendor_of` names them.
        months: when the studies were made, YYYY-MM.
        spacing: of the voxels along every axis, in mm.
        parameters: by DICOM keyword, in ms, degrees, tesla, mm, kV.
    """

    modality: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2,16}$")], ...] = ()
    body_part: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9 _]{0,15}$")], ...] = ()
    code: tuple[Coded, ...] = ()
    label: tuple[Text, ...] = ()
    sex: tuple[Sex, ...] = ()
    age: tuple[AgeBand, ...] = ()
    vendor: tuple[Annotated[Text, AfterValidator(vendor_of)], ...] = ()
    months: Months = Months()
    spacing: Range | None = None
    parameters: dict[Keyword, Range] = Field(default_factory=dict, max_length=16)


@dataclass(frozen=True)
class Dimension:
    """What the patients of a table are told apart by.

    Attributes:
        by: an attribute, or the DICOM keyword of a parameter.
        values: those that there can be; None if whoever asks does not know them.
        edges: of a parameter, where its bins begin and end: [edge, next edge).
    """

    by: str
    values: tuple[str, ...] | None
    edges: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table of an answer; without a dimension it has one cell.

    Attributes:
        sparse: whether only cells that are told are listed.
    """

    name: str
    dimensions: tuple[Dimension, ...] = ()
    sparse: bool = False

    @property
    def keys(self) -> tuple[tuple[str, ...], ...] | None:
        """Every cell that is listed, in order; None for those that are told."""
        listed = self._listed
        return None if listed is None else tuple(itertools.product(*listed))

    @property
    def size(self) -> int:
        """How many cells are listed; none of them is made."""
        return math.prod(map(len, self._listed)) if self._listed is not None else 0

    @property
    def _listed(self) -> list[tuple[str, ...]] | None:
        values = [dimension.values for dimension in self.dimensions if dimension.values is not None]
        return None if self.sparse or len(values) < len(self.dimensions) else values


class Query(_Strict):
    """What is asked.

    Attributes:
        name: of the question.
        study: for which study it is asked.
        purpose: why, in words; stewards read it.
        where: which cases fit.
        group_by: by what the patients are told apart, at most two.
        describe: by keyword of at most three parameters the edges of bins: of each maker, how many patients have a case
            in each combination of them.
        edition: another number asks the same again, of the data as they are then.
    """

    name: Slug
    study: Slug
    purpose: Annotated[str, StringConstraints(min_length=1, max_length=400)]
    where: Where = Where()
    group_by: Annotated[tuple[By, ...], AfterValidator(_different)] = Field((), max_length=2)
    describe: dict[Keyword, Edges] = Field(default_factory=dict, max_length=3)
    edition: int = Field(1, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "code" in self.group_by and not self.where.code:
            raise ValueError("group_by has code: name the codes in where")
        cells = sum(table.size for table in self.tables)
        if cells > MOST_CELLS:
            raise ValueError(f"this has {cells} cells, and an answer has at most {MOST_CELLS}")
        return self

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the canonical form."""
        return digest(self.model_dump(mode="json"))

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The tables of an answer, the finest first: a number that follows from others is told last."""
        vendor = self._dimension("vendor")
        bins = tuple(Dimension(keyword, bins_of(edges), edges) for keyword, edges in sorted(self.describe.items()))
        described = (Table("protocol", (vendor, *bins), sparse=True),) if bins else ()
        return (*described, Table("patients", tuple(self._dimension(by) for by in self.group_by)))

    def _dimension(self, by: str) -> Dimension:
        asked = getattr(self.where, by, ())
        if by in {"sex", "age"}:
            return Dimension(by, asked or {"sex": _SEXES, "age": AGE_BANDS}[by])
        if by == "year":
            return Dimension(by, _years(self.where.months))
        return Dimension(by, asked or None)

    def predicate(self, table: Table, key: tuple[str, ...]) -> str:
        """A cell's name: the same wherever the same patients are asked about."""
        where: dict[str, Any] = self.where.model_dump(mode="json")
        for dimension, value in zip(table.dimensions, key, strict=True):
            if dimension.edges or dimension.by == "year":
                where[f"{dimension.by} in"] = value
            else:
                where[dimension.by] = [value]
        return digest(where)


def bins_of(edges: tuple[float, ...]) -> tuple[str, ...]:
    """The names of the bins between edges."""
    return tuple(f"{low} to {high}" for low, high in itertools.pairwise(map(_written, edges)))


def _written(number: float) -> str:
    """A number as short as it can be told from every other."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _years(months: Months) -> tuple[str, ...] | None:
    if months.first is None or months.last is None:
        return None
    return tuple(f"{year:04d}" for year in range(int(months.first[:4]), int(months.last[:4]) + 1))


# --- files


def load_query(path: Path) -> Query:
    """Reads and validates a QUERY.yaml; raises DataError."""
    try:
        return _validated(read_yaml(path))
    except YamlError as error:
        raise DataError(str(error), "mend the YAML at that line") from error
    except FileNotFoundError as error:
        raise DataError(f"there is no question at {path}", "give the path of a QUERY.yaml") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "give the path of a QUERY.yaml") from error


def parse_query(content: bytes, name: str = "QUERY.yaml") -> Query:
    """Validates a question given as YAML; raises DataError."""
    try:
        return _validated(parse_yaml(content, name))
    except YamlError as error:
        raise DataError(str(error), "mend the YAML at that line") from error


def _validated(source: Source) -> Query:
    if not isinstance(source.data, Mapping):
        raise DataError(f"{source.name}: a question is a mapping", "start from the example in docs/cohort.md")
    try:
        return Query.model_validate(source.data)
    except ValidationError as error:
        raise DataError("\n".join(_problems(source, error)), "mend these and ask again") from error


def _problems(source: Source, error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        at: Location = tuple(step for step in item["loc"] if step != "[key]")
        where = f"{source.name} line {source.line(at)}: {'.'.join(map(str, at)) or 'question'}"
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key '{at[-1]}' — {suggestion(str(at[-1]), _fields_at(at[:-1]))}"
        elif item["type"] == "missing":
            yield f"{where}: this key is missing — add '{at[-1]}'"
        else:
            given = "" if isinstance(item["input"], Mapping | list | BaseModel) else f" (got {item['input']!r})"
            yield f"{where}: {item['msg'].removeprefix('Value error, ')}{given}"


def _fields_at(location: Location) -> tuple[str, ...]:
    known: dict[Location, type[BaseModel]] = {(): Query, ("where",): Where, ("where", "months"): Months}
    return tuple(known.get(location, Range).model_fields)


# --- what is signed


class Question(_Strict):
    """A query put before the sites, signed with the federation's log key.

    Attributes:
        digest: of the query.
        query: the query as plain data; its canonical JSON has the digest.
        asked_at: seconds since 1970 by the coordinator's clock; `until` when no answer is taken any more.
        by: who asks, in words.
    """

    digest: Digest
    query: dict[str, Any]
    asked_at: Time
    until: Time
    by: Person

    def parsed(self) -> Query:
        """The query; raises EnvelopeError if this version of Locum does not know it."""
        try:
            return Query.model_validate(self.query)
        except ValidationError as error:
            raise EnvelopeError("this version of Locum does not know this question") from error


class Told(_Strict):
    """A cell of an answer: in which of the question's tables, its key there, how many patients or null."""

    table: int = Field(ge=0, le=16)
    key: tuple[Text, ...] = Field(max_length=4)
    patients: int | None = Field(None, ge=1, lt=1 << 53)


class Answer(_Strict):
    """What a site answers, signed with its key.

    Attributes:
        site: who answers; `question` the digest of the query.
        at: seconds since 1970 by the site's clock.
        least_cell: the site's: cells of fewer patients are not told.
        cells: in order. Of a table whose cells are known beforehand all, of another those that are told.
        refused: the key of the site's policy by which it does not answer, or null.
    """

    site: SiteName
    question: Digest
    at: Time
    least_cell: int = Field(ge=1, lt=1 << 53)
    cells: tuple[Told, ...] = Field((), max_length=MOST_CELLS)
    refused: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        places = [(cell.table, cell.key) for cell in self.cells]
        if len(set(places)) < len(places):
            raise ValueError("one cell is told twice")
        if self.refused is not None and self.cells:
            raise ValueError("it is refused, and answered")
        if any(cell.patients is not None and cell.patients < self.least_cell for cell in self.cells):
            raise ValueError("a cell has fewer patients than the least")
        return self

    def numbers(self, table: int) -> dict[tuple[str, ...], int]:
        """What is told of a table, by key."""
        return {cell.key: cell.patients for cell in self.cells if cell.table == table and cell.patients is not None}


def seal_question(question: Question, key: PrivateKey) -> bytes:
    """Signs a question; raises EnvelopeError."""
    return seal(QUESTION, question.model_dump(mode="json"), key)


def open_question(content: bytes, key: PublicKey) -> tuple[Question, Query]:
    """A question, verified, and its query, which has the digest; raises EnvelopeError."""
    try:
        question = Question.model_validate(unseal(content, QUESTION, key))
    except ValidationError as error:
        raise EnvelopeError("this question has other fields than a question") from error
    query = question.parsed()
    if query.digest != question.digest:
        raise EnvelopeError("the question does not have the digest that it names")
    return question, query


def seal_answer(answer: Answer, key: PrivateKey) -> bytes:
    """Signs an answer; raises EnvelopeError."""
    return seal(ANSWER, answer.model_dump(mode="json"), key)


def open_answer(content: bytes, key: PublicKey) -> Answer:
    """An answer, verified; raises EnvelopeError."""
    try:
        return Answer.model_validate(unseal(content, ANSWER, key))
    except ValidationError as error:
        raise EnvelopeError("this answer has other fields than an answer") from error


def check_fits(answer: Answer, query: Query) -> None:
    """Raises EnvelopeError if an answer is to another question, or has cells that were not asked for."""
    if answer.question != query.digest:
        raise EnvelopeError("this is the answer to another question")
    for cell in answer.cells:
        if cell.table >= len(query.tables):
            raise EnvelopeError("this answer has a table that was not asked for")
        dimensions = query.tables[cell.table].dimensions
        if len(cell.key) != len(dimensions) or any(
            dimension.values is not None and value not in dimension.values
            for dimension, value in zip(dimensions, cell.key, strict=False)
        ):
            raise EnvelopeError("this answer has a cell that was not asked for")
