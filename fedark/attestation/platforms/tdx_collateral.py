"""Intel's signed statements about TDX platforms: TCB info, QE identity and CRLs, and the matching
of a platform against them.

Follows the Intel PCS API, version 4 ("Get TDX TCB Info", "Get TD QE Identity":
https://api.portal.trustedservices.intel.com), and, where that text is silent, the order and the
convergence of states in Intel's quote verification library (QVL, TcbLevelCheck.cpp and
TdxModuleCheck.cpp). A `Collateral` exists only if everything in it was signed under the pinned
root; whether it is current is asked again at every verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedark.attestation import _x509
from fedark.attestation.platforms.tdx_quote import PckIdentity, QeReport, TdxQuote
from fedark.foundation.errors import EvidenceRefused, printable
from fedark.foundation.jsontext import read_json

__all__ = ["PLATFORM_STATUSES", "Appraisal", "Collateral", "root_problems"]

PLATFORM_STATUSES = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "Revoked",
    }
)
_PART_STATUSES = frozenset({"UpToDate", "OutOfDate", "Revoked"})
_CONFIGURATION = ("ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded")
_SUBJECT = "Intel's TDX collateral"
_MAX_COLLATERAL = 1 << 20
_FIELDS = {
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
}


@dataclass(frozen=True)
class _Level:
    """One TCB level: what it takes to reach it, and what Intel says of it."""

    components: tuple[int, ...]
    tdx_components: tuple[int, ...]
    svn: int
    status: str
    date: datetime
    advisories: tuple[str, ...]


@dataclass(frozen=True)
class _Module:
    """A version of the TDX module: who must have signed it, and its levels (none for version 0)."""

    identity: str
    mrsigner: bytes
    attributes: bytes
    mask: bytes
    levels: tuple[_Level, ...]


@dataclass(frozen=True)
class Appraisal:
    """How a platform stands against its collateral.

    Attributes:
        problems: what rules it out, whatever a policy accepts.
        status: one of `PLATFORM_STATUSES`, converged from platform, module and quoting enclave;
            None if there are problems.
        date: of the oldest level that matched.
        advisories: Intel's, of all levels that matched.
    """

    problems: list[str]
    status: str | None
    date: datetime
    advisories: tuple[str, ...]


def root_problems(root: x509.Certificate, root_key: bytes) -> list[str]:
    """Whether a root certificate is of the pinned public point, and signed by it."""
    if _x509.ec_point(root, ec.SECP256R1) != root_key:
        return ["The certificate path does not end at the pinned Intel SGX root key."]
    return _x509.self_signature_problems(root)


class Collateral:
    """The collateral of one kind of platform (FMSPC) and one PCK CA.

    Args:
        data: a JSON object of nine strings, as collected by the usual tools from the PCS:
            `tcb_info` and `qe_identity` as the signed texts, their `..._signature` and both CRLs in
            hex, the `..._issuer_chain`s in PEM.
        root_key: the pinned root's uncompressed public point.

    Attributes:
        fmspc: of the platforms that it speaks of, 6 bytes.
        pck_issuer: name of the PCK CA.
        issued: when Intel signed the TCB info.
        evaluation: the older `tcbEvaluationDataNumber` of TCB info and QE identity.

    Raises:
        EvidenceRefused: anything in it is malformed or not signed under `root_key`.
    """

    def __init__(self, data: bytes, *, root_key: bytes) -> None:
        if len(data) > _MAX_COLLATERAL:
            raise _malformed("is too large")
        fields = _json(data)
        if type(fields) is not dict or fields.keys() != _FIELDS:
            raise _malformed("does not have its nine fields")
        if any(type(value) is not str or not value.isascii() for value in fields.values()):
            raise _malformed("has a field that is not ASCII text")
        self._root_crl = _x509.RevocationList(
            _hex(fields["root_ca_crl"]), "The Intel root's revocation list", _SUBJECT
        )
        self._pck_crl = _x509.RevocationList(
            _hex(fields["pck_crl"]), "The PCK revocation list", _SUBJECT
        )
        self._paths = {
            name: _x509.load_pem_chain(fields[name].encode(), 2, f"The {name}", _SUBJECT)
            for name in sorted(_FIELDS)
            if name.endswith("_chain")
        }
        self.pck_issuer: x509.Name = self._pck_crl.issuer
        problems = self._path_problems(root_key)
        for name in ("tcb_info", "qe_identity"):
            problems += self._signature_problems(name, fields)
        if problems:
            raise EvidenceRefused(_SUBJECT, problems)
        try:
            self._read_tcb_info(_json(fields["tcb_info"].encode()))
            self._read_qe_identity(_json(fields["qe_identity"].encode()))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise _malformed("has a field of a wrong form") from None

    def problems(
        self,
        pck_path: Sequence[x509.Certificate],
        *,
        now: datetime,
        admitted: datetime | None = None,
    ) -> list[str]:
        """What stands against using it at `now` (aware) for a platform with this PCK path; empty if
        nothing does.

        Args:
            admitted: when a quote of the platform was verified before; see `Verifier.verify`.
        """
        pck, pck_ca, _ = pck_path
        problems: list[str] = []
        for path in self._paths.values():
            problems += _x509.date_problems(path, now=now, admitted=admitted)
            problems += self._root_crl.problems(path[0], now=now, admitted=admitted)
        problems += self._root_crl.problems(pck_ca, now=now, admitted=admitted)
        problems += self._pck_crl.problems(pck, now=now, admitted=admitted)
        for name, (issued, due) in self._periods.items():
            if not _x509.current(issued, due, now=now, admitted=admitted):
                problems.append(
                    f"The {name} is current from {issued:%Y-%m-%d} to {due:%Y-%m-%d}, not at"
                    f" {now:%Y-%m-%d %H:%M}."
                )
        return list(dict.fromkeys(problems))

    def appraise(self, quote: TdxQuote, identity: PckIdentity) -> Appraisal:
        """Match a platform, its TDX module and its quoting enclave against Intel's statements."""
        problems: list[str] = []
        if (identity.fmspc, identity.pceid) != (self.fmspc, self._pceid):
            problems.append("The TCB info is of another kind of platform (FMSPC or PCE id).")
        problems += self._qe_mismatches(quote.qe_report)
        version = quote.tee_tcb_svn[1]
        module = self._modules.get(f"TDX_{version:02X}") if version else self._first_module
        if module is None:
            problems.append(f"Intel's TCB info does not know version {version} of the TDX module.")
        elif (
            quote.mrsignerseam != module.mrsigner
            or any(quote.seamattributes)
            or _masked(quote.seamattributes, module.mask) != module.attributes
        ):
            problems.append(
                "The TDX module is not one that Intel signed for this platform (signer or"
                " attributes)."
            )

        platform = next(
            (level for level in self._levels if _reaches(level, identity, quote.tee_tcb_svn)), None
        )
        parts = {
            "platform": platform,
            "quoting enclave": _matched(self._qe_levels, quote.qe_report.isvsvn),
        }
        if version and module is not None:
            parts["TDX module"] = _matched(module.levels, quote.tee_tcb_svn[0])
        problems += [
            f"The {part} is below every TCB level that Intel lists."
            for part, level in parts.items()
            if level is None
        ]
        matched = [level for level in parts.values() if level is not None]
        if problems or platform is None:
            return Appraisal(problems, None, datetime.min.replace(tzinfo=UTC), ())
        return Appraisal(
            [],
            _converged(
                platform.status, [level.status for level in matched if level is not platform]
            ),
            min(level.date for level in matched),
            tuple(dict.fromkeys(advisory for level in matched for advisory in level.advisories)),
        )

    def _path_problems(self, root_key: bytes) -> list[str]:
        problems: list[str] = []
        for name, path in self._paths.items():
            of_ca = name == "pck_crl_issuer_chain"  # the other two start with an end entity
            problems += _x509.link_problems(path, first_is_ca=of_ca) + root_problems(
                path[1], root_key
            )
            if not of_ca and _x509.common_name(path[0].subject) != "Intel SGX TCB Signing":
                problems.append(f"The {name} is not that of the Intel SGX TCB Signing certificate.")
        pck_ca, root = self._paths["pck_crl_issuer_chain"]
        return (
            problems
            + self._root_crl.signature_problems(root)
            + self._pck_crl.signature_problems(pck_ca)
        )

    def _signature_problems(self, name: str, fields: dict[str, str]) -> list[str]:
        signature = _hex(fields[f"{name}_signature"])
        point = _x509.ec_point(self._paths[f"{name}_issuer_chain"][0], ec.SECP256R1)
        message = fields[name].encode()
        if (
            point is None
            or len(signature) != 64
            or not _x509.verifies(
                point, ec.SECP256R1(), hashes.SHA256(), message, signature[:32], signature[32:]
            )
        ):
            return [f"The signature of the {name} does not verify."]
        return []

    def _read_tcb_info(self, info: dict[str, Any]) -> None:
        if info["id"] != "TDX" or info["version"] != 3 or info["tcbType"] != 0:
            raise _malformed("has a TCB info that is not of TDX, version 3")
        self._periods = {"TCB info": (_time(info["issueDate"]), _time(info["nextUpdate"]))}
        self.issued = self._periods["TCB info"][0]
        self.evaluation = _svn(info["tcbEvaluationDataNumber"])
        self.fmspc = _sized(info["fmspc"], 6)
        self._pceid = _sized(info["pceId"], 2)
        self._levels = tuple(
            _Level(
                components=_components(level["tcb"]["sgxtcbcomponents"]),
                tdx_components=_components(level["tcb"]["tdxtcbcomponents"]),
                svn=_svn(level["tcb"]["pcesvn"]),
                **_statement(level, PLATFORM_STATUSES),
            )
            for level in info["tcbLevels"]
        )
        self._first_module = _module(info["tdxModule"], "", ())
        modules = [
            _module(item, item["id"].upper(), item["tcbLevels"])
            for item in info.get("tdxModuleIdentities", [])
        ]
        self._modules = {module.identity: module for module in modules}
        if len(self._modules) != len(modules):
            raise ValueError

    def _read_qe_identity(self, identity: dict[str, Any]) -> None:
        if identity["id"] != "TD_QE" or identity["version"] != 2:
            raise _malformed("has a QE identity that is not of the TD quoting enclave, version 2")
        self._periods["QE identity"] = (_time(identity["issueDate"]), _time(identity["nextUpdate"]))
        self.evaluation = min(self.evaluation, _svn(identity["tcbEvaluationDataNumber"]))
        self._qe_mrsigner = _sized(identity["mrsigner"], 32)
        self._qe_isvprodid = _svn(identity["isvprodid"])
        self._qe_miscselect = (
            _sized(identity["miscselect"], 4),
            _sized(identity["miscselectMask"], 4),
        )
        self._qe_attributes = (
            _sized(identity["attributes"], 16),
            _sized(identity["attributesMask"], 16),
        )
        self._qe_levels = _svn_levels(identity["tcbLevels"])

    def _qe_mismatches(self, report: QeReport) -> list[str]:
        problems = []
        if report.mrsigner != self._qe_mrsigner or report.isvprodid != self._qe_isvprodid:
            problems.append(
                "The quoting enclave is not Intel's TD quoting enclave (signer or product)."
            )
        for name, value, (wanted, mask) in (
            ("miscselect", report.miscselect, self._qe_miscselect),
            ("attributes", report.attributes, self._qe_attributes),
        ):
            if _masked(value, mask) != wanted:
                problems.append(f"The quoting enclave has other {name} than Intel's identity.")
        return problems


