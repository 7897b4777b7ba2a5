"""What a site holds to in secure sums, whatever the coordinator asks: each test is a promise to a hospital."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from locum.common.errors import Code
from locum.common.fab import build_bundle
from locum.common.identity import base64url, utc_now
from locum.common.messages import (
    BEGIN,
    DESCRIBE,
    EVALUATE,
    KEYS,
    PAIRS,
    TRAIN,
    UNMASK,
    BeginTask,
    DescribeTask,
    EvaluateTask,
    Inline,
    KeysTask,
    MaskedResult,
    PairsResult,
    PairsTask,
    Secured,
    TrainTask,
    UnmaskTask,
    assemble,
    unpack,
)
from locum.common.plan import Plan
from locum.common.secagg.model import seal_bytes
from locum.common.secagg.ring import read_scalars
from locum.common.secagg.roster import Context, sign
from locum.common.secagg.site import Announced, Joined, Ready, mask
from locum.common.tensor_files import Sendable, in_memory
from locum.site_client.agent import Agent
from locum.site_client.fleet import Incoming, RunOf, to_bytes
from locum.site_client.journal import Journal
from locum.site_client.secure import Rounding, drawn, seeded
from locum.site_client.vault import Vault
from tests.plans import plan, secured
from tests.site_client.asking import failure, message
from tests.site_client.circle import NAMES, RUN, Circle, answered, fold

REFUSED = (Code.SECURE_SUM_REFUSED, "SECURE_SUM_REFUSED")
UNKNOWN = (Code.SETUP_UNKNOWN, "SETUP_UNKNOWN")
FOUR = ("harbour", "hill", "north", "riverside")


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    """Three sites that are ready for sums."""
    return Circle(tmp_path).set_up()


def _scalars(total: Any, circle: Circle) -> dict[str, np.ndarray]:
    return read_scalars(total.layout.lane, total.scalars, len(circle.roster.members))


def test_what_the_sites_give_is_read_as_their_sum(circle: Circle) -> None:
    for name, value in zip(NAMES, (0.01, 0.02, -0.05), strict=True):
        circle.hands[name].value = value
    total = circle.unmasked(circle.collected(circle.context()))
    weight = 10 / circle.of.admission.weight_cap
    assert total.layout.ring.read(total.update) == pytest.approx(-0.02 * weight, abs=3 / total.layout.ring.scale)
    found = _scalars(total, circle)
    assert found["weight"] == pytest.approx([3 * weight])
    assert found["loss"] == pytest.approx([3 * weight * 0.5])


# --- how many sites


def test_a_roster_below_min_sites_is_refused(tmp_path: Path) -> None:
    circle = Circle(tmp_path, policies={"north": {"min_sites": 4}})
    offer = circle.offered(circle.announced())
    assert failure(circle.ask("north", PAIRS, offer)) == (Code.POLICY_REFUSED, "POLICY_REFUSED min_sites")
    assert isinstance(Vault(tmp_path / "north" / "secagg").state(RUN), Announced)
    circle.told("harbour", PAIRS, offer, PairsResult)


def test_a_roster_cannot_be_made_to_look_larger_than_it_is(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR, policies={"north": {"min_sites": 4}})
    announced = circle.announced()
    offer = circle.offered({name: announced[name] for name in NAMES})
    padded = offer.model_copy(
        update={
            "keys": {name: one.keys for name, one in announced.items()},
            "certificates": {name: one.certificate for name, one in announced.items()},
        }
    )
    assert failure(circle.ask("north", PAIRS, padded)) == REFUSED


def test_a_sum_below_min_sites_is_not_unmasked(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR, policies={"north": {"min_sites": 4}}).set_up()
    assert circle.roster.threshold == 3
    total = circle.collected(circle.context(), NAMES)
    assert failure(circle.unmask("north", total)) == (Code.POLICY_REFUSED, "POLICY_REFUSED min_sites")
    answered(circle.unmask("harbour", total))


def test_survivors_that_are_no_sites_do_not_count(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR, policies={"north": {"min_sites": 4}}).set_up()
    total = circle.collected(circle.context(), NAMES)
    invented = {**total.headers, "hill": total.headers["north"]}
    task = UnmaskTask(plan_digest=circle.of.digest, context=sign(total.context, circle.log), uploads=invented)
    boxes = np.concatenate([total.boxes_for("north"), total.boxes_for("north")[:1]])
    assert failure(circle.ask("north", UNMASK, task, {"boxes": boxes})) == REFUSED


def test_fewer_survivors_than_the_threshold_are_refused_whatever_the_policy(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=(*FOUR, "valley")).set_up()
    assert circle.roster.threshold == 4
    total = circle.collected(circle.context(), NAMES)
    assert failure(circle.unmask("north", total)) == REFUSED


# --- who is in it


def _refuses(circle: Circle, offer: PairsTask) -> None:
    assert failure(circle.ask("north", PAIRS, offer)) == REFUSED
    assert isinstance(Vault(circle.folder / "north" / "secagg").state(RUN), Announced)


def test_a_roster_that_the_federation_has_not_signed_is_refused(tmp_path: Path) -> None:
    circle = Circle(tmp_path)
    _refuses(circle, circle.offered(circle.announced(), key=Ed25519PrivateKey.generate()))


def test_a_member_of_another_authority_is_refused(tmp_path: Path) -> None:
    circle, elsewhere = Circle(tmp_path / "here"), Circle(tmp_path / "elsewhere", names=("stranger",))
    _refuses(circle, circle.offered({**circle.announced(), **elsewhere.announced()}))


def test_a_certificate_whose_time_is_over_by_the_coordinators_clock_is_refused(tmp_path: Path) -> None:
    circle = Circle(tmp_path)
    offer = circle.offered(circle.announced())
    agent = circle.agents["north"]
    agent.secure = replace(agent.secure, now=lambda: utc_now() + timedelta(days=365))
    _refuses(circle, offer)


def test_a_roster_that_holds_other_keys_of_this_site_is_refused(tmp_path: Path) -> None:
    circle = Circle(tmp_path)
    offer = circle.offered(circle.announced())
    circle.announced()  # it has new keys now
    _refuses(circle, offer)


def test_steps_of_a_set_up_out_of_their_order_are_refused(circle: Circle) -> None:
    offer = circle.offered(circle.announced())
    halves = BeginTask(plan_digest=circle.of.digest, run=RUN, pairs={})
    assert failure(circle.ask("north", BEGIN, halves)) == UNKNOWN
    circle.told("north", PAIRS, offer, PairsResult)
    assert failure(circle.ask("north", PAIRS, offer)) == UNKNOWN
    assert failure(circle.ask("north", BEGIN, halves)) == REFUSED
    assert failure(circle.give("north", circle.context())) == UNKNOWN


def test_a_set_up_of_another_run_is_refused(circle: Circle) -> None:
    task = KeysTask(plan_digest=circle.of.digest, run="run-2")
    assert failure(circle.ask("north", KEYS, task, run=RUN)) == REFUSED


# --- nothing plain


def test_a_plan_that_asks_for_secure_sums_gets_no_plain_answer_out(circle: Circle) -> None:
    digest = circle.of.digest
    plain = {
        TRAIN: TrainTask(plan_digest=digest, round=1),
        EVALUATE: EvaluateTask(plan_digest=digest, round=0, fold="test"),
    }
    for kind, task in plain.items():
        assert failure(circle.ask("north", kind, task, circle.model)) == REFUSED
    assert circle.hands["north"].asked == []


def test_a_site_that_asks_for_secure_sums_answers_nothing_of_a_plain_plan(tmp_path: Path) -> None:
    of = plan()
    circle = Circle(tmp_path, of, policies={"north": {"require_secure_aggregation": True}})
    tasks = {
        DESCRIBE: DescribeTask(plan_digest=of.digest),
        TRAIN: TrainTask(plan_digest=of.digest, round=1),
        EVALUATE: EvaluateTask(plan_digest=of.digest, round=0, fold="test"),
    }
    for kind, task in tasks.items():
        found = failure(circle.ask("north", kind, task, circle.model if kind != DESCRIBE else None))
        assert found == (Code.POLICY_REFUSED, "POLICY_REFUSED require_secure_aggregation")
    assert circle.hands["north"].asked == []


def test_a_plain_plan_has_no_set_up(tmp_path: Path) -> None:
    circle = Circle(tmp_path, plan())
    assert failure(circle.ask("north", KEYS, KeysTask(plan_digest=circle.of.digest, run=RUN))) == REFUSED


# --- what nobody can look at later is looked at here


def _worse(circle: Circle, **changes: Any) -> None:
    for key, value in changes.items():
        if key in {"loss", "cases"}:
            circle.hands["north"].done[key] = value
        else:
            setattr(circle.hands["north"], key, value)


@pytest.mark.parametrize(
    "changes",
    [{"value": np.nan}, {"value": np.inf}, {"value": 1e3}, {"loss": np.nan}, {"loss": 1e12}, {"loss": -1e12}],
    ids=str,
)
def test_a_bad_update_stops_at_the_site_before_a_step_is_spent(changes: dict[str, Any], circle: Circle) -> None:
    before = circle.state_file("north").read_bytes()
    _worse(circle, **changes)
    assert failure(circle.give("north", circle.context())) == (Code.UPDATE_REFUSED, "UPDATE_REFUSED")
    assert circle.state_file("north").read_bytes() == before
    _worse(circle, value=0.01, loss=0.5)
    circle.unmasked(circle.collected(circle.context()))


@pytest.mark.parametrize("cases", [2.0**32 + 1, np.inf, np.nan])
def test_a_count_beyond_its_bound_stops_at_the_site_before_a_step_is_spent(cases: float, circle: Circle) -> None:
    before = circle.state_file("north").read_bytes()
    context = circle.context(purpose="test", round=0)
    circle.hands["north"].cases = cases
    assert failure(circle.give("north", context)) == (Code.UPDATE_REFUSED, "UPDATE_REFUSED")
    assert circle.state_file("north").read_bytes() == before
    circle.hands["north"].cases = 4
    circle.unmasked(circle.collected(context))


def test_a_site_with_more_cases_than_the_cap_weighs_no_more_than_one(circle: Circle) -> None:
    circle.hands["north"].done["cases"] = 10**9
    total = circle.unmasked(circle.collected(circle.context()))
    assert _scalars(total, circle)["weight"] == pytest.approx([1 + 2 * 10 / circle.of.admission.weight_cap])


# --- what a site tells of itself


def test_a_site_without_a_case_gives_zeros_and_its_reply_looks_like_any_other(circle: Circle) -> None:
    circle.hands["north"].cases = 0
    context = circle.context(purpose="validation")
    replies = {name: circle.give(name, context) for name in NAMES}
    total = circle.open_sum(context)
    for name, reply in replies.items():
        fold(total, name, reply)
    assert _scalars(circle.unmasked(total), circle)["cases"].tolist() == [8.0]
    forms = [_form(reply) for reply in replies.values()]
    assert forms[0] == forms[1] == forms[2]
    assert forms[0][0] == {"plan_digest": circle.of.digest, "loss": None, "cases": None, "spent": None}


def _form(reply: Any) -> Any:
    """A reply without what is masked, sealed or signed: header, and names and shapes of the tensors."""
    header, tensors = unpack(answered(reply), MaskedResult)
    shapes = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
    return header.model_dump(exclude={"upload"}), shapes


_FLAGS = ("release_case_counts", "release_training_loss", "release_site_metrics")
_WHATS = ("case_counts", "training_loss", "metrics")


@pytest.mark.parametrize("allowed", range(8))
@pytest.mark.parametrize("asked", range(8))
def test_a_site_tells_of_itself_what_plan_and_policy_both_say_and_nothing_else(
    asked: int, allowed: int, tmp_path: Path
) -> None:
    of = secured(release={"per_site": [what for bit, what in enumerate(_WHATS) if asked >> bit & 1]})
    policy = {flag: bool(allowed >> bit & 1) for bit, flag in enumerate(_FLAGS)}
    circle = Circle(tmp_path, of, policies={"north": policy}).set_up()
    cases, loss, metrics = (bool((asked & allowed) >> bit & 1) for bit in range(3))

    header, tensors = _form(circle.give("north", circle.context(1)))
    assert (header["cases"], header["loss"]) == (10 if cases else None, 0.5 if loss else None)
    assert set(tensors) == {"scalars", "update", "boxes", "commitments"}

    header, tensors = _form(circle.give("north", circle.context(2, purpose="test", round=0)))
    assert (header["cases"], header["loss"]) == (4 if cases else None, None)
    told = {"told.AUC", "told.accuracy"} if metrics else set()
    assert set(tensors) == {"scalars", "boxes", "commitments"} | told


def test_what_the_plan_does_not_release_is_in_no_sum(tmp_path: Path) -> None:
    release = {"metrics": ["accuracy"], "training_loss": False, "case_counts": False}
    circle = Circle(tmp_path, secured(release=release, participation__weighting="equal")).set_up()
    total = circle.unmasked(circle.collected(circle.context()))
    assert set(_scalars(total, circle)) == {"weight"}
    total = circle.unmasked(circle.collected(circle.context(2, purpose="test", round=0)))
    assert set(_scalars(total, circle)) == {"accuracy"}


def test_what_a_real_worker_finds_goes_into_the_sums_and_a_fold_without_a_case_as_zeros(
    agent: Agent, tmp_path: Path
) -> None:
    of = secured(contract__split={"train": 0.6, "validation": 0.0, "test": 0.4})
    circle = Circle(tmp_path, of).set_up()
    circle.agents["north"].worker = agent.worker
    total = circle.unmasked(circle.collected(circle.context()))
    found = total.layout.ring.read(total.update)
    assert np.ptp(found) > 10 / total.layout.ring.scale  # the others' updates have one value everywhere
    cases = {
        fold: _scalars(circle.unmasked(circle.collected(circle.context(step, purpose=fold))), circle)["cases"][0]
        for step, fold in ((2, "validation"), (3, "test"))
    }
    assert cases["validation"] == 8
    assert cases["test"] > 8


# --- one model, one sum


def _train(circle: Circle, task: Any, **how: Any) -> Message:
    return circle.ask("north", TRAIN, task, model=circle.sealed_model, **how)


def _measure(circle: Circle, task: Any) -> Message:
    return circle.ask("north", EVALUATE, task, model=circle.sealed_model)


def _test(circle: Circle) -> Context:
    return circle.context(purpose="test", round=0)


#: Tasks that are not of the sum that the coordinator has signed.
_OTHERS: dict[str, Callable[[Circle], Message]] = {
    "signed with another key": lambda c: _train(c, c.task(c.context(), key=Ed25519PrivateKey.generate())),
    "another round": lambda c: _train(c, c.task(c.context(), round=2)),
    "metrics where updates are asked for": lambda c: _train(
        c, TrainTask(plan_digest=c.of.digest, round=1, secured=c.task(_test(c)).secured)
    ),
    "updates where metrics are asked for": lambda c: _measure(
        c, EvaluateTask(plan_digest=c.of.digest, round=1, fold="test", secured=c.task(c.context()).secured)
    ),
    "another fold": lambda c: _measure(c, c.task(_test(c), fold="validation")),
    "another roster": lambda c: _train(c, c.task(c.context(roster="0" * 64))),
    "another plan": lambda c: _train(c, c.task(c.context(), plan_digest=secured(seed=1).digest), of=secured(seed=1)),
    "another run": lambda c: _train(c, c.task(c.context()), run="run-2"),
    "the run by a second name": lambda c: _train(c, c.task(c.context()), run=f"../secagg/{RUN}"),
    "a step far ahead": lambda c: _train(c, c.task(c.context(20_000))),
    "no key of the model": lambda c: _train(
        c, c.task(c.context(), secured=Secured(context=sign(c.context(), c.log), keys={}))
    ),
}


@pytest.mark.parametrize("what", _OTHERS)
def test_a_task_that_is_not_of_a_signed_sum_is_refused_and_nothing_is_done(what: str, circle: Circle) -> None:
    before = circle.state_file("north").read_bytes()
    assert failure(_OTHERS[what](circle)) in {REFUSED, UNKNOWN}
    assert circle.hands["north"].asked == []
    assert circle.state_file("north").read_bytes() == before


def test_a_step_is_spent_once(circle: Circle) -> None:
    answered(circle.give("north", circle.context(2)))
    for step in (1, 2):
        assert failure(circle.give("north", circle.context(step))) == REFUSED
    assert circle.hands["north"].asked == ["train"]
    answered(circle.give("north", circle.context(3)))


@pytest.mark.parametrize("what", ["another model", "another key", "half of it", "none", "in the clear"])
def test_a_model_that_is_not_the_signed_one_is_not_used(what: str, circle: Circle) -> None:
    context, sealed = circle.context(), circle.sealed_model["tensors"]
    contents = {
        "another model": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "another key": seal_bytes(sealed, bytes(32)),
        "half of it": sealed[: len(sealed) // 2],
        "none": b"",
        "in the clear": seal_bytes(sealed, circle.content_key),
    }
    reply = circle.ask("north", TRAIN, circle.task(context), model={"tensors": contents[what]})
    assert failure(reply) == REFUSED
    assert circle.hands["north"].asked == []


def test_a_model_that_is_not_in_the_message_is_refused(circle: Circle) -> None:
    for fields in ({}, {"tensors": "text"}, {"sealed": b""}):
        assert failure(circle.ask("north", TRAIN, circle.task(circle.context()), model=fields)) == REFUSED


# --- one set of survivors


def test_a_second_set_of_survivors_is_refused_also_after_a_restart(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR).set_up()
    uploads = {name: circle.give(name, circle.context()) for name in FOUR}
    sums = {names: circle.open_sum(circle.context()) for names in (FOUR, NAMES)}
    for names, total in sums.items():
        for name in names:
            fold(total, name, uploads[name])
    answered(circle.unmask("north", sums[FOUR]))
    for _ in range(2):
        assert failure(circle.unmask("north", sums[NAMES])) == REFUSED
        answered(circle.unmask("north", sums[FOUR]))
        circle.restart("north")


def test_a_second_set_of_survivors_is_refused_under_another_roster_too(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR).set_up()
    circle.unmasked(circle.collected(circle.context(purpose="test", round=0)))
    circle.set_up(names=NAMES)
    circle.restart("north")
    total = circle.collected(circle.context(purpose="test", round=0))
    assert failure(circle.unmask("north", total)) == REFUSED
    assert failure(circle.unmask("north", total, run=f"./{RUN}")) == UNKNOWN
    circle.set_up()
    circle.unmasked(circle.collected(circle.context(purpose="test", round=0)))


def test_a_site_answers_only_for_the_sum_that_it_has_last_given_to(circle: Circle) -> None:
    first = circle.collected(circle.context(1))
    circle.collected(circle.context(2, attempt=2))
    assert failure(circle.unmask("north", first)) == REFUSED


def test_a_site_that_has_not_given_does_not_answer(tmp_path: Path) -> None:
    circle = Circle(tmp_path, names=FOUR).set_up()
    total = circle.collected(circle.context(), ("harbour", "hill", "riverside"))
    assert failure(circle.unmask("north", total)) == REFUSED


# --- a process that dies


class _Dies(Inline):
    """The agent is killed when its reply is put together."""

    def stow(self, tensors: Sendable) -> Any:
        in_memory(tensors)
        raise SystemExit


def test_keys_outlive_a_restart_at_any_step(circle: Circle) -> None:
    for name in NAMES:
        circle.restart(name)
    total = circle.collected(circle.context())
    for name in NAMES:
        circle.restart(name)
    circle.unmasked(total)


def test_masks_whose_upload_was_lost_in_a_crash_are_not_used_again(circle: Circle) -> None:
    with pytest.raises(SystemExit):
        circle.give("north", circle.context(), carrier=_Dies())
    circle.restart("north")
    assert failure(circle.give("north", circle.context())) == REFUSED
    assert circle.hands["north"].asked == ["train"]
    circle.unmasked(circle.collected(circle.context(2, attempt=2)))


def test_an_upload_that_is_in_the_journal_is_delivered_to_the_same_byte(circle: Circle, tmp_path: Path) -> None:
    context, journal = circle.context(), Journal(tmp_path / "journal")
    bundle = build_bundle(circle.of)
    asked = message(assemble(circle.task(context), circle.sealed_model), TRAIN)
    journal.begin(Incoming(asked, 1), RunOf(RUN, bundle))
    made = circle.agents["north"].handle(asked, bundle, run=RUN)
    journal.finish(made)
    circle.restart("north")
    left = Journal(tmp_path / "journal").current()
    assert left is not None
    assert left.reply is not None
    assert to_bytes(left.reply) == to_bytes(made)
    assert left.run.name == RUN
    total = circle.collected(context, ("harbour", "riverside"))
    fold(total, "north", left.reply)
    circle.unmasked(total)


# --- rounding


def test_between_hospitals_rounding_is_drawn_and_in_a_rehearsal_it_is_of_the_seed(circle: Circle) -> None:
    first, again = circle.context(), circle.context(attempt=2)

    def bits(rounding: Rounding, of: Plan, name: str, context: Context) -> bytes:
        out = np.empty(8, np.uint32)
        rounding(of, name, context).fill(out)
        return out.tobytes()

    assert bits(seeded, circle.of, "north", first) == bits(seeded, circle.of, "north", first)
    others = [(circle.of, "harbour", first), (circle.of, "north", again), (secured(seed=1), "north", first)]
    assert len({bits(seeded, *one) for one in [(circle.of, "north", first), *others]}) == 4
    assert bits(drawn, circle.of, "north", first) != bits(drawn, circle.of, "north", first)


# --- secrets


def test_no_secret_is_in_the_log_or_in_what_a_state_shows_of_itself(circle: Circle) -> None:
    vault, known = Vault(circle.folder / "north" / "secagg"), set[bytes]()
    shown = []
    for step in ("announced", "joined", "ready", "given", "refused"):
        state = _at(circle, step, vault)
        known |= _secrets(state)
        shown += [repr(state), str(state)]
    masking = mask(_ready(vault), circle.context(9))[1]
    known |= {*masking.add, *masking.subtract}
    text = "".join([*shown, repr(masking), circle.log_of("north")])
    assert len(known) > 15
    assert "refused train" in text
    forms = [form for one in known for form in (base64url(one), one.hex(), repr(one)[2:-1])]
    assert [form for form in forms if form in text] == []


def _at(circle: Circle, step: str, vault: Vault) -> Any:
    """The state of `north` after a step of a new set-up, or of a sum."""
    if step == "announced":
        circle.announced("run-2")
    elif step == "joined":
        circle.told("north", PAIRS, circle.offered(circle.announced("run-2"), "run-2"), PairsResult, run="run-2")
    elif step == "ready":
        circle.set_up("run-2")
    else:
        circle.give("north", circle.context(), run="run-2")  # the second time it is refused
    return vault.state("run-2")


def _ready(vault: Vault) -> Ready:
    state = vault.state("run-2")
    assert isinstance(state, Ready)
    return state


def _secrets(state: Any) -> set[bytes]:
    if isinstance(state, Announced):
        return {state.pairs, state.models}
    if isinstance(state, Joined):
        return {*state.drawn.values()} | _secrets(state.announced)
    return {state.models, *state.chains.values(), *state.boxes.values()}


def test_a_full_disk_is_told_for_what_it_is_and_spends_no_step(circle: Circle) -> None:
    before = circle.state_file(NAMES[0]).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file can grow beyond it, as if the disk were full
    try:
        reply = circle.give(NAMES[0], circle.context())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reply.error.code == Code.DISK_FULL
    assert circle.state_file(NAMES[0]).read_bytes() == before
    assert circle.give(NAMES[0], circle.context()).has_content()
