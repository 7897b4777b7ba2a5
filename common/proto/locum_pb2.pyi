from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("request", "mac")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    mac: bytes
    def __init__(self, request: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class Certificates(_message.Message):
    __slots__ = ("certificate", "authority", "log_certificate")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    LOG_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authority: bytes
    log_certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., log_certificate: _Optional[bytes] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("instance", "activity", "run", "round", "done", "total", "version", "clock")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    instance: str
    activity: str
    run: str
    round: int
    done: int
    total: int
    version: str
    clock: float
    def __init__(self, instance: _Optional[str] = ..., activity: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., version: _Optional[str] = ..., clock: _Optional[float] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("clock", "registry_state", "log_size")
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_STATE_FIELD_NUMBER: _ClassVar[int]
    LOG_SIZE_FIELD_NUMBER: _ClassVar[int]
    clock: float
    registry_state: int
    log_size: int
    def __init__(self, clock: _Optional[float] = ..., registry_state: _Optional[int] = ..., log_size: _Optional[int] = ...) -> None: ...

class ProposalsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProposalsReply(_message.Message):
    __slots__ = ("envelopes",)
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    envelopes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, envelopes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ApproveRequest(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    def __init__(self, envelope: _Optional[bytes] = ...) -> None: ...

class ApproveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GreetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Greeting(_message.Message):
    __slots__ = ("clock", "version")
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    clock: float
    version: str
    def __init__(self, clock: _Optional[float] = ..., version: _Optional[str] = ...) -> None: ...

class WitnessRequest(_message.Message):
    __slots__ = ("size", "cosignature")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    COSIGNATURE_FIELD_NUMBER: _ClassVar[int]
    size: int
    cosignature: bytes
    def __init__(self, size: _Optional[int] = ..., cosignature: _Optional[bytes] = ...) -> None: ...

class WitnessReply(_message.Message):
    __slots__ = ("checkpoint", "proof")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    checkpoint: bytes
    proof: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[bytes] = ..., proof: _Optional[_Iterable[bytes]] = ...) -> None: ...

class QuestionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class QuestionsReply(_message.Message):
    __slots__ = ("envelopes",)
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    envelopes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, envelopes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StateRequest(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    def __init__(self, envelope: _Optional[bytes] = ...) -> None: ...

class StateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetCall(_message.Message):
    __slots__ = ("path", "headers", "body", "instance")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    path: str
    headers: _containers.ScalarMap[str, str]
    body: bytes
    instance: str
    def __init__(self, path: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ..., body: _Optional[bytes] = ..., instance: _Optional[str] = ...) -> None: ...

class FleetAnswer(_message.Message):
    __slots__ = ("status", "body")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    status: int
    body: bytes
    def __init__(self, status: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...

class BlobKey(_message.Message):
    __slots__ = ("run", "sha256", "size")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    run: str
    sha256: str
    size: int
    def __init__(self, run: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class BlobState(_message.Message):
    __slots__ = ("have", "complete")
    HAVE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    have: int
    complete: bool
    def __init__(self, have: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class PutChunk(_message.Message):
    __slots__ = ("key", "offset", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: BlobKey
    offset: int
    data: bytes
    def __init__(self, key: _Optional[_Union[BlobKey, _Mapping]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("key", "offset")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    key: BlobKey
    offset: int
    def __init__(self, key: _Optional[_Union[BlobKey, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Sent(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodes: _Optional[_Iterable[int]] = ...) -> None: ...

class Replied(_message.Message):
    __slots__ = ("reply_to",)
    REPLY_TO_FIELD_NUMBER: _ClassVar[int]
    reply_to: str
    def __init__(self, reply_to: _Optional[str] = ...) -> None: ...
