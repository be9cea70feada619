"""TableLM: an exact Markov model behind the engine's ``TargetRunner`` protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.actors.runner import TreeQuery
from outrider.kernels.gumbel import exponential_noise, stream_keys
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import FloatArray, IntArray

PADDING_LOGIT = 40.0
"""Of the head's padded last column: it wins wherever someone forgets to cut it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands for one position's keys and values.

    past: a digest of all tokens before, as real keys and values depend on them.
    """

    token: int
    past: int

    @property
    def digest(self) -> int:
        return hash((self.past, self.token))


@dataclass(eq=False)
class TableSequence:
    """One request's cache: entries of committed positions, and of the last tree's nodes."""

    owner: "TableLM"
    entries: list[Entry] = field(default_factory=list)
    nodes: list[Entry] = field(default_factory=list)
    closed: bool = False
    room: int = 0
    length: int = 0

    def reserve(self, positions: int) -> bool:
        if positions > self.room and self.owner.free < positions - self.room:
            return False
        self.room = max(self.room, positions)
        return True

    def publish(self, tokens: IntArray) -> None:
        assert [entry.token for entry in self.entries[: len(tokens)]] == tokens[: len(self.entries)].tolist()

    def append(self, entry: Entry) -> None:
        assert not self.closed, "a closed sequence was written to"
        self.entries.append(entry)
        self.length = len(self.entries)
        assert len(self.entries) <= self.room, "the sequence has outgrown its room"

    def digest(self) -> int:
        return read(self.entries, 0)

    def close(self) -> None:
        self.closed = True
        self.room = 0


def read(entries: list[Entry], past: int) -> int:
    """The digest after ``entries``, each of which must have been computed after the ones before it."""
    for entry in entries:
        assert entry.past == past, "the cache holds an entry that was computed after other tokens"
        past = entry.digest
    return past


class TableLM:
    """A Markov model of known law that counts its forwards and rows.

    logits: float64 ``[V] * order + [V]``. A row's logits are looked up with the tokens that
    are found in the sequence's own cache, so a wrong commit shows.
    """

    max_model_len = 200
    memory = 10**9
    """Positions that all sequences have together."""

    def __init__(self, logits: FloatArray) -> None:
        self.logits, self.vocab_size, self.order = logits, logits.shape[-1], logits.ndim - 1
        self.forwards = self.rows = 0
        self.sequences: list[TableSequence] = []

    @classmethod
    def random(cls, seed: int, *, vocab_size: int, order: int = 1, spread: float = 1.5) -> "TableLM":
        shape = (vocab_size,) * (order + 1)
        return cls(np.random.default_rng(seed).normal(0.0, spread, shape))

    @classmethod
    def cycle(cls, successors: list[int]) -> "TableLM":
        """Token t is followed by ``successors[t]``, by far."""
        return cls(8.0 * np.eye(len(successors))[successors])

    @property
    def free(self) -> int:
        return self.memory - sum(sequence.room for sequence in self.sequences)

    def open(
        self, text: IntArray, like: tuple[TableSequence, int] | None = None, reusable: int | None = None
    ) -> TableSequence | None:
        sequence = TableSequence(self)
        if not sequence.reserve(len(text)):
            return None
        if like is not None:
            other, shared = like
            assert [entry.token for entry in other.entries[:shared]] == text[:shared].tolist()
            sequence.entries = other.entries[: min(shared, len(text) - 1 if reusable is None else reusable)]
            sequence.length = len(sequence.entries)
        self.sequences.append(sequence)
        return sequence

    def verify(self, queries: Sequence[TreeQuery[TableSequence]]) -> list[torch.Tensor]:
        self.forwards += 1
        for query in queries:
            for token in query.tokens.tolist():
                query.sequence.append(Entry(token, query.sequence.digest()))
        return [
            torch.cat((self._answer_text(query), self._answer(query.sequence, query.tree)))
            for query in queries
        ]

    def _answer_text(self, query: TreeQuery[TableSequence]) -> torch.Tensor:
        text = [entry.token for entry in query.sequence.entries]
        stop = len(text) - (query.tree is not None)
        return self._padded([self.row(text[: at + 1]) for at in range(stop - query.text_logits, stop)])

    def _answer(self, sequence: TableSequence, tree: DraftTree | None) -> torch.Tensor:
        if tree is None:
            return self._padded([])
        self.rows += len(tree) + 1
        assert len(sequence.entries) + len(tree) <= sequence.room, "the tree has outgrown its room"
        digest = sequence.digest()
        sequence.nodes = []
        for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
            past = digest if parent == ROOT else sequence.nodes[parent].digest
            sequence.nodes.append(Entry(token, past))
        rows = [self.row([entry.token for entry in sequence.entries])]
        for node in range(len(tree)):
            path = [sequence.nodes[each] for each in self.path_slots(tree, node)]
            read(path, digest)
            rows.append(self.row([entry.token for entry in sequence.entries + path]))
        return self._padded(rows)

    def _padded(self, rows: list[FloatArray]) -> torch.Tensor:
        logits = np.full((len(rows), self.vocab_size + 1), PADDING_LOGIT)
        logits[:, :-1] = np.reshape(rows, (len(rows), self.vocab_size))
        return torch.from_numpy(logits)

    def path_slots(self, tree: DraftTree, node: int) -> list[int]:
        """Where the entries that a node attends lie, from the root downwards."""
        path = []
        while node != ROOT:
            path.append(node)
            node = int(tree.parent_indices[node])
        return path[::-1]

    def accept(self, sequence: TableSequence, nodes: IntArray) -> None:
        for node in nodes.tolist():
            sequence.append(sequence.nodes[node])
        sequence.nodes = []

    def row(self, text: list[int]) -> FloatArray:
        """Logits ``[V]`` after ``text``, which token 0 precedes."""
        context = ([0] * self.order + text)[-self.order :]
        return self.logits[tuple(context)]

    def law(self, text: list[int], temperature: float = 1.0) -> FloatArray:
        """Probabilities ``[V]`` after ``text``."""
        weights = np.exp((self.row(text) - self.row(text).max()) / temperature)
        return weights / weights.sum()

    def joint_law(self, prompt: list[int], count: int) -> dict[tuple[int, ...], float]:
        """Probabilities of every continuation of ``count`` tokens, by definition."""
        law: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(count):
            law = {
                (*text, token): mass * p
                for text, mass in law.items()
                for token, p in enumerate(self.law([*prompt, *text]).tolist())
            }
        return law

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Plain greedy decoding, by definition: independent of the engine."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.row(text).argmax()))
        return text[len(prompt) :]

    def sampled(self, prompt: list[int], count: int, seed: int) -> list[int]:
        """Plain seeded decoding at temperature 1, by definition: independent of the engine."""
        text = list(prompt)
        for _ in range(count):
            text.append(int((race_noise(seed, len(text), self.vocab_size) / self.law(text)).argmin()))
        return text[len(prompt) :]


def race_noise(seed: int, position: int, vocab_size: int) -> FloatArray:
    """Unit exponentials ``[V]`` of choice 0 at one position."""
    base, gamma = torch.from_numpy(stream_keys(seed, position, 0))
    return exponential_noise(base, gamma, vocab_size)[0].double().numpy()
