"""Masks: they cancel to the bit, in whatever pieces they are made, and are the key stream of the standard."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from locum.common.secagg.masks import SEED_BYTES, Masks, Stream
from locum.common.secagg.ring import CHUNK

SEED = bytes(range(SEED_BYTES))
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
#: NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt: the key, and input block → output block of each of the four segments.
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_BLOCKS = {
    "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff": "0bdf7df1591716335e9a8b15c860c502",
    "f0f1f2f3f4f5f6f7f8f9fafbfcfdff00": "5a6e699d536119065433863c8f657b94",
    "f0f1f2f3f4f5f6f7f8f9fafbfcfdff01": "1bc12c9c01610d5d0d8bd6a3378eca62",
    "f0f1f2f3f4f5f6f7f8f9fafbfcfdff02": "2956e1c8693536b1bee99c73a31576b6",
}


def _cipher(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)  # noqa: S305 (the block cipher alone)


def _bytes(seed: bytes, count: int, index: int = 0) -> bytes:
    out = np.empty(count, np.uint8)
    Stream(seed, index).fill(out)
    return out.tobytes()


def _apply(masks: Masks, vector: NDArray[Any], cuts: Iterable[int] = ()) -> None:
    for start, stop in pairwise([0, *cuts, vector.size]):
        masks.apply(vector[start:stop])


def _cuts(random: np.random.Generator, size: int) -> list[int]:
    return np.sort(random.integers(0, size + 1, 5)).tolist()


def test_the_block_cipher_is_that_of_the_standard() -> None:
    for counter, output in NIST_BLOCKS.items():
        assert _cipher(NIST_KEY, bytes.fromhex(counter)).hex() == output


@pytest.mark.parametrize("index", [0, 1, 0xF0F1F2F3F4F5F6F7, 2**64 - 1])
def test_the_key_stream_is_the_cipher_of_index_and_counter(index: int) -> None:
    blocks = 300  # past the first carry of the counter
    expected = [_cipher(NIST_KEY, index.to_bytes(8, "big") + block.to_bytes(8, "big")) for block in range(blocks)]
    assert _bytes(NIST_KEY, 16 * blocks, index) == b"".join(expected)


def test_the_key_stream_goes_on_behind_a_chunk() -> None:
    vector = np.zeros(3 * CHUNK, "<u8")
    Masks(1, add=[SEED]).apply(vector)
    for block in (CHUNK // 2 - 1, CHUNK // 2, CHUNK, 3 * CHUNK // 2 - 1):
        expected = _cipher(SEED, (1).to_bytes(8, "big") + block.to_bytes(8, "big"))
        assert vector[2 * block : 2 * block + 2].tobytes() == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=20), st.sampled_from([1, 2, 4, 8]))
def test_a_stream_in_pieces_is_the_stream_whole(sizes: list[int], width: int) -> None:
    stream, pieces = Stream(SEED, 3), []
    for size in sizes:
        pieces.append(np.empty(size, f"<u{width}"))
        stream.fill(pieces[-1])
    assert b"".join(piece.tobytes() for piece in pieces) == _bytes(SEED, width * sum(sizes), 3)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SIZES), st.sampled_from(["<u4", "<u8"]), st.data())
def test_masks_in_pieces_are_the_masks_whole(size: int, dtype: str, data: st.DataObject) -> None:
    near = st.sampled_from([min(size, cut) for cut in SIZES])
    cuts = sorted(data.draw(st.lists(near | st.integers(0, size), max_size=6)))
    whole, pieces = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
    _apply(Masks(0, add=[SEED], subtract=[NIST_KEY]), whole)
    _apply(Masks(0, add=[SEED], subtract=[NIST_KEY]), pieces, cuts)
    assert whole.tobytes() == pieces.tobytes()


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", SIZES)
def test_masks_of_every_pair_cancel_exactly(size: int, dtype: str) -> None:
    random = np.random.default_rng(size)
    sites, largest = 5, np.iinfo(dtype).max
    vectors = [random.integers(0, largest, size, dtype, endpoint=True) for _ in range(sites)]
    expected = sum(vectors, np.zeros(size, dtype))
    seeds = {pair: random.bytes(SEED_BYTES) for pair in combinations(range(sites), 2)}
    masked = [vector.copy() for vector in vectors]
    for site, vector in enumerate(masked):
        add = [seed for pair, seed in seeds.items() if pair[0] == site]
        subtract = [seed for pair, seed in seeds.items() if pair[1] == site]
        _apply(Masks(0, add=add, subtract=subtract), vector, _cuts(random, size))
    assert sum(masked, np.zeros(size, dtype)).tobytes() == expected.tobytes()
    for site in range(sites if size else 0):
        assert np.mean(masked[site] == vectors[site]) < 0.01
        others = sum(masked[:site] + masked[site + 1 :], np.zeros(size, dtype))
        assert np.mean(others == expected - vectors[site]) < 0.01


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_what_was_added_can_be_taken_away(dtype: str) -> None:
    vector = np.arange(CHUNK + 1, dtype=dtype)
    _apply(Masks(7, add=[SEED, NIST_KEY]), vector, [11])
    _apply(Masks(7, subtract=[NIST_KEY, SEED]), vector, [CHUNK])
    assert vector.tobytes() == np.arange(CHUNK + 1, dtype=dtype).tobytes()


def test_elements_are_little_endian_whatever_their_width() -> None:
    narrow, wide = np.zeros(64, "<u4"), np.zeros(32, "<u8")
    Masks(0, add=[SEED]).apply(narrow)
    Masks(0, add=[SEED]).apply(wide)
    assert narrow.tobytes() == wide.tobytes() == _bytes(SEED, 256)


def test_a_matrix_is_masked_in_place_in_the_order_of_rows() -> None:
    flat, matrix = np.zeros(6, "<u4"), np.zeros((2, 3), "<u4")
    Masks(0, add=[SEED]).apply(flat)
    Masks(0, add=[SEED]).apply(matrix)
    assert matrix.reshape(-1).tolist() == flat.tolist()


def test_seeds_and_lanes_have_streams_of_their_own() -> None:
    other = SEED[:-1] + b"\x00"
    streams = [_bytes(seed, 16 * 1000, index) for seed in (SEED, other) for index in (0, 1, 2, 2**63)]
    blocks = {stream[start : start + 16] for stream in streams for start in range(0, 16 * 1000, 16)}
    assert len(blocks) == 8 * 1000  # no block of one stream turns up in another, shifted or not


def test_a_stream_encrypts_and_decrypts() -> None:
    words = bytearray(b"the model travels, the images stay")
    sealed, opened = bytearray(len(words)), bytearray(len(words))
    Stream(SEED, 9).mix(memoryview(words), memoryview(sealed))
    assert sealed == bytes(a ^ b for a, b in zip(words, _bytes(SEED, len(words), 9), strict=True))
    Stream(SEED, 9).mix(memoryview(sealed), memoryview(opened))
    assert opened == words


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_seed_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Stream(bytes(length))
    with pytest.raises(ValueError, match="32 bytes"):
        Masks(0, subtract=[bytes(length)])


@pytest.mark.parametrize("index", [-1, 2**64])
def test_a_stream_beyond_the_last_is_refused(index: int) -> None:
    with pytest.raises(OverflowError):
        Stream(SEED, index)


def test_a_piece_that_would_be_filled_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        Stream(SEED).fill(np.zeros(CHUNK + 1, "<u8"))


@pytest.mark.parametrize("view", ["transposed", "every second"])
def test_a_vector_that_would_stay_unmasked_is_refused(view: str) -> None:
    array = np.zeros((4, 6), "<u4")
    with pytest.raises(ValueError, match="contiguous"):
        Masks(0, add=[SEED]).apply(array.T if view == "transposed" else array[:, ::2])
    assert not array.any()


def test_masking_takes_the_memory_of_two_pieces() -> None:
    vector = np.zeros(16 * CHUNK, "<u8")
    tracemalloc.start()
    Masks(0, add=[SEED, NIST_KEY]).apply(vector)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 8 * CHUNK
