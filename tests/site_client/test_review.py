"""What a steward is shown: the plan in words, with nothing left out and nothing made better than it is."""

from __future__ import annotations

from typing import Any

import pytest

from locum.common.plan import DifferentialPrivacy, Plan, Protection
from locum.site_client.gate import Policy
from locum.site_client.review import plan_in_words
from tests.plans import plan, secured
from tests.site_client.asking import batch_norm_plan, segmentation_plan
from tests.site_client.enrolled import Hospital


def _words(of: Plan, section: str, **policy: Any) -> str:
    return "\n".join(plan_in_words(of, Policy.model_validate(policy))[section])


def test_a_review_names_plan_proposer_purpose_and_digest(hospital: Hospital) -> None:
    of = hospital.proposed()
    text = hospital.approvals().review(of.digest).text()
    for said in (of.digest, "plan test", "proposed by Team A, 20", "purpose: a small plan for tests", "not approved"):
        assert said in text


def test_a_review_tells_data_network_and_rounds() -> None:
    of = plan(contract__least_patients=10, contract__single_class="exclude", contract__spacing={"most": "2 mm"})
    data = _words(of, "Data")
    for said in (
        "classification of CT, 3D, 1 channel",
        "no_lesion, lesion",
        "10 patients",
        "from 0 to 2 mm",
        "RandFlipd",
    ):
        assert said in data
    assert "all of one class" in data
    assert "Classifier (channels [4, 8])" in _words(of, "Network")
    assert "SGD (lr 0.05)" in _words(of, "Network")
    rounds = _words(of, "Rounds")
    assert "2 rounds of FedAvg; in each, 2 steps of 4 cases" in rounds
    assert "at least 2 sites" in rounds
    assert "up to 1 min" in rounds
    assert "3 epochs" in _words(plan(training__local_steps=None, training__local_epochs=3), "Rounds")
    assert "segmentation of CT" in _words(segmentation_plan(), "Data")


def test_no_protection_is_said_in_the_first_word() -> None:
    privacy = _words(plan(training__gradient_clip=1.0), "Privacy")
    assert privacy.startswith("NONE in the update: no differential privacy")
    assert "NONE towards the coordinator: no secure aggregation" in privacy
    assert "Gradients are clipped; that is not differential privacy" in privacy


def test_a_protection_is_told_with_its_numbers() -> None:
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-5, clip=1.0)
    protected = plan().model_copy(
        update={"protection": Protection(secure_aggregation="required", differential_privacy=private)}
    )
    privacy = _words(protected, "Privacy")
    assert "epsilon 2, delta 1e-05" in privacy
    assert "sees the sum over sites" in privacy
    assert "NONE" not in privacy


# --- secure sums


def test_a_plain_plan_says_that_the_coordinator_sees_this_sites_update() -> None:
    assert "NONE towards the coordinator" in _words(plan(), "Privacy")
    assert "It sees this site's update by itself" in _words(plan(), "Privacy")
    assert "masks" not in _words(plan(), "What leaves this site")


@pytest.mark.parametrize("least", [3, 7])
def test_a_secure_plan_says_of_how_many_sites_a_sum_is(least: int) -> None:
    privacy = _words(secured(), "Privacy", min_sites=least)
    assert f"sums of at least {least} sites, itself among them" in privacy
    assert "at least ⌊2n/3⌋ + 1 must give: 3 of 3, 4 of 5, 7 of 10" in privacy
    assert "NONE towards the coordinator" not in privacy


def test_a_secure_plan_says_what_it_does_not_promise() -> None:
    privacy = _words(secured(), "Privacy")
    assert "NONE in the update: no differential privacy" in privacy
    for said in (
        "NOT hidden: the sum.",
        "it can tell of one of them",
        "sites that work together with the coordinator",
        "Whoever runs the federation's authority can enrol such sites",
        "NOT reviewed yet by cryptographers from outside",
    ):
        assert said in privacy


def test_under_secure_sums_a_review_tells_what_is_in_them() -> None:
    leaves, stays = _words(secured(), "What leaves this site"), _words(secured(), "What stays")
    for said in (
        "under masks that come off the sum over the sites alone: the update",
        "its number of training cases, up to 10000), and the mean training loss.",
        "under such masks: the sums over the cases from which AUC, accuracy are computed, and the number of cases.",
        "public keys, this site's certificate, and a secret for each other site",
        "shares of the keys that take the masks off it, once for each sum",
    ):
        assert said in leaves
    assert "IN THE CLEAR" not in leaves
    for said in ("The update", "The number of cases", "The mean training loss", "The metrics"):
        assert f"{said} of this site by itself." in stays


def test_under_secure_sums_what_is_not_released_is_in_none() -> None:
    release = {"metrics": [], "training_loss": False, "case_counts": False}
    leaves = _words(secured(release=release, participation__weighting="equal"), "What leaves this site")
    assert "this site's weight." in leaves
    for said in ("loss", "number of", "under such masks"):
        assert said not in leaves
    leaves = _words(secured(release={"metrics": []}), "What leaves this site")
    assert "under such masks: the number of cases." in leaves


_ITSELF = [
    ("case_counts", "release_case_counts", "own number of cases", "The number of cases"),
    ("training_loss", "release_training_loss", "own mean training loss", "The mean training loss"),
    ("metrics", "release_site_metrics", "of this site alone: After each round and at the end", "The metrics"),
]


