from fedark.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BrokerCase(_message.Message):
    __slots__ = ("contract", "contract_signatures", "run_id", "party", "lease")
    class ContractSignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    contract: bytes
    contract_signatures: _containers.ScalarMap[str, bytes]
    run_id: str
    party: str
    lease: bool
    def __init__(self, contract: _Optional[bytes] = ..., contract_signatures: _Optional[_Mapping[str, bytes]] = ..., run_id: _Optional[str] = ..., party: _Optional[str] = ..., lease: _Optional[bool] = ...) -> None: ...

class BrokerChallengeRequest(_message.Message):
    __slots__ = ("about",)
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    about: BrokerCase
    def __init__(self, about: _Optional[_Union[BrokerCase, _Mapping]] = ...) -> None: ...

class BrokerChallengeReply(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class BrokerReleaseRequest(_message.Message):
    __slots__ = ("about", "evidence", "log_head", "usage")
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    about: BrokerCase
    evidence: bytes
    log_head: bytes
    usage: bytes
    def __init__(self, about: _Optional[_Union[BrokerCase, _Mapping]] = ..., evidence: _Optional[bytes] = ..., log_head: _Optional[bytes] = ..., usage: _Optional[bytes] = ...) -> None: ...
