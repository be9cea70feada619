"""What a target and a draft worker tell each other, as dataclasses.

One stream per (target engine, draft worker) carries all requests between them. A *session* is
one request on one stream, a *generation* one attempt at keeping its two trees alike: whenever
something was lost, the target opens the next generation with all that the drafter needs, so
no message is ever needed twice. Positions count the tokens of the whole text, prompt included.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.types import IntArray

PROTOCOL_VERSION = 1
ROOT_ID = 0
"""Parent id of the nodes right below the last token that their drafter knew; real ids start at 1."""
MAX_GROWTH_NODES = 256
"""Most nodes of one message."""
NO_LIMIT = -1

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a target: who asks.

    vocab_hash: the tokenizer's fingerprint. vocab_size: real tokens.
    eos_ids: tokens that end a text. numerics: of the target, ``canonical`` or ``fast``.
    """

    protocol_version: int
    model: str
    vocab_hash: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    numerics: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """First answer of a draft worker: who drafts.

    name: of the worker; accepted tokens are attributed to it.
    """

    protocol_version: int
    name: str
    model: str
    vocab_hash: str
    vocab_size: int
    numerics: str
    max_model_len: int
    max_sessions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthLimits:
    """How far a session's tree may grow.

    width: nodes that one draft step expands. children: most children of a node.
    steps: draft steps after each commit, or ``NO_LIMIT``; a ``Commit`` may change it.
    min_score: nodes with a lower path score are not expanded.
    """

    width: int
    children: int
    steps: int
    min_score: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Open:
    """Everything a drafter must know to draft for a request, from scratch.

    token_ids: int64 ``[length]``, prompt and output so far; the first ``prompt_length`` of
        them are the prompt. params: with a seed. choice: which of the ``n`` choices.
    """

    session: int
    generation: int
    token_ids: IntArray
    prompt_length: int
    params: SamplingParams
    choice: int
    limits: GrowthLimits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Commit:
    """The target committed ``tokens`` (int64 ``[count]``) behind the first ``base_length``.

    sequence: 1, 2, ... within a generation. prefix_hash: of the whole text afterwards.
    steps: as in ``GrowthLimits``, until the next commit.
    """

    session: int
    generation: int
    sequence: int
    base_length: int
    tokens: IntArray
    prefix_hash: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The request is over; the drafter forgets it."""

    session: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """k new nodes of a drafter's tree.

    seen_commit: the last commit of this generation that the drafter had applied; 0: none.
    base_length: tokens of the text after it: the position of the children of ``ROOT_ID``.
    first_id: id of the first node; the others follow. Ids of a generation leave no gap.
    parents: int64 ``[k]``, ids of earlier nodes, or ``ROOT_ID``.
    tokens: int64 ``[k]``. scores: float32 ``[k]``, each given its parent.
    final: the drafter has taken all the steps it was allowed and waits for a commit.
    draft_steps, draft_rows, draft_seconds: what the drafter did since its last message;
        a step shared with other sessions is shared out by rows.
    sent_at: on the drafter's own monotonic clock, in seconds.
    """

    session: int
    generation: int
    seen_commit: int
    base_length: int
    first_id: int
    parents: IntArray
    tokens: IntArray
    scores: Float32Array
    final: bool = False
    draft_steps: int = 0
    draft_rows: int = 0
    draft_seconds: float = 0.0
    sent_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The drafter cannot go on with this generation: it missed something, or has no room.

    reason: one line for people.
    """

    session: int
    generation: int
    reason: str = field(default="", compare=False)


TargetMessage = Hello | Open | Commit | Close
DrafterMessage = Welcome | Growth | Lost
