from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TargetMessage(_message.Message):
    __slots__ = ("hello", "open", "commit", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    commit: Commit
    close: Close
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class DrafterMessage(_message.Message):
    __slots__ = ("welcome", "growth", "lost")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    GROWTH_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    growth: Growth
    lost: Lost
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., growth: _Optional[_Union[Growth, _Mapping]] = ..., lost: _Optional[_Union[Lost, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "model", "vocab_hash", "vocab_size", "eos_ids", "numerics")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_IDS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: str
    vocab_hash: str
    vocab_size: int
    eos_ids: bytes
    numerics: str
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[str] = ..., vocab_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., eos_ids: _Optional[bytes] = ..., numerics: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "name", "model", "vocab_hash", "vocab_size", "numerics", "max_model_len", "max_sessions")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    name: str
    model: str
    vocab_hash: str
    vocab_size: int
    numerics: str
    max_model_len: int
    max_sessions: int
    def __init__(self, protocol_version: _Optional[int] = ..., name: _Optional[str] = ..., model: _Optional[str] = ..., vocab_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., numerics: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_sessions: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session", "generation", "token_ids", "prompt_length", "params", "choice", "limits")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    session: int
    generation: int
    token_ids: bytes
    prompt_length: int
    params: SamplingParams
    choice: int
    limits: GrowthLimits
    def __init__(self, session: _Optional[int] = ..., generation: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., prompt_length: _Optional[int] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., choice: _Optional[int] = ..., limits: _Optional[_Union[GrowthLimits, _Mapping]] = ...) -> None: ...

class GrowthLimits(_message.Message):
    __slots__ = ("width", "children", "steps", "min_score")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    width: int
    children: int
    steps: int
    min_score: float
    def __init__(self, width: _Optional[int] = ..., children: _Optional[int] = ..., steps: _Optional[int] = ..., min_score: _Optional[float] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids", "bad_words")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: bytes
    ignore_eos: bool
    logit_bias: _containers.ScalarMap[int, float]
    allowed_token_ids: bytes
    bad_words: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., ignore_eos: _Optional[bool] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., allowed_token_ids: _Optional[bytes] = ..., bad_words: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("session", "generation", "sequence", "base_length", "tokens", "prefix_hash", "steps")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    session: int
    generation: int
    sequence: int
    base_length: int
    tokens: bytes
    prefix_hash: int
    steps: int
    def __init__(self, session: _Optional[int] = ..., generation: _Optional[int] = ..., sequence: _Optional[int] = ..., base_length: _Optional[int] = ..., tokens: _Optional[bytes] = ..., prefix_hash: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("session", "generation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    session: int
    generation: int
    def __init__(self, session: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Growth(_message.Message):
    __slots__ = ("session", "generation", "seen_commit", "base_length", "first_id", "parents", "tokens", "scores", "final", "draft_steps", "draft_rows", "draft_seconds", "sent_at")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEEN_COMMIT_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    DRAFT_STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    session: int
    generation: int
    seen_commit: int
    base_length: int
    first_id: int
    parents: bytes
    tokens: bytes
    scores: bytes
    final: bool
    draft_steps: int
    draft_rows: int
    draft_seconds: float
    sent_at: float
    def __init__(self, session: _Optional[int] = ..., generation: _Optional[int] = ..., seen_commit: _Optional[int] = ..., base_length: _Optional[int] = ..., first_id: _Optional[int] = ..., parents: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., scores: _Optional[bytes] = ..., final: _Optional[bool] = ..., draft_steps: _Optional[int] = ..., draft_rows: _Optional[int] = ..., draft_seconds: _Optional[float] = ..., sent_at: _Optional[float] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ("session", "generation", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: int
    generation: int
    reason: str
    def __init__(self, session: _Optional[int] = ..., generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
