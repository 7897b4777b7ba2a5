"""Flower's SecAgg+ without its messages: the peer beside which `secure_sum.py` measures ours.

A client's stages are the functions of Flower's own mod (`flwr/client/mod/secure_aggregation/secaggplus_mod.py`). The
server's are those of its workflow (`flwr/server/workflow/secure_aggregation/secaggplus_workflow.py`): the same
primitives, in the same order, on the same lists of bytes. The graph is complete; clipping, quantisation and modulus are
the workflow's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarray_to_bytes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

_CLIP, _TARGET, _MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0

Shares = dict[int, list[bytes]]
Vectors = list[NDArray[Any]]


class SecAggPlus:
    """Clients 1 to n, all of which give the same vector, and their server.

    Attributes:
        uploads: by client, its masked arrays as bytes.
    """

    def __init__(self, vector: NDArray[np.float32], *, sites: int, threshold: int) -> None:
        self._sites, self._threshold = sites, threshold
        self._parameters = ndarrays_to_parameters([vector])
        self._states = {client: SecAggPlusState(nid=client) for client in range(1, sites + 1)}
        self._keys: dict[int, list[bytes]] = {}
        self._boxes: dict[int, dict[int, bytes]] = {client: {} for client in self._states}
        self.uploads: dict[int, list[bytes]] = {}

    def set_up(self, client: int) -> None:
        """Stage 0: its two pairs of keys."""
        told = {
            Key.SAMPLE_NUMBER: self._sites,
            Key.SHARE_NUMBER: self._sites,
            Key.THRESHOLD: self._threshold,
            Key.CLIPPING_RANGE: _CLIP,
            Key.TARGET_RANGE: _TARGET,
            Key.MOD_RANGE: _MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
        found = _setup(self._states[client], ConfigRecord(cast("Any", told)))
        self._keys[client] = [cast("bytes", found[key]) for key in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2)]

    def share(self, client: int) -> None:
        """Stage 1: key agreement, and the shares of its seed and key, encrypted."""
        public = {str(other): list(keys) for other, keys in self._keys.items()}
        found = _share_keys(self._states[client], ConfigRecord(cast("Any", public)))
        boxes = cast("list[bytes]", found[Key.CIPHERTEXT_LIST])
        for other, box in zip(cast("list[int]", found[Key.DESTINATION_LIST]), boxes, strict=True):
            self._boxes[other][client] = box

    def collect(self, client: int, examples: int) -> None:
        """Stage 2: the shares for it are opened; its vector is quantised, masked and made bytes."""
        boxes = self._boxes[client]
        told = ConfigRecord({Key.CIPHERTEXT_LIST: list(boxes.values()), Key.SOURCE_LIST: list(boxes)})
        found = _collect_masked_vectors(self._states[client], told, examples, self._parameters)
        self.uploads[client] = cast("list[bytes]", found[Key.MASKED_PARAMETERS])

    def serialise(self, masked: NDArray[np.int64]) -> None:
        """What of stage 2 is only reading the update from bytes, and writing an array like `masked` to bytes."""
        parameters_to_ndarrays(self._parameters)
        ndarray_to_bytes(masked)

    def answer(self, client: int, survivors: Sequence[int]) -> list[tuple[int, bytes]]:
        """Stage 3: the shares of the survivors' seeds, and of the keys of who is gone."""
        gone = [other for other in self._states if other not in survivors]
        told = ConfigRecord({Key.ACTIVE_NODE_ID_LIST: list(survivors), Key.DEAD_NODE_ID_LIST: gone})
        found = _unmask(self._states[client], told)
        return list(
            zip(cast("list[int]", found[Key.NODE_ID_LIST]), cast("list[bytes]", found[Key.SHARE_LIST]), strict=True)
        )

    def sent(self, client: int) -> int:
        """Bytes of the client's masked vector and of the shares that it sends."""
        boxes = sum(len(found[client]) for found in self._boxes.values() if client in found)
        return boxes + sum(len(content) for content in self.uploads[client])

    # --- the server

    def fold(self, survivors: Sequence[int]) -> Vectors:
        """The sum of the masked vectors."""
        total: Vectors | None = None
        for client in survivors:
            vectors: Vectors = [bytes_to_ndarray(content) for content in self.uploads[client]]
            total = vectors if total is None else parameters_addition(total, vectors)
        return parameters_mod(total or [], _MODULUS)

    def unmask(self, total: Vectors, survivors: Sequence[int], answers: Sequence[list[tuple[int, bytes]]]) -> Vectors:
        """The sum without its masks; its first array is the sum of the weights."""
        shares: Shares = {client: [] for client in self._states}
        for owner, share in (pair for answer in answers for pair in answer):
            shares[owner].append(share)
        for client, found in shares.items():
            secret = combine_shares(found)
            if client in survivors:
                mask = pseudo_rand_gen(secret, _MODULUS, get_parameters_shape(total))
                total = parameters_subtraction(total, mask)
            else:
                total = self._without(total, client, secret)
        return parameters_mod(total, _MODULUS)

    def _without(self, total: Vectors, gone: int, secret: bytes) -> Vectors:
        """Takes away the masks that the others share with a client that is gone."""
        for other in (client for client in self._states if client != gone):
            public = bytes_to_public_key(self._keys[other][0])
            key = generate_shared_key(bytes_to_private_key(secret), public)
            mask = pseudo_rand_gen(key, _MODULUS, get_parameters_shape(total))
            total = parameters_addition(total, mask) if gone > other else parameters_subtraction(total, mask)
        return total

    @staticmethod
    def mean(total: Vectors, survivors: int) -> NDArray[np.float64]:
        """The weighted mean that an unmasked sum stands for."""
        weights, vectors = factor_extract(total)
        (mean,) = dequantize(vectors, _CLIP, _TARGET)
        mean -= (survivors - 1) * _CLIP
        mean *= _TARGET / weights
        return mean
