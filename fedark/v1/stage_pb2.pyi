from fedark.v1 import enclave_pb2 as _enclave_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StageRequest(_message.Message):
    __slots__ = ("version", "run_id", "contract_digest", "enrol", "attest", "release", "load", "round", "evaluate", "deliver", "abort", "forward")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENROL_FIELD_NUMBER: _ClassVar[int]
    ATTEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    DELIVER_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_id: str
    contract_digest: bytes
    enrol: EnrolRequest
    attest: AttestRequest
    release: ReleaseRequest
    load: LoadRequest
    round: RoundRequest
    evaluate: EvaluateRequest
    deliver: DeliverRequest
    abort: AbortRequest
    forward: ForwardRequest
    def __init__(self, version: _Optional[int] = ..., run_id: _Optional[str] = ..., contract_digest: _Optional[bytes] = ..., enrol: _Optional[_Union[EnrolRequest, _Mapping]] = ..., attest: _Optional[_Union[AttestRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseRequest, _Mapping]] = ..., load: _Optional[_Union[LoadRequest, _Mapping]] = ..., round: _Optional[_Union[RoundRequest, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateRequest, _Mapping]] = ..., deliver: _Optional[_Union[DeliverRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequest, _Mapping]] = ..., forward: _Optional[_Union[ForwardRequest, _Mapping]] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ("version", "run_id", "party", "fault", "enrol", "attest", "release", "load", "round", "evaluate", "deliver", "abort", "forward")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    ENROL_FIELD_NUMBER: _ClassVar[int]
    ATTEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    DELIVER_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_id: str
    party: str
    fault: StageFault
    enrol: EnrolReply
    attest: AttestReply
    release: ReleaseReply
    load: LoadReply
    round: RoundReply
    evaluate: EvaluateReply
    deliver: DeliverReply
    abort: AbortReply
    forward: ForwardReply
    def __init__(self, version: _Optional[int] = ..., run_id: _Optional[str] = ..., party: _Optional[str] = ..., fault: _Optional[_Union[StageFault, _Mapping]] = ..., enrol: _Optional[_Union[EnrolReply, _Mapping]] = ..., attest: _Optional[_Union[AttestReply, _Mapping]] = ..., release: _Optional[_Union[ReleaseReply, _Mapping]] = ..., load: _Optional[_Union[LoadReply, _Mapping]] = ..., round: _Optional[_Union[RoundReply, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateReply, _Mapping]] = ..., deliver: _Optional[_Union[DeliverReply, _Mapping]] = ..., abort: _Optional[_Union[AbortReply, _Mapping]] = ..., forward: _Optional[_Union[ForwardReply, _Mapping]] = ...) -> None: ...

class StageFault(_message.Message):
    __slots__ = ("code", "what", "safe", "fix", "reasons", "log")
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    SAFE_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    code: str
    what: str
    safe: str
    fix: str
    reasons: _containers.RepeatedScalarFieldContainer[str]
    log: bytes
    def __init__(self, code: _Optional[str] = ..., what: _Optional[str] = ..., safe: _Optional[str] = ..., fix: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ..., log: _Optional[bytes] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("contract",)
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    contract: bytes
    def __init__(self, contract: _Optional[bytes] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("signature", "nonces")
    class NoncesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NONCES_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    nonces: _containers.ScalarMap[str, bytes]
    def __init__(self, signature: _Optional[bytes] = ..., nonces: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class AttestRequest(_message.Message):
    __slots__ = ("contract_signatures", "aggregator_evidence", "provider_nonce", "aggregator_nonce", "peer_nonces")
    class ContractSignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class AggregatorEvidenceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class PeerNoncesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTRACT_SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_NONCE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_NONCE_FIELD_NUMBER: _ClassVar[int]
    PEER_NONCES_FIELD_NUMBER: _ClassVar[int]
    contract_signatures: _containers.ScalarMap[str, bytes]
    aggregator_evidence: _containers.ScalarMap[str, bytes]
    provider_nonce: bytes
    aggregator_nonce: bytes
    peer_nonces: _containers.ScalarMap[str, bytes]
    def __init__(self, contract_signatures: _Optional[_Mapping[str, bytes]] = ..., aggregator_evidence: _Optional[_Mapping[str, bytes]] = ..., provider_nonce: _Optional[bytes] = ..., aggregator_nonce: _Optional[bytes] = ..., peer_nonces: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class AttestReply(_message.Message):
    __slots__ = ("provider_evidence", "aggregator_evidence", "log_head", "announced")
    PROVIDER_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    provider_evidence: bytes
    aggregator_evidence: bytes
    log_head: bytes
    announced: PeerAnnouncement
    def __init__(self, provider_evidence: _Optional[bytes] = ..., aggregator_evidence: _Optional[bytes] = ..., log_head: _Optional[bytes] = ..., announced: _Optional[_Union[PeerAnnouncement, _Mapping]] = ...) -> None: ...

class PeerAnnouncement(_message.Message):
    __slots__ = ("evidence", "hello")
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    evidence: bytes
    hello: bytes
    def __init__(self, evidence: _Optional[bytes] = ..., hello: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("contract_signatures", "trainer_evidence", "aggregator_evidence", "log_heads")
    class ContractSignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class TrainerEvidenceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class LogHeadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTRACT_SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    TRAINER_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    LOG_HEADS_FIELD_NUMBER: _ClassVar[int]
    contract_signatures: _containers.ScalarMap[str, bytes]
    trainer_evidence: _containers.ScalarMap[str, bytes]
    aggregator_evidence: bytes
    log_heads: _containers.ScalarMap[str, bytes]
    def __init__(self, contract_signatures: _Optional[_Mapping[str, bytes]] = ..., trainer_evidence: _Optional[_Mapping[str, bytes]] = ..., aggregator_evidence: _Optional[bytes] = ..., log_heads: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("grants", "refused", "log")
    class GrantsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Grants
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Grants, _Mapping]] = ...) -> None: ...
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: StageFault
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[StageFault, _Mapping]] = ...) -> None: ...
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.MessageMap[str, Grants]
    refused: _containers.MessageMap[str, StageFault]
    log: bytes
    def __init__(self, grants: _Optional[_Mapping[str, Grants]] = ..., refused: _Optional[_Mapping[str, StageFault]] = ..., log: _Optional[bytes] = ...) -> None: ...

class Grants(_message.Message):
    __slots__ = ("by_model", "manifests", "log")
    class ByModelEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class ManifestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    BY_MODEL_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    by_model: _containers.ScalarMap[str, bytes]
    manifests: _containers.ScalarMap[str, bytes]
    log: bytes
    def __init__(self, by_model: _Optional[_Mapping[str, bytes]] = ..., manifests: _Optional[_Mapping[str, bytes]] = ..., log: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("grants", "group_grant", "announced")
    class AnnouncedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: PeerAnnouncement
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[PeerAnnouncement, _Mapping]] = ...) -> None: ...
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_GRANT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    grants: Grants
    group_grant: bytes
    announced: _containers.MessageMap[str, PeerAnnouncement]
    def __init__(self, grants: _Optional[_Union[Grants, _Mapping]] = ..., group_grant: _Optional[bytes] = ..., announced: _Optional[_Mapping[str, PeerAnnouncement]] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("receipts", "protected_metrics", "log_view", "ledger_head")
    class ReceiptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_METRICS_FIELD_NUMBER: _ClassVar[int]
    LOG_VIEW_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.ScalarMap[str, bytes]
    protected_metrics: bytes
    log_view: bytes
    ledger_head: bytes
    def __init__(self, receipts: _Optional[_Mapping[str, bytes]] = ..., protected_metrics: _Optional[bytes] = ..., log_view: _Optional[bytes] = ..., ledger_head: _Optional[bytes] = ...) -> None: ...

class RoundRequest(_message.Message):
    __slots__ = ("round", "state", "log_views", "masked")
    class LogViewsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOG_VIEWS_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    round: int
    state: bytes
    log_views: _containers.ScalarMap[str, bytes]
    masked: bytes
    def __init__(self, round: _Optional[int] = ..., state: _Optional[bytes] = ..., log_views: _Optional[_Mapping[str, bytes]] = ..., masked: _Optional[bytes] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("protected_update",)
    PROTECTED_UPDATE_FIELD_NUMBER: _ClassVar[int]
    protected_update: bytes
    def __init__(self, protected_update: _Optional[bytes] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("state", "masked", "round")
    STATE_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    masked: bytes
    round: int
    def __init__(self, state: _Optional[bytes] = ..., masked: _Optional[bytes] = ..., round: _Optional[int] = ...) -> None: ...

class EvaluateReply(_message.Message):
    __slots__ = ("protected_metrics",)
    PROTECTED_METRICS_FIELD_NUMBER: _ClassVar[int]
    protected_metrics: bytes
    def __init__(self, protected_metrics: _Optional[bytes] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("call",)
    CALL_FIELD_NUMBER: _ClassVar[int]
    call: _enclave_pb2.Call
    def __init__(self, call: _Optional[_Union[_enclave_pb2.Call, _Mapping]] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("protected",)
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    protected: bytes
    def __init__(self, protected: _Optional[bytes] = ...) -> None: ...

class DeliverRequest(_message.Message):
    __slots__ = ("delivery", "report", "receipts", "report_signature", "dossier")
    class ReceiptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Receipts
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Receipts, _Mapping]] = ...) -> None: ...
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DOSSIER_FIELD_NUMBER: _ClassVar[int]
    delivery: bytes
    report: bytes
    receipts: _containers.MessageMap[str, Receipts]
    report_signature: bytes
    dossier: bytes
    def __init__(self, delivery: _Optional[bytes] = ..., report: _Optional[bytes] = ..., receipts: _Optional[_Mapping[str, Receipts]] = ..., report_signature: _Optional[bytes] = ..., dossier: _Optional[bytes] = ...) -> None: ...

class Receipts(_message.Message):
    __slots__ = ("by_model", "ledger_head")
    class ByModelEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    BY_MODEL_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    by_model: _containers.ScalarMap[str, bytes]
    ledger_head: bytes
    def __init__(self, by_model: _Optional[_Mapping[str, bytes]] = ..., ledger_head: _Optional[bytes] = ...) -> None: ...

class DeliverReply(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: bool
    def __init__(self, stored: _Optional[bool] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("reason", "refused")
    REASON_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    refused: StageFault
    def __init__(self, reason: _Optional[str] = ..., refused: _Optional[_Union[StageFault, _Mapping]] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
