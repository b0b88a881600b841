"""The peer of `fedark bench secagg`: Flower's own SecAgg+ functions, called stage by stage, without
network.

Client stages are the functions of `flwr.client.mod.secure_aggregation`; the server's loops over the
same library functions are those of its workflow (`flwr.server.workflow.secure_aggregation`), less
its strategy and its records: what is left out counts in Flower's favour. Its server does the same
work whatever the masked vectors hold, so one client's vector stands for everybody's.
"""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FlowerSession", "available"]

_MODULE = "flwr.client.mod.secure_aggregation.secaggplus_mod"
CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 16, 1 << 32, 1000.0


def available() -> bool:
    """Whether Flower and its SecAgg+ can be imported."""
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        return False
    return True


@dataclass
class Timed:
    """Seconds of one client over all stages and of the server, and bytes of one masked vector."""

    client: float
    server: float
    wire: int


class FlowerSession:
    """`size` clients that all neighbour each other. Keys and shares are made once; each `round`
    repeats one client's stages.
    """

    def __init__(self, size: int, vector: NDArray[np.float32]) -> None:
        mod = importlib.import_module(_MODULE)  # its package exports a function of the same name
        from flwr.common import ndarrays_to_parameters
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
        self._mod, self._key, self._size = mod, Key, size
        self._threshold = max(2, round(0.667 * size))
        self._parameters = ndarrays_to_parameters([vector])
        self._shape = vector.shape
        self._configs: dict[Any, Any] = {
            Key.SAMPLE_NUMBER: size,
            Key.SHARE_NUMBER: size,
            Key.THRESHOLD: self._threshold,
            Key.CLIPPING_RANGE: CLIPPING,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
        self.states = [mod.SecAggPlusState(nid=nid) for nid in range(1, size + 1)]
        for state in self.states:
            mod._setup(state, self._configs)
        self._public = {str(s.nid): [s.pk1, s.pk2] for s in self.states}
        shared = {s.nid: mod._share_keys(s, dict(self._public)) for s in self.states}
        self._inbox: dict[int, tuple[list[int], list[bytes]]] = {
            s.nid: ([], []) for s in self.states
        }
        for nid, result in shared.items():
            for target, text in zip(
                result[Key.DESTINATION_LIST], result[Key.CIPHERTEXT_LIST], strict=True
            ):
                self._inbox[target][0].append(nid)
                self._inbox[target][1].append(text)
        for state in self.states[1:]:
            self._receive_shares(state)

    def _receive_shares(self, state: Any) -> None:
        """What `_collect_masked_vectors` does with the shares, without its vector."""
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate

        for source, text in zip(*self._inbox[state.nid], strict=True):
            _, _, seed, secret = share_keys_plaintext_separate(
                decrypt(state.ss2_dict[source], text)
            )
            state.rd_seed_share_dict[source], state.sk1_share_dict[source] = seed, secret

    def round(self, dropped: int) -> Timed:
        """One round in which the last `dropped` clients are gone after they shared their keys."""
        mod, key, state = self._mod, self._key, self.states[0]
        alive, dead = (
            list(range(1, self._size - dropped + 1)),
            list(range(self._size - dropped + 1, self._size + 1)),
        )
        start = time.perf_counter()
        mod._setup(mod.SecAggPlusState(nid=state.nid), self._configs)
        # A second state with the first one's keys: the other clients' shares are sealed for these.
        again = mod.SecAggPlusState(
            **{k: v for k, v in vars(state).items() if not k.endswith("_dict")}
        )
        again.rd_seed_share_dict, again.sk1_share_dict, again.ss2_dict = {}, {}, {}
        mod._share_keys(again, dict(self._public))
        masked = self.upload(state)
        mod._unmask(state, {key.ACTIVE_NODE_ID_LIST: alive, key.DEAD_NODE_ID_LIST: dead})
        client = time.perf_counter() - start
        shares = self.shares(alive, dead)
        start = time.perf_counter()
        self.unmask([masked] * len(alive), shares, alive, dead)
        return Timed(client, time.perf_counter() - start, sum(len(part) for part in masked))

    def upload(self, state: Any) -> list[bytes]:
        """A client's masked vector."""
        sources, texts = self._inbox[state.nid]
        configs = {self._key.CIPHERTEXT_LIST: texts, self._key.SOURCE_LIST: sources}
        masked: list[bytes] = self._mod._collect_masked_vectors(
            state, configs, 1000, self._parameters
        )[self._key.MASKED_PARAMETERS]
        return masked

    def shares(self, alive: list[int], dead: list[int]) -> dict[int, list[bytes]]:
        """Every living client's shares: of the seeds of the living and the keys of the dead."""
        found: dict[int, list[bytes]] = {nid: [] for nid in alive + dead}
        for state in self.states[: len(alive)]:
            for nid in alive:
                found[nid].append(state.rd_seed_share_dict[nid])
            for nid in dead:
                found[nid].append(state.sk1_share_dict[nid])
        return found

    def unmask(
        self,
        uploads: list[list[bytes]],
        shares: dict[int, list[bytes]],
        alive: list[int],
        dead: list[int],
    ) -> list[Any]:
        """The collect and unmask stages of the workflow: the mean vector."""
        from flwr.common import bytes_to_ndarray
        from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.quantization import dequantize
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

        total: list[Any] | None = None
        for masked in uploads:
            vector = [bytes_to_ndarray(part) for part in masked]
            total = vector if total is None else arithmetic.parameters_addition(total, vector)
        total = arithmetic.parameters_mod(total or [], MODULUS)
        for nid in alive + dead:
            secret = combine_shares(shares[nid])
            if nid in alive:
                mine = pseudo_rand_gen(secret, MODULUS, arithmetic.get_parameters_shape(total))
                total = arithmetic.parameters_subtraction(total, mine)
                continue
            for other in alive + dead:
                if other != nid:
                    public = bytes_to_public_key(self.states[other - 1].pk1)
                    seed = generate_shared_key(bytes_to_private_key(secret), public)
                    pair = pseudo_rand_gen(seed, MODULUS, arithmetic.get_parameters_shape(total))
                    change = (
                        arithmetic.parameters_addition
                        if nid > other
                        else arithmetic.parameters_subtraction
                    )
                    total = change(total, pair)
        total = arithmetic.parameters_mod(total, MODULUS)
        ratio, total = arithmetic.factor_extract(total)
        result: list[Any] = dequantize(total, CLIPPING, TARGET)
        for part in result:
            part += -(len(alive) - 1) * CLIPPING
            part *= TARGET / max(int(ratio), 1)
        return result
