from fedark.v1 import enclave_pb2 as _enclave_pb2
from fedark.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("party", "role", "run_id", "stage")
    PARTY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    party: str
    role: str
    run_id: str
    stage: str
    def __init__(self, party: _Optional[str] = ..., role: _Optional[str] = ..., run_id: _Optional[str] = ..., stage: _Optional[str] = ...) -> None: ...

class JobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JobsReply(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("name", "contract", "decision", "reason", "expires")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    name: str
    contract: bytes
    decision: str
    reason: str
    expires: str
    def __init__(self, name: _Optional[str] = ..., contract: _Optional[bytes] = ..., decision: _Optional[str] = ..., reason: _Optional[str] = ..., expires: _Optional[str] = ...) -> None: ...

class LedgerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LedgerReply(_message.Message):
    __slots__ = ("entries", "spent", "charges")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    CHARGES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[LedgerEntry]
    spent: _containers.RepeatedCompositeFieldContainer[Job]
    charges: _containers.RepeatedCompositeFieldContainer[Charge]
    def __init__(self, entries: _Optional[_Iterable[_Union[LedgerEntry, _Mapping]]] = ..., spent: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., charges: _Optional[_Iterable[_Union[Charge, _Mapping]]] = ...) -> None: ...

class Charge(_message.Message):
    __slots__ = ("contract", "run_id", "time", "unit", "epsilon", "delta", "records", "releases", "released")
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    contract: bytes
    run_id: str
    time: int
    unit: str
    epsilon: float
    delta: float
    records: int
    releases: int
    released: int
    def __init__(self, contract: _Optional[bytes] = ..., run_id: _Optional[str] = ..., time: _Optional[int] = ..., unit: _Optional[str] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., records: _Optional[int] = ..., releases: _Optional[int] = ..., released: _Optional[int] = ...) -> None: ...

class LedgerEntry(_message.Message):
    __slots__ = ("index", "time", "kind", "party", "run_id", "note")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    index: int
    time: int
    kind: str
    party: str
    run_id: str
    note: str
    def __init__(self, index: _Optional[int] = ..., time: _Optional[int] = ..., kind: _Optional[str] = ..., party: _Optional[str] = ..., run_id: _Optional[str] = ..., note: _Optional[str] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AggregatorRequest(_message.Message):
    __slots__ = ("run_id", "open", "call", "outcome", "progress", "log", "keep", "sign", "only_if_done")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    ONLY_IF_DONE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    open: OpenRun
    call: _enclave_pb2.Call
    outcome: Outcome
    progress: Told
    log: ShownLog
    keep: Kept
    sign: SignReport
    only_if_done: bool
    def __init__(self, run_id: _Optional[str] = ..., open: _Optional[_Union[OpenRun, _Mapping]] = ..., call: _Optional[_Union[_enclave_pb2.Call, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., progress: _Optional[_Union[Told, _Mapping]] = ..., log: _Optional[_Union[ShownLog, _Mapping]] = ..., keep: _Optional[_Union[Kept, _Mapping]] = ..., sign: _Optional[_Union[SignReport, _Mapping]] = ..., only_if_done: _Optional[bool] = ...) -> None: ...

class AggregatorReply(_message.Message):
    __slots__ = ("fault", "opened", "reply", "stored", "signed")
    FAULT_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    fault: _stage_pb2.StageFault
    opened: OpenedRun
    reply: _enclave_pb2.Reply
    stored: OutcomeStored
    signed: SignedReport
    def __init__(self, fault: _Optional[_Union[_stage_pb2.StageFault, _Mapping]] = ..., opened: _Optional[_Union[OpenedRun, _Mapping]] = ..., reply: _Optional[_Union[_enclave_pb2.Reply, _Mapping]] = ..., stored: _Optional[_Union[OutcomeStored, _Mapping]] = ..., signed: _Optional[_Union[SignedReport, _Mapping]] = ...) -> None: ...

class OpenRun(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenedRun(_message.Message):
    __slots__ = ("run_id", "contract", "collateral", "timeouts", "log_head", "kept", "finished")
    class CollateralEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class TimeoutsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    COLLATERAL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUTS_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    contract: bytes
    collateral: _containers.ScalarMap[str, bytes]
    timeouts: _containers.ScalarMap[str, float]
    log_head: bytes
    kept: bytes
    finished: bool
    def __init__(self, run_id: _Optional[str] = ..., contract: _Optional[bytes] = ..., collateral: _Optional[_Mapping[str, bytes]] = ..., timeouts: _Optional[_Mapping[str, float]] = ..., log_head: _Optional[bytes] = ..., kept: _Optional[bytes] = ..., finished: _Optional[bool] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    def __init__(self, state: _Optional[bytes] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("report", "failed", "dossier")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DOSSIER_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    failed: _stage_pb2.StageFault
    dossier: bytes
    def __init__(self, report: _Optional[bytes] = ..., failed: _Optional[_Union[_stage_pb2.StageFault, _Mapping]] = ..., dossier: _Optional[bytes] = ...) -> None: ...

class OutcomeStored(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShownLog(_message.Message):
    __slots__ = ("update", "refused")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    update: bytes
    refused: bool
    def __init__(self, update: _Optional[bytes] = ..., refused: _Optional[bool] = ...) -> None: ...

class SignReport(_message.Message):
    __slots__ = ("report", "dossier")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    DOSSIER_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    dossier: bytes
    def __init__(self, report: _Optional[bytes] = ..., dossier: _Optional[bytes] = ...) -> None: ...

class SignedReport(_message.Message):
    __slots__ = ("signature", "dossier")
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DOSSIER_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    dossier: bytes
    def __init__(self, signature: _Optional[bytes] = ..., dossier: _Optional[bytes] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("text", "ended")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    text: str
    ended: StageEnd
    def __init__(self, text: _Optional[str] = ..., ended: _Optional[_Union[StageEnd, _Mapping]] = ...) -> None: ...

class StageEnd(_message.Message):
    __slots__ = ("stage", "seconds", "sent", "received")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    stage: str
    seconds: float
    sent: int
    received: int
    def __init__(self, stage: _Optional[str] = ..., seconds: _Optional[float] = ..., sent: _Optional[int] = ..., received: _Optional[int] = ...) -> None: ...