def _reaches(level: _Level, identity: PckIdentity, tee_tcb_svn: bytes) -> bool:
    # Components 0 and 1 are the TDX module's, which has levels of its own from version 1 on (QVL,
    # isTdxTcbHigherOrEqual).
    first = 2 if tee_tcb_svn[1] else 0
    return (
        all(
            have >= need
            for have, need in zip(identity.component_svns, level.components, strict=True)
        )
        and identity.pcesvn >= level.svn
        and all(
            have >= need
            for have, need in zip(tee_tcb_svn[first:], level.tdx_components[first:], strict=True)
        )
    )


def _matched(levels: Sequence[_Level], isvsvn: int) -> _Level | None:
    return next((level for level in levels if isvsvn >= level.svn), None)


def _converged(platform: str, parts: Sequence[str]) -> str:
    """One state of the platform and the parts that have a state of their own (QVL,
    convergeTcbStatusWith...).
    """
    if platform == "Revoked" or "Revoked" in parts:
        return "Revoked"
    if "OutOfDate" in parts:
        if platform in ("UpToDate", "SWHardeningNeeded"):
            return "OutOfDate"
        if platform in _CONFIGURATION:
            return "OutOfDateConfigurationNeeded"
    return platform


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(value, mask, strict=True))


def _statement(level: dict[str, Any], statuses: frozenset[str]) -> dict[str, Any]:
    status, advisories = level["tcbStatus"], level.get("advisoryIDs", [])
    if status not in statuses or any(type(advisory) is not str for advisory in advisories):
        raise ValueError
    return {
        "status": status,
        "date": _time(level["tcbDate"]),
        "advisories": tuple(printable(text, 40) for text in advisories),
    }


