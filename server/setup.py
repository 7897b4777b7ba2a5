"""One try at a set-up of secure aggregation: keys of every site, the signed roster, a secret of each pair.

Three exchanges. A site that fails at one of them is named in `refused`, and whoever asked begins anew without it: a
roster holds only sites that are ready.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from flwr.app import RecordDict

from locum.common.errors import Code
from locum.common.identity import certified_key, utc_now
from locum.common.messages import (
    BEGIN,
    KEYS,
    PAIRS,
    BeginResult,
    BeginTask,
    KeysResult,
    KeysTask,
    PairsResult,
    PairsTask,
    pack,
)
from locum.common.secagg import keys
from locum.common.secagg.aggregator import open_roster
from locum.common.secagg.roster import Pair, RunKeys, SecureRefusal, member_keys, member_of, verified
from locum.common.secagg.roster import Roster as SignedRoster
from locum.server.admission import Refused, read
from locum.server.asking import Engine, Roster, addressed, exchange, unanswered
from locum.server.signer import Signer


@dataclass(frozen=True)
class Party:
    """A site's part in a set-up: its certificate (PEM and parsed), the envelope of its run keys, and these."""

    pem: str
    certificate: x509.Certificate
    envelope: str
    keys: RunKeys


@dataclass
class SetUp:
    """One try at a set-up."""

    engine: Engine
    sites: Roster
    signer: Signer
    group: str
    private: bytes = field(default_factory=keys.new_private, repr=False)
    refused: dict[str, Refused] = field(default_factory=dict)

    def keys(self, sites: Collection[str]) -> dict[str, Party]:
        """Each site's keys, ascending by name."""
        content = pack(KeysTask(plan_digest=self.engine.plan.digest, run=self.signer.run))
        found: dict[str, Party] = {}
        for site, header in self._asked(KEYS, dict.fromkeys(sites, content), KeysResult):
            with _Blame(self, site):
                found[site] = self._party(site, header)
        return dict(sorted(found.items()))

    def _party(self, site: str, header: KeysResult) -> Party:
        certificate = self.signer.trust.site(site, header.certificate, utc_now())
        plan = self.engine.plan.digest
        announced = member_keys(header.keys, certificate, site=site, run=self.signer.run, plan=plan)
        return Party(header.certificate, certificate, header.keys, announced)

    def roster(self, parties: Mapping[str, Party]) -> SignedRoster:
        """The signed roster, once every site of it has said that it is ready; `refused` names those that are not."""
        plan = self.engine.plan.digest
        members = {site: member_of(site, party.certificate, party.envelope) for site, party in parties.items()}
        public = keys.public_of(self.private)
        roster, envelope = open_roster(members, run=self.signer.run, plan=plan, answers=public, key=self.signer.key)
        task = PairsTask(
            plan_digest=plan,
            run=self.signer.run,
            roster=envelope,
            keys={site: party.envelope for site, party in parties.items()},
            certificates={site: party.pem for site, party in parties.items()},
        )
        pairs: dict[str, Mapping[str, str]] = {}
        for site, header in self._asked(PAIRS, dict.fromkeys(parties, pack(task)), PairsResult):
            with _Blame(self, site):
                pairs[site] = _checked_pairs(roster, parties, site, header.pairs)
        if set(pairs) == set(parties):
            self._begin(roster, pairs)
        return roster

    def _begin(self, roster: SignedRoster, pairs: Mapping[str, Mapping[str, str]]) -> None:
        contents = {
            site: pack(
                BeginTask(
                    plan_digest=self.engine.plan.digest,
                    run=self.signer.run,
                    pairs={peer: pairs[peer][site] for peer in pairs if peer != site},
                )
            )
            for site in pairs
        }
        for site, header in self._asked(BEGIN, contents, BeginResult):
            if header.roster != roster.digest:
                self.refused[site] = Refused("it is ready for another roster")

    def _asked(self, kind: str, contents: Mapping[str, RecordDict], result: type[Any]) -> Iterator[tuple[str, Any]]:
        """The readable answers; who gives none is refused."""
        answered: set[str] = set()
        outgoing = addressed(self.engine, self.sites, contents)
        for site, reply in exchange(self.engine, kind, outgoing, group=self.group):
            answered.add(site)
            answer = read(reply, result, self.engine.plan)
            if isinstance(answer, Refused):
                self.refused[site] = answer
            else:
                yield site, answer[0]
        self.refused |= unanswered(self.engine, [site for site in contents if site not in answered])


@dataclass(frozen=True)
class _Blame:
    """A context in which a refusal of the protocol is a site's."""

    steps: SetUp
    site: str

    def __enter__(self) -> None:
        """Nothing is prepared."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, SecureRefusal):
            self.steps.refused[self.site] = Refused(str(error), Code.SECURE_SUM_REFUSED)
            return True
        return False


def _checked_pairs(
    roster: SignedRoster, parties: Mapping[str, Party], site: str, pairs: Mapping[str, str]
) -> Mapping[str, str]:
    """A site's halves of secrets, one for each peer; raises SecureRefusal."""
    if set(pairs) != set(parties) - {site}:
        raise SecureRefusal("there is not one half of a secret for each peer")
    key = certified_key(parties[site].certificate)
    for peer, envelope in pairs.items():
        pair = verified(envelope, Pair, key)
        if (pair.roster, pair.sender, pair.receiver) != (roster.digest, site, peer):
            raise SecureRefusal("a half of a secret is of another set-up")
    return pairs
