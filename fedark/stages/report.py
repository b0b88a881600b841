"""The report's signature: what the aggregator says of a run is its own word, and nobody else's on
the way.

The sums in it come from the aggregator enclave, but the text is made by the aggregator's host. Its
signature covers the bytes, the contract and the run: a report that was altered, or is of another
run, is stored by no node.
"""

from __future__ import annotations

import hashlib
from typing import Any

from fedark.contract.contract import Contract
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.jsontext import read_json
from fedark.foundation.keys import SigningKey, verify_signature

__all__ = ["read_report", "sign_report"]

_LABEL = "fedark/report/1"
_MAX_REPORT = 16 << 20


def sign_report(key: SigningKey, report: bytes, contract: bytes, run_id: str) -> bytes:
    """The signature of the aggregator whose key it is.

    Args:
        contract: digest, 48 bytes.

    Raises:
        ProtocolError: the report is not of this contract and run.
    """
    value = _parsed(report)
    if (value.get("contract"), value.get("run_id")) != (contract.hex(), run_id):
        raise ProtocolError("The report is of another contract or run.", safe="It was not signed.")
    return key.sign(_LABEL, _covered(report, contract, run_id))


def read_report(report: bytes, signature: bytes, contract: Contract, run_id: str) -> dict[str, Any]:
    """The report, if the contract's aggregator signed it for this run.

    Raises:
        ProtocolError: it is malformed.
        Refused: it was altered, is of another contract or run, or is not signed.
    """
    aggregator = contract.aggregator
    public = bytes.fromhex(aggregator.signing_key)
    verify_signature(
        public, _LABEL, _covered(report, contract.digest(), run_id), signature, by=aggregator.name
    )
    return _parsed(report)


def _covered(report: bytes, contract: bytes, run_id: str) -> bytes:
    return canonical.encode(
        {"contract": contract, "run_id": run_id, "sha384": hashlib.sha384(report).digest()}
    )


def _parsed(report: bytes) -> dict[str, Any]:
    try:
        value = read_json(report) if len(report) <= _MAX_REPORT else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError("The report is not JSON, or too large.", safe="It was not stored.")
    return value