def _svn_levels(levels: Sequence[dict[str, Any]]) -> tuple[_Level, ...]:
    return tuple(
        _Level((), (), _svn(level["tcb"]["isvsvn"]), **_statement(level, _PART_STATUSES))
        for level in levels
    )


def _module(item: dict[str, Any], identity: str, levels: Sequence[dict[str, Any]]) -> _Module:
    return _Module(
        identity,
        _sized(item["mrsigner"], 48),
        _sized(item["attributes"], 8),
        _sized(item["attributesMask"], 8),
        _svn_levels(levels),
    )


def _components(items: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    svns = tuple(_svn(item["svn"]) for item in items)
    if len(svns) != 16:
        raise ValueError
    return svns


def _svn(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 16:
        raise ValueError
    return value


def _sized(text: Any, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size:
        raise ValueError
    return value


def _time(text: Any) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _hex(text: str) -> bytes:
    """Lower-case hex, so that no bit of the file is free."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if not value or value.hex() != text:
        raise _malformed("has a field that is not lower-case hex")
    return value


def _json(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return read_json(data, unique)
    except ValueError:
        raise _malformed("is not JSON without duplicate keys") from None


def _malformed(how: str) -> EvidenceRefused:
    return EvidenceRefused(_SUBJECT, [f"It {how}."], safe="Nothing was verified with it.")
