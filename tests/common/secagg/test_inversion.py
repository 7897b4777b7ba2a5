"""What secure aggregation hides and what it does not, shown with gradient inversion on images of 28×28 pixels.

The attack is the analytic one. Behind a fully connected layer with a bias, the gradient of a neuron's weights by one
image is that image times the gradient of the neuron's bias; the ratio of the two is the image (Phong et al., IEEE
TIFS 13(5), 2018, section 3; Geiping et al., NeurIPS 2020, proposition 3.1). It needs no optimisation, no knowledge of
the label and no change to the model: whoever reads the update, or the sum of the updates, can do it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from locum.common.secagg.masks import SEED_BYTES, Masks
from locum.common.secagg.ring import Elements, Floats, Ring

SITES = 5
SIDE = 28
PIXELS = SIDE * SIDE
NEURONS = 512
RING = Ring(bits=32, sites=SITES, bound=1.0)
#: The correlation of an image with as many random numbers has a standard deviation of 1/28; these are five of them.
CHANCE = 5 / SIDE


@pytest.fixture(scope="module", params=["drawn", "breastmnist"])
def images(request: pytest.FixtureRequest) -> Floats:
    """Images × pixels, between 0 and 1; the first five are the sites', the others nobody's."""
    if request.param == "drawn":
        return _drawn(80)
    file = request.getfixturevalue("shared_data") / "medmnist" / "breastmnist.npz"
    if not file.is_file():
        pytest.skip("no BreastMNIST in the real data")
    with np.load(file) as arrays:
        return np.asarray(arrays["train_images"].reshape(-1, PIXELS) / 255, np.float64)


def _drawn(count: int) -> Floats:
    """Phantoms: ellipses of several intensities, each image other ones."""
    random = np.random.default_rng(11)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    drawn = np.zeros((count, SIDE, SIDE))
    for image in drawn:
        for _ in range(6):
            (cx, cy), (rx, ry) = random.uniform(-0.7, 0.7, 2), random.uniform(0.15, 0.6, 2)
            image[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] += random.uniform(0.1, 0.4)
    return np.clip(drawn, 0, 1).reshape(count, PIXELS)


@pytest.fixture(scope="module")
def updates(images: Floats) -> list[Floats]:
    """Of each site, trained on its one image; the diagnoses differ."""
    return [_update(image, label) for label, image in enumerate(images[:SITES])]


def _update(image: Floats, label: int) -> Floats:
    """Local minus global weights after one step of SGD; those of the first layer come first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = nn.Sequential(nn.Linear(PIXELS, NEURONS), nn.ReLU(), nn.Linear(NEURONS, SITES))
    before = _weights(network)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    pixels = torch.from_numpy(image.astype(np.float32))[None]
    torch.autograd.backward(nn.functional.cross_entropy(network(pixels), torch.tensor([label])))
    optimiser.step()
    return (_weights(network) - before).astype(np.float64)


def _weights(network: nn.Module) -> NDArray[np.float32]:
    return np.concatenate([tensor.detach().numpy().reshape(-1).copy() for tensor in network.parameters()])


@pytest.fixture(scope="module")
def written(updates: list[Floats]) -> list[Elements]:
    """The updates in the ring, as sites write them before they mask."""
    return [_written(update, site) for site, update in enumerate(updates)]


def _written(update: Floats, site: int) -> Elements:
    assert np.abs(update).max() <= RING.bound
    elements = np.empty(update.size, RING.dtype)
    random = np.random.default_rng(100 + site).integers(0, 1 << 32, update.size, np.uint32)
    RING.write(update, 1.0, random, elements)
    return elements


