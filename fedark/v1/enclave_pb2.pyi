from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("call", "reply", "fault", "progress", "quote_request", "quote_reply", "sealing_request", "sealing_reply")
    CALL_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    QUOTE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUOTE_REPLY_FIELD_NUMBER: _ClassVar[int]
    SEALING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SEALING_REPLY_FIELD_NUMBER: _ClassVar[int]
    call: Call
    reply: Reply
    fault: Fault
    progress: Progress
    quote_request: QuoteRequest
    quote_reply: QuoteReply
    sealing_request: SealingRequest
    sealing_reply: SealingReply
    def __init__(self, call: _Optional[_Union[Call, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., quote_request: _Optional[_Union[QuoteRequest, _Mapping]] = ..., quote_reply: _Optional[_Union[QuoteReply, _Mapping]] = ..., sealing_request: _Optional[_Union[SealingRequest, _Mapping]] = ..., sealing_reply: _Optional[_Union[SealingReply, _Mapping]] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("start", "challenge", "attest", "admit_peer", "grant", "sealed", "records", "begin", "round", "evaluate", "submit", "close", "deliver", "peer_nonce", "announce", "join", "open_round", "survivors", "endorse", "unmask", "reopen", "resume", "personal", "measure", "adapter", "ask", "write", "vouch")
    START_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    ATTEST_FIELD_NUMBER: _ClassVar[int]
    ADMIT_PEER_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    DELIVER_FIELD_NUMBER: _ClassVar[int]
    PEER_NONCE_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    OPEN_ROUND_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    ENDORSE_FIELD_NUMBER: _ClassVar[int]
    UNMASK_FIELD_NUMBER: _ClassVar[int]
    REOPEN_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    VOUCH_FIELD_NUMBER: _ClassVar[int]
    start: Start
    challenge: Challenge
    attest: Attest
    admit_peer: AdmitPeer
    grant: Grant
    sealed: Sealed
    records: Records
    begin: Begin
    round: Round
    evaluate: Evaluate
    submit: Submit
    close: Close
    deliver: Deliver
    peer_nonce: PeerNonce
    announce: Announce
    join: Join
    open_round: OpenRound
    survivors: Survivors
    endorse: Endorse
    unmask: Unmask
    reopen: Reopen
    resume: Resume
    personal: Personal
    measure: Measure
    adapter: Adapter
    ask: Ask
    write: Write
    vouch: Vouch
    def __init__(self, start: _Optional[_Union[Start, _Mapping]] = ..., challenge: _Optional[_Union[Challenge, _Mapping]] = ..., attest: _Optional[_Union[Attest, _Mapping]] = ..., admit_peer: _Optional[_Union[AdmitPeer, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ..., records: _Optional[_Union[Records, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., round: _Optional[_Union[Round, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., deliver: _Optional[_Union[Deliver, _Mapping]] = ..., peer_nonce: _Optional[_Union[PeerNonce, _Mapping]] = ..., announce: _Optional[_Union[Announce, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., open_round: _Optional[_Union[OpenRound, _Mapping]] = ..., survivors: _Optional[_Union[Survivors, _Mapping]] = ..., endorse: _Optional[_Union[Endorse, _Mapping]] = ..., unmask: _Optional[_Union[Unmask, _Mapping]] = ..., reopen: _Optional[_Union[Reopen, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., personal: _Optional[_Union[Personal, _Mapping]] = ..., measure: _Optional[_Union[Measure, _Mapping]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., write: _Optional[_Union[Write, _Mapping]] = ..., vouch: _Optional[_Union[Vouch, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("hello", "nonce", "evidence", "admitted", "receipt", "done", "measured", "update", "closed", "delivery", "announcement", "opened", "asked", "personal", "answered", "written", "unusable", "checkpoint")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    nonce: Nonce
    evidence: Evidence
    admitted: Admitted
    receipt: Receipt
    done: Done
    measured: Measured
    update: Update
    closed: Closed
    delivery: Delivery
    announcement: Announcement
    opened: Opened
    asked: Asked
    personal: PersonalAdapters
    answered: Answered
    written: Written
    unusable: Unusable
    checkpoint: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., nonce: _Optional[_Union[Nonce, _Mapping]] = ..., evidence: _Optional[_Union[Evidence, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., delivery: _Optional[_Union[Delivery, _Mapping]] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., asked: _Optional[_Union[Asked, _Mapping]] = ..., personal: _Optional[_Union[PersonalAdapters, _Mapping]] = ..., answered: _Optional[_Union[Answered, _Mapping]] = ..., written: _Optional[_Union[Written, _Mapping]] = ..., unusable: _Optional[_Union[Unusable, _Mapping]] = ..., checkpoint: _Optional[bytes] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("run_config",)
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    run_config: bytes
    def __init__(self, run_config: _Optional[bytes] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: bytes
    def __init__(self, checkpoint: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("hpke_public", "signing_public")
    HPKE_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    SIGNING_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    hpke_public: bytes
    signing_public: bytes
    def __init__(self, hpke_public: _Optional[bytes] = ..., signing_public: _Optional[bytes] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("peer",)
    PEER_FIELD_NUMBER: _ClassVar[int]
    peer: str
    def __init__(self, peer: _Optional[str] = ...) -> None: ...

class Nonce(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Attest(_message.Message):
    __slots__ = ("nonce", "peer")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    peer: str
    def __init__(self, nonce: _Optional[bytes] = ..., peer: _Optional[str] = ...) -> None: ...

class Vouch(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    def __init__(self, signature: _Optional[bytes] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("evidence",)
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    evidence: bytes
    def __init__(self, evidence: _Optional[bytes] = ...) -> None: ...

class AdmitPeer(_message.Message):
    __slots__ = ("peer", "evidence", "contract_signatures", "collateral")
    class ContractSignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class CollateralEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    PEER_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    COLLATERAL_FIELD_NUMBER: _ClassVar[int]
    peer: str
    evidence: bytes
    contract_signatures: _containers.ScalarMap[str, bytes]
    collateral: _containers.ScalarMap[str, bytes]
    def __init__(self, peer: _Optional[str] = ..., evidence: _Optional[bytes] = ..., contract_signatures: _Optional[_Mapping[str, bytes]] = ..., collateral: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("group_grant",)
    GROUP_GRANT_FIELD_NUMBER: _ClassVar[int]
    group_grant: bytes
    def __init__(self, group_grant: _Optional[bytes] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("model", "manifest", "grant", "group_grant")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    GROUP_GRANT_FIELD_NUMBER: _ClassVar[int]
    model: str
    manifest: bytes
    grant: bytes
    group_grant: bytes
    def __init__(self, model: _Optional[str] = ..., manifest: _Optional[bytes] = ..., grant: _Optional[bytes] = ..., group_grant: _Optional[bytes] = ...) -> None: ...

class Reopen(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("model", "data", "last")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    model: str
    data: bytes
    last: bool
    def __init__(self, model: _Optional[str] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    def __init__(self, receipt: _Optional[bytes] = ...) -> None: ...

class Records(_message.Message):
    __slots__ = ("split", "records", "last")
    class Split(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TRAIN: _ClassVar[Records.Split]
        TEST: _ClassVar[Records.Split]
    TRAIN: Records.Split
    TEST: Records.Split
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    split: Records.Split
    records: _containers.RepeatedCompositeFieldContainer[Record]
    last: bool
    def __init__(self, split: _Optional[_Union[Records.Split, str]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("prompt", "answer")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    answer: str
    def __init__(self, prompt: _Optional[str] = ..., answer: _Optional[str] = ...) -> None: ...

class Unusable(_message.Message):
    __slots__ = ("train", "test")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    TEST_FIELD_NUMBER: _ClassVar[int]
    train: _containers.RepeatedScalarFieldContainer[int]
    test: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, train: _Optional[_Iterable[int]] = ..., test: _Optional[_Iterable[int]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("weights", "usage")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    weights: bool
    usage: bytes
    def __init__(self, weights: _Optional[bool] = ..., usage: _Optional[bytes] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "state", "masked")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    round: int
    state: bytes
    masked: bytes
    def __init__(self, round: _Optional[int] = ..., state: _Optional[bytes] = ..., masked: _Optional[bytes] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("state", "masked", "round")
    STATE_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    masked: bytes
    round: int
    def __init__(self, state: _Optional[bytes] = ..., masked: _Optional[bytes] = ..., round: _Optional[int] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ("round", "state")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    round: int
    state: bytes
    def __init__(self, round: _Optional[int] = ..., state: _Optional[bytes] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("local", "protected", "own")
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    local: bytes
    protected: bytes
    own: bytes
    def __init__(self, local: _Optional[bytes] = ..., protected: _Optional[bytes] = ..., own: _Optional[bytes] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("protected",)
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    protected: bytes
    def __init__(self, protected: _Optional[bytes] = ...) -> None: ...

class Personal(_message.Message):
    __slots__ = ("delivery", "seal_to")
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    SEAL_TO_FIELD_NUMBER: _ClassVar[int]
    delivery: bytes
    seal_to: bytes
    def __init__(self, delivery: _Optional[bytes] = ..., seal_to: _Optional[bytes] = ...) -> None: ...

class PersonalAdapters(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: bytes
    def __init__(self, adapters: _Optional[bytes] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("round", "party", "protected", "part")
    class Part(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UPDATE: _ClassVar[Submit.Part]
        ENDORSEMENT: _ClassVar[Submit.Part]
        SHARES: _ClassVar[Submit.Part]
        CURVE: _ClassVar[Submit.Part]
    UPDATE: Submit.Part
    ENDORSEMENT: Submit.Part
    SHARES: Submit.Part
    CURVE: Submit.Part
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    round: int
    party: str
    protected: bytes
    part: Submit.Part
    def __init__(self, round: _Optional[int] = ..., party: _Optional[str] = ..., protected: _Optional[bytes] = ..., part: _Optional[_Union[Submit.Part, str]] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("round", "curve")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    round: int
    curve: bool
    def __init__(self, round: _Optional[int] = ..., curve: _Optional[bool] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("state", "metrics", "statement", "ended", "curve")
    STATE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    metrics: bytes
    statement: bytes
    ended: bool
    curve: bytes
    def __init__(self, state: _Optional[bytes] = ..., metrics: _Optional[bytes] = ..., statement: _Optional[bytes] = ..., ended: _Optional[bool] = ..., curve: _Optional[bytes] = ...) -> None: ...

class Deliver(_message.Message):
    __slots__ = ("party",)
    PARTY_FIELD_NUMBER: _ClassVar[int]
    party: str
    def __init__(self, party: _Optional[str] = ...) -> None: ...

class Delivery(_message.Message):
    __slots__ = ("sealed", "statement")
    SEALED_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    sealed: bytes
    statement: bytes
    def __init__(self, sealed: _Optional[bytes] = ..., statement: _Optional[bytes] = ...) -> None: ...

class PeerNonce(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Announce(_message.Message):
    __slots__ = ("nonces",)
    class NoncesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NONCES_FIELD_NUMBER: _ClassVar[int]
    nonces: _containers.ScalarMap[str, bytes]
    def __init__(self, nonces: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("evidence", "hello")
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    evidence: bytes
    hello: bytes
    def __init__(self, evidence: _Optional[bytes] = ..., hello: _Optional[bytes] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("peers", "collateral")
    class PeersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Announcement
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Announcement, _Mapping]] = ...) -> None: ...
    class CollateralEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    PEERS_FIELD_NUMBER: _ClassVar[int]
    COLLATERAL_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.MessageMap[str, Announcement]
    collateral: _containers.ScalarMap[str, bytes]
    def __init__(self, peers: _Optional[_Mapping[str, Announcement]] = ..., collateral: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class OpenRound(_message.Message):
    __slots__ = ("round", "parties")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTIES_FIELD_NUMBER: _ClassVar[int]
    round: int
    parties: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, round: _Optional[int] = ..., parties: _Optional[_Iterable[str]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("masked",)
    MASKED_FIELD_NUMBER: _ClassVar[int]
    masked: bytes
    def __init__(self, masked: _Optional[bytes] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("round", "endorsed")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ENDORSED_FIELD_NUMBER: _ClassVar[int]
    round: int
    endorsed: bool
    def __init__(self, round: _Optional[int] = ..., endorsed: _Optional[bool] = ...) -> None: ...

class Asked(_message.Message):
    __slots__ = ("endorse", "unmask")
    class EndorseEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class UnmaskEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ENDORSE_FIELD_NUMBER: _ClassVar[int]
    UNMASK_FIELD_NUMBER: _ClassVar[int]
    endorse: _containers.ScalarMap[str, bytes]
    unmask: _containers.ScalarMap[str, bytes]
    def __init__(self, endorse: _Optional[_Mapping[str, bytes]] = ..., unmask: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Endorse(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class Unmask(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "flat", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FLAT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    flat: bytes
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., flat: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("adapter", "prompts", "longest", "stop", "records", "adapters")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    prompts: _containers.RepeatedScalarFieldContainer[str]
    longest: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter: _Optional[str] = ..., prompts: _Optional[_Iterable[str]] = ..., longest: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class Answered(_message.Message):
    __slots__ = ("answers", "usage")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    answers: bytes
    usage: bytes
    def __init__(self, answers: _Optional[bytes] = ..., usage: _Optional[bytes] = ...) -> None: ...

class Wish(_message.Message):
    __slots__ = ("id", "adapter", "prompt", "longest", "stop", "temperature", "top_p", "seed")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    id: int
    adapter: str
    prompt: str
    longest: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    temperature: float
    top_p: float
    seed: int
    def __init__(self, id: _Optional[int] = ..., adapter: _Optional[str] = ..., prompt: _Optional[str] = ..., longest: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Write(_message.Message):
    __slots__ = ("begin", "drop", "steps")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    begin: _containers.RepeatedCompositeFieldContainer[Wish]
    drop: _containers.RepeatedScalarFieldContainer[int]
    steps: int
    def __init__(self, begin: _Optional[_Iterable[_Union[Wish, _Mapping]]] = ..., drop: _Optional[_Iterable[int]] = ..., steps: _Optional[int] = ...) -> None: ...

class Written(_message.Message):
    __slots__ = ("pieces", "usage")
    PIECES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    pieces: bytes
    usage: bytes
    def __init__(self, pieces: _Optional[bytes] = ..., usage: _Optional[bytes] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("code", "what", "safe", "fix", "reasons")
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    SAFE_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    code: str
    what: str
    safe: str
    fix: str
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, code: _Optional[str] = ..., what: _Optional[str] = ..., safe: _Optional[str] = ..., fix: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total", "value")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    done: int
    total: int
    value: float
    def __init__(self, stage: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class QuoteRequest(_message.Message):
    __slots__ = ("report_data", "nonce")
    REPORT_DATA_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    report_data: bytes
    nonce: bytes
    def __init__(self, report_data: _Optional[bytes] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class QuoteReply(_message.Message):
    __slots__ = ("token", "platform")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    platform: str
    def __init__(self, token: _Optional[bytes] = ..., platform: _Optional[str] = ...) -> None: ...

class SealingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SealingReply(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...
