"""Contracts without weights, for tests of consent and of the host: three parties with keys, one
model that nobody trains.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fedark.contract.contract import Contract, Party, now
from fedark.foundation.keys import PartyKeys

ROLES = {
    "maker": "provider",
    "pool": "aggregator",
    "north": "customer",
    "east": "customer",
    "south": "customer",
}
KEYS = {name: PartyKeys() for name in ROLES}


def party(name: str, keys: PartyKeys | None = None) -> Party:
    keys = keys or KEYS[name]
    return Party.model_validate(
        {
            "name": name,
            "role": ROLES[name],
            "signing_key": keys.signing.public.hex(),
            "hpke_key": keys.hpke.public.hex(),
        }
    )


def model(name: str = "tiny", bundle: str = "0" * 96, weights: str = "5" * 96) -> dict[str, Any]:
    return {
        "name": name,
        "task": "classification",
        "bundle": bundle,
        "weights": weights,
        "prompt": "{message}",
        "labels": ("open", "close"),
        "adapter": {},
        "training": {},
        "server": {},
        "layout": ({"name": "head.weight", "shape": (2, 2), "travels": True},),
    }


def contract(**changes: Any) -> Contract:
    begun = now()
    value = {
        "job": "dispatch",
        "created": begun.isoformat(timespec="seconds"),
        "expires": (begun + timedelta(days=2)).isoformat(timespec="seconds"),
        "rounds": 3,
        "parties": [party(name) for name in ROLES],
        "models": [model()],
        "attestation": {
            "platforms": ("simulated",),
            "simulated_root": "1" * 64,
            "policies": {
                mode: {"seccomp": ("2" * 96,), "landlock": ("3" * 96,)}
                for mode in ("namespaces", "landlock")
            },
            "trainer": {},
            "aggregator": {},
        },
        "protection": {"minimum_cohort": 3},
        "privacy": {},
        "evaluation": {},
        "deliver_to": ("maker", "north"),
    }
    return Contract.build(value | changes)
