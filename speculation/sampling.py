"""From the target's logits to its own tokens: processing per row, then a choice with noise.

Rows are those of one verification: row 0 is the root (the last committed token), row
i + 1 is node i of the tree. A row's result depends on its own logits and on its own path,
never on the rows beside it, so it is the one that plain decoding gets there.

Shapes: R rows = 1 + nodes, V real vocabulary, V_head the head's width (V or padded).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.guesses import Streams
from outrider.kernels.gumbel import draw, first_largest, position_keys, request_states
from outrider.speculation.bad_words import BadWords
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree
from outrider.speculation.truncation import keep_near_top, keep_top
from outrider.speculation.types import FloatArray, IntArray

NO_TOKEN = -1
"""In place of a token where the logits allow none."""


def row_positions(length: int, tree: DraftTree) -> IntArray:
    """int64 ``[R]``: the position of the token that each row chooses, ``length`` at the root.

    length: tokens committed so far, prompt included.
    """
    return length + tree.row_depths


class LogitProcessor:
    """Applies one request's sampling parameters, in vLLM v1's order.

    That is: cut to the real vocabulary, allowed tokens, bad words, ``min_tokens``, bias, repetition,
    frequency and presence penalties, temperature, ``min_p``, ``top_k``, ``top_p`` (over
    what ``top_k`` left). At temperature 0 all that cannot change the argmax is left out.

    prompt_ids: int64 ``[L]``.
    stop_ids: the tokens that ``min_tokens`` holds back.
    device: where the logits are.

    Raises:
        InvalidRequestError: a token id is not in the vocabulary, or ``min_tokens`` leaves
            none of the allowed tokens.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: IntArray,
        vocab_size: int,
        stop_ids: Collection[int],
        device: torch.device | str = "cpu",
    ) -> None:
        params.check_vocabulary(vocab_size)
        self._params = params
        self._vocab_size = vocab_size
        self._num_output = 0
        self._min_tokens = params.min_tokens if stop_ids else 0
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self._forbidden = _forbidden_tokens(params, vocab_size, stop_ids, device)
        words = params.bad_words_token_ids
        self._bad_words = BadWords(words, device) if words else None
        self._bias = _Bias(params.logit_bias, device) if params.logit_bias else None
        self._penalties = _Penalties(params, prompt_ids, vocab_size) if _has_penalties(params) else None
        self._truncates = not params.is_greedy and (
            params.min_p > 0 or params.top_k > 0 or params.top_p < 1 or params.temperature != 1
        )

    def commit(self, tokens: IntArray) -> None:
        """Takes committed output tokens, int64 ``[k]``, into the history, in O(k)."""
        self._num_output += len(tokens)
        if self._penalties is not None:
            self._penalties.commit(tokens)
        if self._bad_words is not None:
            self._bad_words.commit(tokens)

    @property
    def is_trivial(self) -> bool:
        """Whether nothing is done to logits but to cut them to the real vocabulary."""
        return not (self._edits or self._truncates)

    @property
    def depends_on_path(self) -> bool:
        """Whether the result depends on more than a row's own logits."""
        words = self._bad_words is not None and self._bad_words.depends_on_path
        return words or self._penalties is not None or self._num_output < self._min_tokens

    def process(self, logits: torch.Tensor, tree: DraftTree, rows: IntArray | None = None) -> torch.Tensor:
        """The logits of the distributions that the rows choose from.

        logits: float ``[R, V_head]``, left as they are.
        tree: its tokens are below V.
        rows: int64 ``[R]``, where not all of the tree's rows are given, in order: which.

        Returns:
            float32 ``[R, V]`` (float64 stays float64); -inf where a token is out. It may
            be a view of ``logits``, so do not write to it.
        """
        if rows is None:
            rows = np.arange(len(tree) + 1)
        assert len(logits) == len(rows), f"{len(logits)} rows of logits for {len(tree)} nodes"
        result = cut(logits, self._vocab_size)
        if self.is_trivial:
            return result
        if result.data_ptr() == logits.data_ptr():
            result = result.clone()
        if self._edits:
            self._edit(result, tree, rows)
        if self._truncates:
            self._truncate(result)
        return result

    @property
    def _edits(self) -> bool:
        steps = (self._forbidden, self._bad_words, self._bias, self._penalties)
        return self._num_output < self._min_tokens or any(step is not None for step in steps)

    def _edit(self, logits: torch.Tensor, tree: DraftTree, rows: IntArray) -> None:
        """What can change the argmax, in place."""
        if self._forbidden is not None:
            logits.masked_fill_(self._forbidden, -torch.inf)
        if self._bad_words is not None:
            self._bad_words.apply(logits, tree, rows)
        early = row_positions(self._num_output, tree)[rows] < self._min_tokens
        if early.any():
            shielded = torch.from_numpy(early.nonzero()[0]).to(logits.device)
            logits[shielded[:, None], self._stop_ids] = -torch.inf
        if self._bias is not None:
            self._bias.add(logits)
        if self._penalties is not None:
            self._penalties.apply(logits, tree, rows)

    def _truncate(self, logits: torch.Tensor) -> None:
        """What cannot change the argmax, in place."""
        params = self._params
        if params.temperature != 1:
            logits.div_(params.temperature)
        if params.min_p > 0:
            keep_near_top(logits, params.min_p)
        if params.top_k > 0 or params.top_p < 1:
            keep_top(logits, params.top_k, params.top_p)