@pytest.mark.parametrize(("what", "flag", "told", "kept"), _ITSELF)
def test_what_a_site_tells_of_itself_beside_a_sum_is_said_in_capitals_unless_the_policy_keeps_it(
    what: str, flag: str, told: str, kept: str
) -> None:
    of = secured(release={"per_site": [what]})
    leaves = _words(of, "What leaves this site")
    assert leaves.count("IN THE CLEAR") == 1
    assert told in leaves
    assert f"{kept} of this site by itself." not in _words(of, "What stays")
    kept_back = _words(of, "What leaves this site", **{flag: False})
    assert "IN THE CLEAR" not in kept_back
    assert f"{kept} of this site by itself." in _words(of, "What stays", **{flag: False})
    assert ("number of cases in each fold" in leaves) is (what == "case_counts")


def test_own_metrics_tell_the_number_of_cases_and_so_it_is_not_said_to_stay() -> None:
    of = secured(release={"per_site": ["metrics"]})
    assert "The number of cases" not in _words(of, "What stays")
    assert "they tell the number of cases" in _words(of, "What leaves this site")


def test_subgroups_are_named_with_how_few_patients_are_told_apart_and_whom_they_can_show() -> None:
    groups = [{"by": "manufacturer", "values": ["SIEMENS", "GE MEDICAL SYSTEMS"]}]
    leaves = _words(secured(evaluation__subgroups=groups), "What leaves this site", least_cell=7)
    assert "over the cases of manufacturer SIEMENS, manufacturer GE MEDICAL SYSTEMS, if it has 7 patients" in leaves
    assert "Where no other site has such cases, a sum over the sites shows this site's own." in leaves
    assert "over all others" not in _words(secured(), "What leaves this site")


def test_a_policy_that_asks_for_more_sites_says_where_it_does_nothing(hospital: Hospital) -> None:
    of = hospital.proposed()
    said = hospital.approvals(min_sites=5).review(of.digest).sections["This site's policy"]
    assert said == ("Allows it.", "Its min_sites of 5 is for secure sums, and this plan has none.")
    refused = hospital.approvals(require_secure_aggregation=True).review(of.digest).sections["This site's policy"]
    assert refused == ("Forbids it (require_secure_aggregation): the coordinator would see each site's update.",)


_EQUAL = {"participation__weighting": "equal"}


@pytest.mark.parametrize(
    ("changes", "policy", "leaves", "stays"),
    [
        ({}, {}, ["number of training cases", "mean training loss", "cases in each fold", "AUC, accuracy"], []),
        ({"release": {"training_loss": False}}, {}, [], ["The mean training loss."]),
        ({}, {"release_training_loss": False}, [], ["The mean training loss."]),
        ({"release": {"case_counts": False, "metrics": []}, **_EQUAL}, {}, [], ["The number of cases."]),
        ({"release": {"metrics": []}, **_EQUAL}, {"release_case_counts": False}, [], ["The number of cases."]),
        ({"release": {"case_counts": False}, **_EQUAL}, {}, ["they tell the number of cases"], []),
        ({"release": {"metrics": ["AUC"]}}, {}, ["AUC is computed"], []),
        ({"release": {"metrics": []}}, {}, ["a code, no text"], []),
        ({"tensors": {"local": ["head.*"]}}, {}, [], ["keeps at each site: head.*"]),
        ({"tensors": {"shared": ["*"]}}, {}, ["running statistics too where a name covers them: *"], []),
        ({"admission__norm_bound": 5.0}, {}, ["L2 norm up to 5"], []),
    ],
)
def test_what_leaves_and_what_stays_is_what_the_gate_does(
    changes: dict[str, Any], policy: dict[str, Any], leaves: list[str], stays: list[str]
) -> None:
    out, kept = (
        _words(plan(**changes), "What leaves this site", **policy),
        _words(plan(**changes), "What stays", **policy),
    )
    assert [said for said in leaves if said not in out] == []
    assert [said for said in stays if said not in kept] == []
    assert "The mean training loss." not in kept or "training loss" not in out
    assert "The number of cases." not in kept or "number of" not in out
    assert "Images, masks, labels" in kept


def test_a_review_tells_how_far_an_approval_goes() -> None:
    assert "any number of runs of this plan" in _words(plan(), "Rounds")


def test_running_statistics_stay_unless_they_are_shared_by_name() -> None:
    assert "Running statistics" in _words(batch_norm_plan(), "What stays")
    assert "Running statistics" not in _words(batch_norm_plan(tensors={"shared": ["*"]}), "What stays")


def test_a_review_tells_what_the_policy_says(hospital: Hospital) -> None:
    of = hospital.proposed()
    allowed = hospital.approvals(hours="Mon-Fri 20:00-06:00", stewards=2).review(of.digest)
    assert allowed.sections["This site's policy"] == (
        "Allows it.",
        "Lets it run in these hours: Mon,Tue,Wed,Thu,Fri 20:00-06:00.",
        "Asks for the approval of 2 different stewards.",
    )
    forbidden = hospital.approvals(most_rounds=1, networks=["UNet"]).review(of.digest)
    assert forbidden.sections["This site's policy"] == (
        "Forbids it (networks): the network is Classifier.",
        "Forbids it (most_rounds): it has 2 rounds, 1 are allowed.",
    )


def test_a_proposal_cannot_write_to_a_stewards_terminal(hospital: Hospital) -> None:
    of = plan(purpose="looks harmless\x1b[2J\x1b[1;1H\nPrivacy\n  everything is private \u202e")
    hospital.approvals().receive(hospital.proposal(of, by="A\rB\x07\x9b1m"))
    text = hospital.approvals().review(of.digest).text()
    assert all(character.isprintable() for line in text.split("\n") for character in line)
    assert text.count("\nPrivacy\n") == 1
