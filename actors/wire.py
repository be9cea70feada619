"""The one place that turns protobuf into the dataclasses of the protocol, and back.

The format is documented in ``protos/speculation.proto``. Decoding trusts nothing: sizes are
checked before arrays are made of them, values before they leave this file. Encoding is given
messages of our own making and checks nothing; what a user may freely choose is clipped.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from outrider.actors import wire_checks as checks
from outrider.protos import speculation_pb2 as pb
from outrider.speculation.errors import InvalidRequestError, WireError
from outrider.speculation.replication.messages import (
    MAX_GROWTH_NODES,
    NO_LIMIT,
    Close,
    Commit,
    DrafterMessage,
    Growth,
    GrowthLimits,
    Hello,
    Lost,
    Open,
    TargetMessage,
    Welcome,
)
from outrider.speculation.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams

MAX_TOKENS = 1 << 20
"""Most token ids of an ``Open`` or a ``Commit``."""
MAX_LISTED_IDS = 1 << 18
"""Most token ids of a list of sampling parameters; no vocabulary has more."""
MAX_MESSAGE_BYTES = 16 << 20

_DRAFTING = pb.DESCRIPTOR.services_by_name["Drafting"]
SERVICE: str = _DRAFTING.full_name
METHOD: str = _DRAFTING.methods_by_name["Replicate"].name

_BOUNDLESS = 2**31 - 1
"""Stands for larger top_k, max_tokens and min_tokens: no vocabulary and no text is larger."""
_LONGEST = 1e12
"""Seconds; it keeps infinities and NaN out of sums."""

_Message = TypeVar("_Message", pb.TargetMessage, pb.DrafterMessage)


def encode_target(message: TargetMessage) -> bytes:
    """What a target sends."""
    return _ENCODERS[type(message)](message)


def encode_drafter(message: DrafterMessage) -> bytes:
    """What a draft worker sends."""
    return _ENCODERS[type(message)](message)


def decode_target(data: bytes) -> TargetMessage:
    """What a target sent.

    Raises:
        WireError: it is not such a message, or a value in it is out of range.
    """
    message = _parse(pb.TargetMessage, data)
    kind = message.WhichOneof("message")
    if kind == "commit":
        return _decode_commit(message.commit)
    if kind == "open":
        return _decode_open(message.open)
    if kind == "close":
        return Close(
            session=checks.session_number(message.close.session), generation=message.close.generation
        )
    if kind == "hello":
        return _decode_hello(message.hello)
    raise WireError(f"a target's message of {len(data)} bytes holds none of the known kinds")


def decode_drafter(data: bytes) -> DrafterMessage:
    """What a draft worker sent.

    Raises:
        WireError: it is not such a message, or a value in it is out of range.
    """
    message = _parse(pb.DrafterMessage, data)
    kind = message.WhichOneof("message")
    if kind == "growth":
        return _decode_growth(message.growth)
    if kind == "lost":
        lost = message.lost
        reason = checks.text("reason", lost.reason)
        return Lost(session=checks.session_number(lost.session), generation=lost.generation, reason=reason)
    if kind == "welcome":
        return _decode_welcome(message.welcome)
    raise WireError(f"a drafter's message of {len(data)} bytes holds none of the known kinds")


def _encode_hello(hello: Hello) -> bytes:
    fields = pb.Hello(
        protocol_version=hello.protocol_version,
        model=hello.model,
        vocab_hash=hello.vocab_hash,
        vocab_size=hello.vocab_size,
        eos_ids=checks.pack(hello.eos_ids),
        numerics=hello.numerics,
    )
    return pb.TargetMessage(hello=fields).SerializeToString()


def _decode_hello(hello: pb.Hello) -> Hello:
    return Hello(
        protocol_version=hello.protocol_version,
        model=checks.text("model", hello.model),
        vocab_hash=checks.text("vocab_hash", hello.vocab_hash),
        vocab_size=checks.at_least("vocab_size", hello.vocab_size, 1),
        eos_ids=tuple(checks.token_ids("eos_ids", hello.eos_ids, MAX_LISTED_IDS).tolist()),
        numerics=checks.text("numerics", hello.numerics),
    )


def _encode_welcome(welcome: Welcome) -> bytes:
    fields = pb.Welcome(
        protocol_version=welcome.protocol_version,
        name=welcome.name,
        model=welcome.model,
        vocab_hash=welcome.vocab_hash,
        vocab_size=welcome.vocab_size,
        numerics=welcome.numerics,
        max_model_len=welcome.max_model_len,
        max_sessions=welcome.max_sessions,
    )
    return pb.DrafterMessage(welcome=fields).SerializeToString()


def _decode_welcome(welcome: pb.Welcome) -> Welcome:
    return Welcome(
        protocol_version=welcome.protocol_version,
        name=checks.text("name", welcome.name),
        model=checks.text("model", welcome.model),
        vocab_hash=checks.text("vocab_hash", welcome.vocab_hash),
        vocab_size=checks.at_least("vocab_size", welcome.vocab_size, 1),
        numerics=checks.text("numerics", welcome.numerics),
        max_model_len=checks.at_least("max_model_len", welcome.max_model_len, 1),
        max_sessions=checks.at_least("max_sessions", welcome.max_sessions, 1),
    )


def _encode_open(opening: Open) -> bytes:
    limits = opening.limits
    fields = pb.Open(
        session=opening.session,
        generation=opening.generation,
        token_ids=checks.pack(opening.token_ids),
        prompt_length=opening.prompt_length,
        params=_encode_params(opening.params),
        choice=opening.choice,
        limits=pb.GrowthLimits(
            width=limits.width, children=limits.children, steps=limits.steps, min_score=limits.min_score
        ),
    )
    return pb.TargetMessage(open=fields).SerializeToString()


def _decode_open(opening: pb.Open) -> Open:
    token_ids = checks.token_ids("token_ids", opening.token_ids, MAX_TOKENS)
    prompt_length = checks.at_least("prompt_length", opening.prompt_length, 1)
    if prompt_length > len(token_ids):
        raise WireError(f"prompt_length must be at most the {len(token_ids)} token_ids, not {prompt_length}")
    limits = opening.limits
    return Open(
        session=checks.session_number(opening.session),
        generation=opening.generation,
        token_ids=token_ids,
        prompt_length=prompt_length,
        params=_decode_params(opening.params),
        choice=opening.choice,
        limits=GrowthLimits(
            width=checks.at_least("width", limits.width, 1),
            children=checks.at_least("children", limits.children, 1),
            steps=checks.at_least("steps", limits.steps, NO_LIMIT),
            min_score=checks.between("min_score", limits.min_score, 0.0, 1.0),
        ),
    )


def _encode_params(params: SamplingParams) -> pb.SamplingParams:
    assert params.seed is not None, "a target draws the seed before it opens a session"
    allowed = params.allowed_token_ids
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, _BOUNDLESS),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        max_tokens=min(params.max_tokens, _BOUNDLESS),
        min_tokens=min(params.min_tokens, _BOUNDLESS),
        stop_token_ids=checks.pack(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias,
        allowed_token_ids=None if allowed is None else checks.pack(allowed),
        bad_words=[checks.pack(word) for word in params.bad_words_token_ids],
    )


def _decode_params(params: pb.SamplingParams) -> SamplingParams:
    biases = params.logit_bias
    checks.check_count("logit_bias", len(biases), MAX_LISTED_IDS)
    checks.check_count("bad_words", len(params.bad_words), MAX_BAD_WORDS)
    words = [checks.token_ids("bad_words", word, MAX_BAD_WORD_TOKENS).tolist() for word in params.bad_words]
    allowed = None
    if params.HasField("allowed_token_ids"):
        allowed = checks.token_ids("allowed_token_ids", params.allowed_token_ids, MAX_LISTED_IDS).tolist()
    try:
        return SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=params.seed,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop_token_ids=checks.token_ids("stop_token_ids", params.stop_token_ids, MAX_LISTED_IDS).tolist(),
            ignore_eos=params.ignore_eos,
            logit_bias=dict(biases) if biases else None,
            allowed_token_ids=allowed,
            bad_words_token_ids=words,
        )
    except InvalidRequestError as error:
        raise WireError(str(error)) from error


def _encode_commit(commit: Commit) -> bytes:
    fields = pb.Commit(
        session=commit.session,
        generation=commit.generation,
        sequence=commit.sequence,
        base_length=commit.base_length,
        tokens=checks.pack(commit.tokens),
        prefix_hash=commit.prefix_hash,
        steps=commit.steps,
    )
    return pb.TargetMessage(commit=fields).SerializeToString()


def _decode_commit(commit: pb.Commit) -> Commit:
    return Commit(
        session=checks.session_number(commit.session),
        generation=commit.generation,
        sequence=checks.at_least("sequence", commit.sequence, 1),
        base_length=commit.base_length,
        tokens=checks.token_ids("tokens", commit.tokens, MAX_TOKENS),
        prefix_hash=commit.prefix_hash,
        steps=checks.at_least("steps", commit.steps, NO_LIMIT),
    )


def _encode_close(close: Close) -> bytes:
    fields = pb.Close(session=close.session, generation=close.generation)
    return pb.TargetMessage(close=fields).SerializeToString()


def _encode_growth(growth: Growth) -> bytes:
    fields = pb.Growth(
        session=growth.session,
        generation=growth.generation,
        seen_commit=growth.seen_commit,
        base_length=growth.base_length,
        first_id=growth.first_id,
        parents=checks.pack(growth.parents),
        tokens=checks.pack(growth.tokens),
        scores=growth.scores.astype("<f4").tobytes(),
        final=growth.final,
        draft_steps=growth.draft_steps,
        draft_rows=growth.draft_rows,
        draft_seconds=growth.draft_seconds,
        sent_at=growth.sent_at,
    )
    return pb.DrafterMessage(growth=fields).SerializeToString()


def _decode_growth(growth: pb.Growth) -> Growth:
    tokens = checks.token_ids("tokens", growth.tokens, MAX_GROWTH_NODES)
    first_id = checks.at_least("first_id", growth.first_id, 1)
    if first_id + len(tokens) > _BOUNDLESS:
        raise WireError(f"first_id must leave room for {len(tokens)} nodes, not be {first_id}")
    return Growth(
        session=checks.session_number(growth.session),
        generation=growth.generation,
        seen_commit=growth.seen_commit,
        base_length=growth.base_length,
        first_id=first_id,
        parents=checks.parent_ids(growth.parents, first_id, len(tokens)),
        tokens=tokens,
        scores=checks.probabilities(growth.scores, len(tokens)),
        final=growth.final,
        draft_steps=growth.draft_steps,
        draft_rows=growth.draft_rows,
        draft_seconds=checks.between("draft_seconds", growth.draft_seconds, 0.0, _LONGEST),
        sent_at=checks.between("sent_at", growth.sent_at, -_LONGEST, _LONGEST),
    )


def _encode_lost(lost: Lost) -> bytes:
    # Reasons quote exceptions of all sorts; the far side takes one printable line.
    fields = pb.Lost(session=lost.session, generation=lost.generation, reason=checks.one_line(lost.reason))
    return pb.DrafterMessage(lost=fields).SerializeToString()


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    Hello: _encode_hello,
    Welcome: _encode_welcome,
    Open: _encode_open,
    Commit: _encode_commit,
    Close: _encode_close,
    Growth: _encode_growth,
    Lost: _encode_lost,
}


def _parse(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes are no {kind.__name__}: {error}") from error