@dataclass(frozen=True)
class Seeds:
    """The seeds of a round: one of each pair of sites, and one of each site's own."""

    pairs: dict[tuple[int, int], bytes]
    own: list[bytes]

    def known(self, site: int, *, own: bool, peers: Iterable[int]) -> tuple[list[bytes], list[bytes]]:
        """The seeds of the streams that `site` adds, and of those it takes away: its own, and those with `peers`."""
        add = [self.own[site]] if own else []
        subtract = []
        for peer in set(peers) - {site}:
            if peer > site:
                add.append(self.pairs[site, peer])
            else:
                subtract.append(self.pairs[peer, site])
        return add, subtract


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    random = np.random.default_rng(23)
    pairs = {pair: random.bytes(SEED_BYTES) for pair in combinations(range(SITES), 2)}
    return Seeds(pairs, [random.bytes(SEED_BYTES) for _ in range(SITES)])


@pytest.fixture(scope="module")
def uploads(written: list[Elements], seeds: Seeds) -> list[Elements]:
    """y = q + PRG(b) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij) of each site."""
    masked = [elements.copy() for elements in written]
    for site, elements in enumerate(masked):
        add, subtract = seeds.known(site, own=True, peers=range(SITES))
        Masks(0, add=add, subtract=subtract).apply(elements)
    return masked


def _lifted(upload: Elements, site: int, seeds: Seeds, *, own: bool, peers: Iterable[int]) -> Elements:
    """An upload less the masks that somebody knows."""
    add, subtract = seeds.known(site, own=own, peers=peers)
    lifted = upload.copy()
    Masks(0, add=subtract, subtract=add).apply(lifted)
    return lifted


def _sum(parts: Iterable[Elements]) -> Elements:
    """In the ring: modulo 2^32."""
    total: Elements = np.sum(list(parts), axis=0, dtype=RING.dtype)
    return total


def _rows(update: Floats) -> tuple[Floats, Floats]:
    """What each neuron of the first layer tells: weights' change over bias' change, and the bias' change."""
    weights = update[: NEURONS * PIXELS].reshape(NEURONS, PIXELS)
    bias = update[NEURONS * PIXELS :][:NEURONS]
    heard = bias != 0
    return weights[heard] / bias[heard, None], bias[heard]


def _invert(update: Floats) -> Floats:
    """The one image behind an update: the ratio of the neuron that speaks loudest."""
    ratios, bias = _rows(update)
    loudest: Floats = ratios[np.abs(bias).argmax()]
    return loudest


def _invert_sum(total: Floats) -> Floats:
    """Candidate images behind a sum, found without knowing any: the ratios that two neurons agree on to 1/255.

    A neuron that fires for one image only tells this image, and so does the next such neuron; neurons that fire for
    several images tell mixtures, as a rule each a mixture of its own.
    """
    ratios, _ = _rows(total)
    ratios = ratios[((ratios > -0.01) & (ratios < 1.01)).all(axis=1)]
    agreed = [row for at, row in enumerate(ratios) if (np.abs(np.delete(ratios, at, 0) - row) < 1 / 255).all(1).any()]
    return np.array(agreed).reshape(-1, PIXELS)