def cut(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits ``[R, V_head]`` as float32 (float64 stays float64) ``[R, V]``, perhaps a view."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits[:, :vocab_size].to(dtype)


class TokenChooser:
    """Chooses one request's tokens: a function of logits, seed, choice and position alone.

    choice: which of the request's ``n`` choices this is.

    Raises:
        InvalidRequestError: the temperature is not 0 and there is no seed.
    """

    def __init__(self, params: SamplingParams, choice: int = 0) -> None:
        if params.seed is None and not params.is_greedy:
            raise InvalidRequestError(
                f"seed must be set at temperature {params.temperature}, not {params.seed!r}"
            )
        self._greedy = params.is_greedy
        self.state = request_states(params.seed or 0, choice)
        """What its noise depends on beside positions and tokens; uint64 ``[1]``."""

    def choose(self, logits: torch.Tensor, positions: IntArray) -> IntArray:
        """See ``choose_together``; int64 ``[R]``."""
        return choose_together([self], logits, [positions])[0]

    @property
    def is_greedy(self) -> bool:
        """Whether it needs no noise."""
        return self._greedy

    def noise_keys(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Keys int64 ``[2, k]`` of the noise of k distinct positions; which of them each row has, ``[R]``."""
        # Siblings and cousins choose for the same position, with the same noise.
        if len(positions) == 1:
            return position_keys(self.state, positions), np.zeros(1, np.int64)
        distinct, rows = np.unique(positions, return_inverse=True)
        return position_keys(self.state, distinct), rows


def choose_together(
    choosers: Sequence["TokenChooser"], logits: torch.Tensor, positions: Sequence[IntArray]
) -> list[IntArray]:
    """The target's own tokens of every row, per request int64 ``[r]``; of equals the lowest id.

    logits: float ``[R, V]``, processed, each request's rows behind one another.
    positions: per request int64 ``[r]``, index in the whole sequence of the token to choose.

    A row that holds a NaN or infinity, or nothing but -inf, has no token: it gets ``NO_TOKEN``,
    which no node carries, so a junk node's row harms nobody.
    """
    counts = [len(each) for each in positions]
    greedy = [chooser.is_greedy for chooser in choosers]
    if all(greedy):
        tokens = _greedy_tokens(logits)
    elif not any(greedy):
        tokens = _drawn_tokens(choosers, logits, positions)
    else:
        is_greedy, device = np.repeat(greedy, counts), logits.device
        plainly, by_noise = (
            torch.from_numpy(rows.nonzero()[0]).to(device) for rows in (is_greedy, ~is_greedy)
        )
        tokens = torch.empty(len(logits), dtype=torch.int64, device=device)
        tokens[plainly] = _greedy_tokens(logits[plainly])
        drawing = [each for each, plain in zip(choosers, greedy, strict=True) if not plain]
        theirs = [each for each, plain in zip(positions, greedy, strict=True) if not plain]
        tokens[by_noise] = _drawn_tokens(drawing, logits[by_noise], theirs)
    # All that comes back from a device in a step.
    chosen = tokens.cpu().numpy()
    starts = accumulate(counts, initial=0)
    return [chosen[start : start + count] for start, count in zip(starts, counts, strict=False)]


def _greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    return _sound(first_largest(logits), logits)


def _drawn_tokens(
    choosers: Sequence["TokenChooser"], logits: torch.Tensor, positions: Sequence[IntArray]
) -> torch.Tensor:
    # Not normalised: a sum's rounding may depend on where in the batch the row lies.
    values = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    keys, streams = noise_keys_together(choosers, positions, logits.device)
    return _sound(draw(values, keys[0], keys[1], streams), values)


def _sound(tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # A NaN anywhere in a row has won, or has made the whole row NaN.
    won = values.gather(1, tokens[:, None])[:, 0]
    # Infinity and NaN less themselves are NaN. On CPU isfinite() takes several times as long.
    return tokens.masked_fill_(won - won != 0, NO_TOKEN)


def noise_keys_together(
    choosers: Sequence["TokenChooser"], positions: Sequence[IntArray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys int64 ``[2, k]`` of streams, and which of them each row has, ``[R]``; None: each its own."""
    found = [chooser.noise_keys(each) for chooser, each in zip(choosers, positions, strict=True)]
    keys = torch.from_numpy(np.concatenate([each for each, _ in found], axis=1)).to(device)
    if sum(map(len, positions)) == len(choosers):
        return keys, None
    starts = np.cumsum([0, *(each.shape[1] for each, _ in found[:-1])])
    rows = np.concatenate([own + start for (_, own), start in zip(found, starts, strict=True)])
    return keys, torch.from_numpy(rows).to(device)


def streams_of(choosers: Sequence[TokenChooser], positions: Sequence[IntArray]) -> Streams:
    """The noise of several requests' rows, which stand behind one another; positions: int64 ``[r]`` each."""
    counts = [len(each) for each in positions]
    return Streams(
        states=np.concatenate([chooser.state for chooser in choosers]).repeat(counts),
        positions=np.concatenate(positions),
        noisy=np.repeat([not chooser.is_greedy for chooser in choosers], counts),
    )


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _forbidden_tokens(
    params: SamplingParams, vocab_size: int, stop_ids: Collection[int], device: torch.device | str
) -> torch.Tensor | None:
    """bool ``[V]``, what ``allowed_token_ids`` leaves out."""
    if params.allowed_token_ids is None:
        return None
    if params.min_tokens > 0 and set(params.allowed_token_ids) <= set(stop_ids):
        raise InvalidRequestError(
            f"min_tokens must be 0 where allowed_token_ids are all stop tokens, not {params.min_tokens}"
        )
    forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
    forbidden[torch.tensor(params.allowed_token_ids, device=device)] = False
    return forbidden


class _Bias:
    """``logit_bias`` as tensors."""

    def __init__(self, biases: Mapping[int, float], device: torch.device | str) -> None:
        self._ids = torch.tensor(list(biases), dtype=torch.int64, device=device)
        self._values = torch.tensor(list(biases.values()), dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor) -> None:
        logits[:, self._ids] += self._values.to(logits.dtype)


class _Penalties:
    """Repetition, frequency and presence penalties over the history and each row's path.

    Only tokens that occur are touched: the ids of the history (H of them) have a slot each.
    """

    def __init__(self, params: SamplingParams, prompt_ids: IntArray, vocab_size: int) -> None:
        self._params = params
        self._in_prompt = np.zeros(vocab_size, np.bool_)
        self._counts = np.zeros(vocab_size)
        self._slots = np.full(vocab_size, -1, np.int64)
        self._ids = np.zeros(vocab_size, np.int64)
        self._num_ids = 0
        if params.repetition_penalty != 1:
            self._in_prompt[prompt_ids] = True
            self._enter(prompt_ids)

    def commit(self, tokens: IntArray) -> None:
        np.add.at(self._counts, tokens, 1)
        self._enter(tokens)

    def apply(self, logits: torch.Tensor, tree: DraftTree, rows: IntArray) -> None:
        """Penalises the tree's ``rows`` in place."""
        ids, counts = self._count(tree)
        counts = counts[rows]
        params, device = self._params, logits.device
        times = torch.from_numpy(counts).to(device, logits.dtype)
        columns = torch.from_numpy(ids).to(device)
        seen = torch.from_numpy(self._in_prompt[ids] | (counts > 0)).to(device)
        x = logits[:, columns]
        penalty = params.repetition_penalty
        x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
        x -= times * params.frequency_penalty
        x -= times.clamp(max=1) * params.presence_penalty
        logits[:, columns] = x

    def _count(self, tree: DraftTree) -> tuple[IntArray, FloatArray]:
        """Ids ``[H]`` in history or tree, and their counts ``[R, H]`` in the output and path."""
        slots: npt.NDArray[np.int64] = self._slots[tree.tokens]
        new = slots < 0
        fresh, order = np.unique(tree.tokens[new], return_inverse=True)
        slots[new] = self._num_ids + order
        ids = np.concatenate([self._ids[: self._num_ids], fresh])
        counts = np.tile(self._counts[ids], (len(tree) + 1, 1))
        node, ancestor = tree.ancestor_mask.nonzero()
        np.add.at(counts, (node + 1, slots[ancestor]), 1)
        return ids, counts

    def _enter(self, tokens: IntArray) -> None:
        new = np.unique(tokens[self._slots[tokens] < 0])
        end = self._num_ids + len(new)
        self._slots[new] = np.arange(self._num_ids, end)
        self._ids[self._num_ids : end] = new
        self._num_ids = end
