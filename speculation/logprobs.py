"""Log-probabilities of the target's tokens, for the requests that ask for them.

They are of the model's own distribution: log-softmax in float32, whatever the model's dtype, of the
logits over the real vocabulary, before sampling parameters do anything to these. The rows are those
that verification computes anyway; a prompt's are computed while it is cached.

Shapes: R rows, V real vocabulary, V_head the head's width (V or padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch

from outrider.speculation.request import TokenLogprobs
from outrider.speculation.sampling import NO_TOKEN
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray, Verdict

LOGPROBS_MODE = "raw_logprobs"
"""What vLLM calls these. There is no other mode."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What one request wants to know of a step.

    log: that takes the answers. logits: float ``[R, V_head]``. tokens: int64 ``[R]``, one of each row.
    num_top: most probable tokens wanted beside each row's.
    """

    log: "LogprobLog" = field(repr=False)
    logits: torch.Tensor
    tokens: IntArray
    num_top: list[int]


class LogprobLog:
    """What one request asks and has been told: of its prompt once, of its output with every step.

    prompt_ids: int64 ``[length]``.
    """

    def __init__(self, params: SamplingParams, prompt_ids: IntArray) -> None:
        self._params, self._prompt_ids = params, prompt_ids
        self.prompt: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        """Of the prompt's tokens, as far as they have been computed; None if nobody asks."""
        self.output: list[TokenLogprobs] | None = None if params.logprobs is None else []
        """Of the committed tokens; None if nobody asks."""
        self._on_path: list[TokenLogprobs] = []
        """Of what the last step brought; some of it may come after the output's end."""

    @property
    def first_row(self) -> int | None:
        """The first position of the text whose row has yet to be looked at; None: there is none.

        What is cached from there on has to be computed again.
        """
        if self.prompt is None or len(self.prompt) == len(self._prompt_ids):
            return None
        return len(self.prompt) - 1

    def num_text_rows(self, start: int, stop: int) -> int:
        """Of the rows of the text's tokens ``[start, stop)``, how many last ones are looked at."""
        return 0 if self.first_row is None else max(0, stop - max(start, self.first_row))

    def ask(self, logits: torch.Tensor, tree: DraftTree | None, verdict: Verdict | None) -> Question | None:
        """What there is to know of a step, if anything.

        logits: float ``[R, V_head]``, of ``num_text_rows`` rows of text, then of the root and the nodes
            of the tree, if there is one.
        """
        if self.prompt is None and self.output is None:
            return None
        num_text = len(logits) - (0 if tree is None else 1 + len(tree))
        rows, tokens = np.arange(num_text), self._prompt_ids[len(self.prompt or ()) :][:num_text]
        if self.output is not None and tree is not None and verdict is not None and verdict.token != NO_TOKEN:
            rows = np.concatenate((rows, num_text + np.append(0, verdict.accepted + 1)))
            tokens = np.concatenate((tokens, tree.tokens[verdict.accepted], [verdict.token]))
        if not len(rows):
            return None
        tops = [self._params.prompt_logprobs or 0] * num_text
        tops += [self._params.logprobs or 0] * (len(rows) - num_text)
        return Question(log=self, logits=logits[torch.from_numpy(rows)], tokens=tokens, num_top=tops)

    def take(self, answers: Sequence[TokenLogprobs]) -> None:
        """What ``ask`` asked for."""
        num_prompt = 0
        if self.prompt is not None:
            num_prompt = min(len(answers), len(self._prompt_ids) - len(self.prompt))
            self.prompt += answers[:num_prompt]
        self._on_path = list(answers[num_prompt:])

    def commit(self, count: int) -> list[TokenLogprobs] | None:
        """Of so many first tokens of the last step's, which have become part of the text."""
        if self.output is None:
            return None
        committed, self._on_path = self._on_path[:count], []
        self.output += committed
        return committed


def answer_together(questions: Sequence[Question], vocab_size: int) -> None:
    """Answers what several requests ask, each to its own log."""
    if not questions:
        return
    answers = look_up(
        torch.cat([each.logits for each in questions]),
        np.concatenate([each.tokens for each in questions]),
        [count for each in questions for count in each.num_top],
        vocab_size,
    )
    ends = accumulate((len(each.tokens) for each in questions), initial=0)
    for question, (start, stop) in zip(questions, pairwise(ends), strict=True):
        question.log.take(answers[start:stop])


def look_up(
    logits: torch.Tensor, tokens: IntArray, num_top: Sequence[int], vocab_size: int
) -> list[TokenLogprobs]:
    """What rows of logits say of a token each, and of as many most probable ones as are wanted.

    logits: float ``[R, V_head]``. tokens: int64 ``[R]``. num_top: of each row.

    Ranks go by logits; of equals the lower id comes first, as in the target's own choice.
    """
    values = logits[:, :vocab_size].float()
    logprobs, order = values.log_softmax(dim=1), _order(values)
    chosen = torch.from_numpy(tokens)[:, None].to(logits.device)
    ranks = (order >= order.gather(1, chosen)).sum(dim=1)
    top = order.topk(min(vocab_size, max(num_top)), dim=1).indices
    columns = (
        tokens.tolist(),
        logprobs.gather(1, chosen)[:, 0].tolist(),
        ranks.tolist(),
        top.tolist(),
        logprobs.gather(1, top).tolist(),
    )
    return [
        TokenLogprobs(token, logprob, rank, ids[:count], theirs[:count])
        for token, logprob, rank, ids, theirs, count in zip(*columns, num_top, strict=True)
    ]


def _order(values: torch.Tensor) -> torch.Tensor:
    """int64 ``[R, V]``: larger for larger float32 ``values`` and, of equals, for lower ids; no two alike."""
    # The bits of floats are in the order of the floats, and reversed below zero. -0 + 0 is 0.
    bits = (values + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ascending << 32) - torch.arange(values.shape[1], device=values.device)