def _correlations(rows: Floats, image: Floats) -> Floats:
    """Pearson's, of each row with the image."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    image = image - image.mean()
    found: Floats = rows @ image / (np.linalg.norm(rows, axis=1) * np.linalg.norm(image))
    return found


def _psnr(found: Floats, image: Floats) -> float:
    """Peak signal to noise in dB, of images between 0 and 1."""
    return float(-10 * np.log10(np.square(found - image).mean()))


def test_an_image_is_recovered_from_a_plain_update(images: Floats, updates: list[Floats]) -> None:
    for image, update in zip(images[:SITES], updates, strict=True):
        found = _invert(update)
        assert _psnr(found, image) > 100
        assert _correlations(found[None], image)[0] > 0.9999


def test_quantisation_alone_protects_no_image(images: Floats, written: list[Elements]) -> None:
    """The ring is a way to write numbers, not a way to hide them."""
    for image, elements in zip(images[:SITES], written, strict=True):
        found = _invert(RING.read(elements))
        assert _psnr(found, image) > 100
        assert _correlations(found[None], image)[0] > 0.9999


@pytest.mark.parametrize(
    ("own", "colluding"),
    [
        pytest.param(False, 0, id="nothing-known"),
        pytest.param(True, 0, id="self-mask-known"),
        pytest.param(True, SITES - 2, id="self-mask-and-all-peers-but-one-known"),
        pytest.param(False, SITES - 1, id="all-pair-masks-known"),
    ],
)
def test_inversion_fails_on_a_masked_update(
    images: Floats, uploads: list[Elements], seeds: Seeds, *, own: bool, colluding: int
) -> None:
    """One mask that the attacker cannot lift is enough, whichever it is.

    The last case is why there is a self mask: a site that is thought lost, whose pair masks are reconstructed, may
    have uploaded after all (Bonawitz et al., CCS 2017, double masking).
    """
    noise = np.random.default_rng(31)
    for site, upload in enumerate(uploads):
        peers = [peer for peer in range(SITES) if peer != site][:colluding]
        seen = RING.read(_lifted(upload, site, seeds, own=own, peers=peers))
        random = RING.read(noise.integers(0, 1 << 32, upload.size, np.uint32))
        assert abs(_correlations(_invert(seen)[None], images[site])[0]) < CHANCE
        # Not even who knew in hindsight which of the 512 neurons told most would see something,
        told = _correlations(_rows(seen)[0], images[site])
        assert np.abs(told).max() < CHANCE
        # and all of them together tell as much as random numbers do (their spread has an error of 3 %).
        assert told.std() < 1.2 * _correlations(_rows(random)[0], images[site]).std()


def test_the_masks_are_all_that_hides_an_image(
    images: Floats, written: list[Elements], uploads: list[Elements], seeds: Seeds
) -> None:
    for site, upload in enumerate(uploads):
        lifted = _lifted(upload, site, seeds, own=True, peers=range(SITES))
        assert np.array_equal(lifted, written[site])
        assert _psnr(_invert(RING.read(lifted)), images[site]) > 100


def test_the_masked_uploads_sum_to_the_ring_sum_to_the_bit(
    updates: list[Floats], written: list[Elements], uploads: list[Elements], seeds: Seeds
) -> None:
    assert not np.array_equal(_sum(uploads), _sum(written))
    total = _sum(_lifted(upload, site, seeds, own=True, peers=()) for site, upload in enumerate(uploads))
    assert np.array_equal(total, _sum(written))
    assert np.abs(RING.read(total) - np.sum(updates, axis=0)).max() < SITES / RING.scale


def test_a_sum_of_five_single_image_sites_still_leaks(images: Floats, uploads: list[Elements], seeds: Seeds) -> None:
    """Secure aggregation hides who, not what: only differential privacy bounds what a sum tells.

    The aggregator learns the sum and nothing else, as promised, and nobody has tampered with the model: its weights
    are drawn as PyTorch draws them. Of 512 ReLU neurons some happen to fire for one image of the five, and each of
    those tells this image exactly (Boenisch et al., EuroS&P 2023, "When the Curious Abandon Honesty", the passive
    attacker; Fowl et al., ICLR 2022, "Robbing the Fed", where an aggregator arranges for it on purpose). Which site an
    image came from stays hidden. A larger sum and more images a site make such neurons rarer; they are no bound.
    """
    before = _sum(uploads)
    assert _invert_sum(RING.read(before)).size == 0
    total = _sum(_lifted(upload, site, seeds, own=True, peers=()) for site, upload in enumerate(uploads))
    candidates = _invert_sum(RING.read(total))
    leaked = [image for image in images[:SITES] if max(_psnr(found, image) for found in candidates) > 60]
    assert len(leaked) >= 3
    # Chance: what the mean image of the five, or the most similar image of somebody else, would tell.
    strangers = [images[:SITES].mean(axis=0), *images[SITES:]]
    assert max(_psnr(stranger, image) for stranger in strangers for image in leaked) < 40
