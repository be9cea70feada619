"""The wire format: what goes in comes out, and nothing impossible gets in."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.actors import wire
from outrider.actors.wire_checks import MAX_CHARACTERS
from outrider.protos import speculation_pb2 as pb
from outrider.speculation.errors import WireError
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
from outrider.speculation.sampling_params import SamplingParams

HELLO = Hello(
    protocol_version=1,
    model="meta/target",
    vocab_hash="abc",
    vocab_size=32000,
    eos_ids=(2, 7),
    numerics="canonical",
)
WELCOME = Welcome(
    protocol_version=1,
    name="draft-0",
    model="meta/draft",
    vocab_hash="abc",
    vocab_size=32000,
    numerics="fast",
    max_model_len=4096,
    max_sessions=8,
)
PARAMS = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=-1,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-2.0,
    frequency_penalty=0.3,
    seed=2**64 - 1,
    max_tokens=100,
    min_tokens=3,
    stop_token_ids=(5, 6),
    ignore_eos=True,
    logit_bias={3: -100.0, 9: 0.1},
    allowed_token_ids=(1, 2**31 - 1),
    bad_words_token_ids=((7,), (8, 2**31 - 1)),
)
OPEN = Open(
    session=2**63 - 1,
    generation=3,
    token_ids=np.array([1, 2, 2**31 - 1]),
    prompt_length=2,
    params=PARAMS,
    choice=1,
    limits=GrowthLimits(width=4, children=8, steps=NO_LIMIT, min_score=0.01),
)
COMMIT = Commit(
    session=1,
    generation=3,
    sequence=1,
    base_length=3,
    tokens=np.array([4, 5]),
    prefix_hash=2**32 - 1,
    steps=5,
)
GROWTH = Growth(
    session=1,
    generation=3,
    seen_commit=1,
    base_length=5,
    first_id=7,
    parents=np.array([0, 7, 6]),
    tokens=np.array([10, 11, 12]),
    scores=np.array([0.0, 0.25, 1.0], np.float32),
    final=True,
    draft_steps=2,
    draft_rows=9,
    draft_seconds=0.003,
    sent_at=-1.5,
)
FROM_TARGET: list[TargetMessage] = [HELLO, OPEN, COMMIT, Close(session=1, generation=2)]
FROM_DRAFTER: list[DrafterMessage] = [WELCOME, GROWTH, Lost(session=1, generation=2, reason="no room")]


def packed(*items: float, dtype: str = "<u4") -> bytes:
    return np.array(items, dtype).tobytes()


def as_dict(message: Any) -> dict[str, Any]:
    """Fields by name, arrays as their type and items, so that messages can be compared."""
    values = {each.name: getattr(message, each.name) for each in fields(message)}
    return {k: (v.dtype, v.tolist()) if isinstance(v, np.ndarray) else v for k, v in values.items()}


@pytest.mark.parametrize("message", FROM_TARGET, ids=lambda each: type(each).__name__)
def test_what_a_target_sends_arrives(message: TargetMessage) -> None:
    decoded = wire.decode_target(wire.encode_target(message))
    assert type(decoded) is type(message)
    assert as_dict(decoded) == as_dict(message)


@pytest.mark.parametrize("message", FROM_DRAFTER, ids=lambda each: type(each).__name__)
def test_what_a_drafter_sends_arrives(message: DrafterMessage) -> None:
    decoded = wire.decode_drafter(wire.encode_drafter(message))
    assert type(decoded) is type(message)
    assert as_dict(decoded) == as_dict(message)
    if isinstance(decoded, Lost):
        assert decoded.reason == "no room"


def test_a_growth_without_nodes_arrives() -> None:
    nothing = replace(
        GROWTH, parents=GROWTH.parents[:0], tokens=GROWTH.tokens[:0], scores=GROWTH.scores[:0], first_id=1
    )
    assert as_dict(wire.decode_drafter(wire.encode_drafter(nothing))) == as_dict(nothing)


@pytest.mark.parametrize("params", [SamplingParams(seed=0), SamplingParams(seed=1, temperature=0.0)])
def test_defaults_and_absent_lists_arrive(params: SamplingParams) -> None:
    decoded = wire.decode_target(wire.encode_target(replace(OPEN, params=params)))
    assert isinstance(decoded, Open)
    assert decoded.params == params
    assert decoded.params.allowed_token_ids is None


def test_what_matters_only_to_the_target_is_not_sent() -> None:
    params = SamplingParams(seed=1, n=3, stop=("x",), skip_special_tokens=False)
    decoded = wire.decode_target(wire.encode_target(replace(OPEN, params=params)))
    assert isinstance(decoded, Open)
    assert decoded.params == SamplingParams(seed=1)


def test_numbers_that_no_text_reaches_are_clipped() -> None:
    params = SamplingParams(seed=1, top_k=10**30, max_tokens=10**30, min_tokens=10**29)
    decoded = wire.decode_target(wire.encode_target(replace(OPEN, params=params)))
    assert isinstance(decoded, Open)
    most = 2**31 - 1
    assert (decoded.params.top_k, decoded.params.max_tokens, decoded.params.min_tokens) == (most, most, most)


def test_the_reason_of_a_loss_becomes_one_line() -> None:
    lost = Lost(session=1, generation=1, reason="no\nroom\x1b[1m" + "x" * 5000)
    decoded = wire.decode_drafter(wire.encode_drafter(lost))
    assert isinstance(decoded, Lost)
    assert decoded.reason.startswith("no room [1mx")
    assert len(decoded.reason) == MAX_CHARACTERS


def test_arrays_are_raw_little_endian_items() -> None:
    growth = pb.DrafterMessage.FromString(wire.encode_drafter(GROWTH)).growth
    assert growth.tokens == bytes([10, 0, 0, 0, 11, 0, 0, 0, 12, 0, 0, 0])
    assert growth.scores == bytes.fromhex("00000000 0000803e 0000803f")
    assert wire.SERVICE == "outrider.v1.Drafting"
    assert wire.METHOD == "Replicate"


def test_decoded_arrays_are_the_receivers_own() -> None:
    decoded = wire.decode_drafter(wire.encode_drafter(GROWTH))
    assert isinstance(decoded, Growth)
    assert decoded.parents.flags.writeable
    assert decoded.scores.flags.writeable


Change = Callable[[Any], None]


def setting(**values: Any) -> Change:
    """Overwrites fields of a protobuf message; ``a__b`` is field b of field a."""

    def change(message: Any) -> None:
        for path, value in values.items():
            *outer, name = path.split("__")
            inner = message
            for each in outer:
                inner = getattr(inner, each)
            setattr(inner, name, value)

    return change


def more_words(*words: bytes) -> Change:
    return lambda message: message.params.bad_words.extend(words)


def clearing(name: str) -> Change:
    return lambda message: message.ClearField(name)


def bias(token: int, value: float) -> Change:
    return lambda message: message.params.logit_bias.update({token: value})


NAN, INF = float("nan"), float("inf")
REFUSED_FROM_DRAFTER: list[tuple[DrafterMessage, Change, str]] = [
    (GROWTH, setting(tokens=b"12345"), "tokens must be whole items of 4 bytes, not 5 bytes"),
    (GROWTH, setting(parents=b"1"), "parents must be whole items"),
    (GROWTH, setting(scores=b"123"), "scores must be whole items"),
    (GROWTH, setting(tokens=packed(1, 2)), "parents must be as many as the 2 tokens, not 3"),
    (GROWTH, setting(parents=packed(0, 0)), "parents must be as many as the 3 tokens, not 2"),
    (GROWTH, setting(scores=packed(0.5, dtype="<f4")), "scores must be as many as the 3 tokens, not 1"),
    (GROWTH, setting(tokens=bytes(4 * (MAX_GROWTH_NODES + 1))), "tokens must be at most 256 items, not 257"),
    (GROWTH, setting(tokens=packed(1, 2, 2**31)), "tokens must be below 2147483648, not 2147483648"),
    (GROWTH, setting(parents=packed(0, 8, 6)), "the parent of node 8 must be an earlier one, not 8"),
    (GROWTH, setting(parents=packed(0, 1, 2**32 - 1)), "not 4294967295"),
    (GROWTH, setting(first_id=0), "first_id must be at least 1, not 0"),
    (GROWTH, setting(first_id=2**32 - 1), "first_id must leave room for 3 nodes"),
    (GROWTH, setting(session=2**63), r"session must be below 2\*\*63, not 9223372036854775808"),
    (GROWTH, setting(scores=packed(0.5, NAN, 0, dtype="<f4")), r"scores must be within \[0, 1\], not nan"),
    (GROWTH, setting(scores=packed(0.5, 1.5, 0, dtype="<f4")), "not 1.5"),
    (GROWTH, setting(scores=packed(0.5, -0.5, 0, dtype="<f4")), "not -0.5"),
    (GROWTH, setting(scores=packed(0.5, INF, 0, dtype="<f4")), "not inf"),
    (GROWTH, setting(draft_seconds=-1.0), "draft_seconds must be within"),
    (GROWTH, setting(draft_seconds=NAN), "draft_seconds must be within .*, not nan"),
    (GROWTH, setting(sent_at=INF), "sent_at must be within"),
    (FROM_DRAFTER[2], setting(session=2**64 - 1), "session must be below"),
    (FROM_DRAFTER[2], setting(reason="two\nlines"), r"reason must be at most .* not 'two\\nlines'"),
    (WELCOME, setting(name="x" * 1025), "name must be at most 1024 printable characters"),
    (WELCOME, setting(vocab_size=0), "vocab_size must be at least 1, not 0"),
    (WELCOME, setting(max_model_len=0), "max_model_len must be at least 1"),
    (WELCOME, setting(max_sessions=0), "max_sessions must be at least 1"),
]
REFUSED_FROM_TARGET: list[tuple[TargetMessage, Change, str]] = [
    (HELLO, setting(eos_ids=b"x"), "eos_ids must be whole items"),
    (HELLO, setting(vocab_size=0), "vocab_size must be at least 1"),
    (HELLO, setting(model="\x1b[2J"), "model must be at most"),
    (HELLO, setting(vocab_hash="\n"), "vocab_hash must be at most"),
    (HELLO, setting(numerics="\t"), "numerics must be at most"),
    (OPEN, setting(session=2**63), "session must be below"),
    (OPEN, setting(token_ids=b"123"), "token_ids must be whole items"),
    (OPEN, setting(token_ids=bytes(4 * (wire.MAX_TOKENS + 1))), "token_ids must be at most 1048576 items"),
    (OPEN, setting(token_ids=packed(1, 2**32 - 1, 3)), "token_ids must be below .*, not 4294967295"),
    (OPEN, setting(token_ids=b""), "prompt_length must be at most the 0 token_ids, not 2"),
    (OPEN, setting(prompt_length=0), "prompt_length must be at least 1, not 0"),
    (OPEN, setting(prompt_length=4), "prompt_length must be at most the 3 token_ids, not 4"),
    (OPEN, clearing("limits"), "width must be at least 1, not 0"),
    (OPEN, setting(limits__children=0), "children must be at least 1, not 0"),
    (OPEN, setting(limits__steps=-2), "steps must be at least -1, not -2"),
    (OPEN, setting(limits__min_score=1.5), "min_score must be within"),
    (OPEN, setting(limits__min_score=NAN), "min_score must be within"),
    (OPEN, clearing("params"), "max_tokens must be at least 1, not 0"),
    (OPEN, setting(params__temperature=NAN), "temperature must be a finite number, not nan"),
    (OPEN, setting(params__top_p=0.0), "top_p must be"),
    (OPEN, setting(params__top_k=-2), "top_k must be at least -1"),
    (OPEN, setting(params__repetition_penalty=0.0), "repetition_penalty must be within"),
    (OPEN, setting(params__presence_penalty=3.0), "presence_penalty must be"),
    (OPEN, setting(params__frequency_penalty=INF), "frequency_penalty must be"),
    (OPEN, setting(params__min_tokens=101), "min_tokens must be"),
    (OPEN, setting(params__stop_token_ids=b"12"), "stop_token_ids must be whole items"),
    (OPEN, setting(params__allowed_token_ids=b""), "allowed_token_ids must be None or not empty"),
    (OPEN, setting(params__allowed_token_ids=b"1"), "allowed_token_ids must be whole items"),
    (OPEN, more_words(b"1"), "bad_words must be whole items"),
    (OPEN, more_words(b""), "bad_words_token_ids must be sequences of at least one"),
    (OPEN, more_words(*[b"1234"] * 1024), "bad_words must be at most 1024"),
    (OPEN, more_words(bytes(4 * 257)), "bad_words must be at most 256 items, not 257"),
    (OPEN, bias(3, 101.0), r"logit_bias\[3\] must be within"),
    (COMMIT, setting(sequence=0), "sequence must be at least 1, not 0"),
    (COMMIT, setting(tokens=b"1"), "tokens must be whole items"),
    (COMMIT, setting(tokens=bytes(4 * (wire.MAX_TOKENS + 1))), "tokens must be at most 1048576 items"),
    (COMMIT, setting(steps=-2), "steps must be at least -1"),
    (COMMIT, setting(session=2**63), "session must be below"),
    (FROM_TARGET[3], setting(session=2**63), "session must be below"),
]


@pytest.mark.parametrize(("message", "change", "complaint"), REFUSED_FROM_DRAFTER)
def test_what_a_drafter_cannot_mean_is_refused(
    message: DrafterMessage, change: Change, complaint: str
) -> None:
    frame = pb.DrafterMessage.FromString(wire.encode_drafter(message))
    change(getattr(frame, frame.WhichOneof("message")))
    with pytest.raises(WireError, match=complaint) as raised:
        wire.decode_drafter(frame.SerializeToString())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("message", "change", "complaint"), REFUSED_FROM_TARGET)
def test_what_a_target_cannot_mean_is_refused(message: TargetMessage, change: Change, complaint: str) -> None:
    frame = pb.TargetMessage.FromString(wire.encode_target(message))
    change(getattr(frame, frame.WhichOneof("message")))
    with pytest.raises(WireError, match=complaint) as raised:
        wire.decode_target(frame.SerializeToString())
    assert "\n" not in str(raised.value)


def test_too_many_biases_are_refused() -> None:
    frame = pb.TargetMessage.FromString(wire.encode_target(OPEN))
    frame.open.params.logit_bias.update(dict.fromkeys(range(wire.MAX_LISTED_IDS + 1), 1.0))
    with pytest.raises(WireError, match="logit_bias must be at most 262144 items, not 262145"):
        wire.decode_target(frame.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\xff", b"hello", bytes(100)])
@pytest.mark.parametrize("decode", [wire.decode_target, wire.decode_drafter])
def test_what_is_no_message_is_refused(decode: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(WireError, match=f"{len(data)} bytes"):
        decode(data)


FRAMES = [wire.encode_target(each) for each in FROM_TARGET]
FRAMES += [wire.encode_drafter(each) for each in FROM_DRAFTER]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real frame with some bytes overwritten, inserted or cut."""
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame)))
        end = at + draw(st.integers(0, 4))
        frame[at:end] = draw(st.binary(max_size=9))
    return bytes(frame)


@settings(max_examples=400, deadline=None)
@given(st.one_of(mutated(), st.binary(max_size=64)))
def test_any_bytes_give_a_message_or_a_wire_error(data: bytes) -> None:
    for decode in (wire.decode_target, wire.decode_drafter):
        try:
            message = decode(data)
        except WireError:
            continue
        assert isinstance(message, TargetMessage | DrafterMessage)
