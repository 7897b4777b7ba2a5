"""Checks of cohort questions: each was signed by the federation, each answer by the site that it is said to be of."""

from __future__ import annotations

from locum.common.audit.rules import Rule, Wrong
from locum.common.audit.standing import Standing
from locum.common.cohort import Query, check_fits, open_answer, open_question
from locum.common.envelope import EnvelopeError
from locum.common.log.entries import AnswerEntry, QuestionEntry


def _asked(standing: Standing, entry: QuestionEntry) -> None:
    try:
        question, query = open_question(entry.statement.encode(), standing.anchors.log_key)
    except EnvelopeError as error:
        raise Wrong(f"a cohort question does not count: {error}", "somebody else than the federation asked") from error
    if question.digest != entry.question:
        raise Wrong("a cohort question is another than its entry says", "the sites were asked something else")
    standing.questions[entry.question] = query


def _answered(standing: Standing, entry: AnswerEntry) -> None:
    query, member = standing.questions.get(entry.question), standing.members.get(entry.site)
    if query is None:
        raise Wrong(f"{entry.site} answers a question that was not asked", "entries are missing, or were put in")
    if member is None or member.revoked or entry.certificate not in member.certificates:
        raise Wrong(
            f"the answer of {entry.site} is under a certificate that it does not have, or not any more",
            "nobody can say that this hospital told it",
        )
    _check(standing, entry, query)
    known = entry.question, member.key
    if known in standing.answered:
        raise Wrong(f"{entry.site} answers one question twice", "one of the answers was put in")
    standing.answered.add(known)


def _check(standing: Standing, entry: AnswerEntry, query: Query) -> None:
    key = standing.anchors.key_of(entry.certificate)
    if key is None:
        raise Wrong(f"the certificate of {entry.site} is not in the bundle", "what this site signed cannot be checked")
    try:
        answer = open_answer(entry.statement.encode(), key)
        check_fits(answer, query)
    except EnvelopeError as error:
        raise Wrong(f"the answer of {entry.site} does not count: {error}", "the answer is forged") from error
    if answer.site != entry.site:
        raise Wrong(f"the answer of {entry.site} is of {answer.site}", "one site would pass for another")


def _all(standing: Standing) -> str:
    if not standing.questions:
        return "no site was asked"
    return f"{len(standing.questions)} questions, {len(standing.answered)} answers"


RULES = (Rule(20, "cohort questions and answers are signed", _all, {
    QuestionEntry: _asked, AnswerEntry: _answered,
}),)  # fmt: skip
