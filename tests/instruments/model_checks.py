"""Checks on real networks of tiny size, bit for bit: KV, logits per path, draft sessions."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from forwards import opened, verify

from instruments import drafters
from instruments.checks import paths_of
from instruments.serving import EOS, Letters, Outcome, serve
from instruments.table_lm import race_noise
from outrider.actors.draft_engine import (
    MIN_SCORE,
    LocalModelDrafting,
    ModelDraftEngine,
    ModelDraftSession,
    session_blocks,
)
from outrider.actors.drafting import DraftEngine
from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.kernels.guesses import perturbed
from outrider.models.config import load_config
from outrider.models.decoder import Decoder
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import Numerics
from outrider.models.weights import Checkpoint
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Request
from outrider.speculation.sampling import LogitProcessor, TokenChooser, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import IntArray
from outrider.speculation.verifiers.registry import make_verifier

VOCAB = 300
CONTEXT = 192
MAX_NODES = 40
ROOTS = (0, 1, 29, 31, 32, 62, 63, 64, 95)
"""Lengths of the text before the last token: around the ends of blocks and of prefixes."""


@lru_cache
def decoder(
    folder: Path,
    dtype: torch.dtype,
    numerics: Numerics = Numerics.CANONICAL,
    context: int = CONTEXT,
) -> Decoder:
    config, checkpoint = load_config(folder), Checkpoint(folder)
    return Decoder(config, checkpoint, dtype=dtype, numerics=numerics, max_model_len=context)


class AuditedRunner(ModelRunner):
    """A runner that compares a sequence's KV with a fresh prefill after every commit.

    tolerance: 0 means bitwise. num_audits: comparisons that were made.
    """

    def __init__(self, network: Decoder, *, tolerance: float = 0.0) -> None:
        super().__init__(network, num_blocks=4 * session_blocks(network.max_model_len))
        self.tolerance, self.num_audits = tolerance, 0
        self._texts: dict[KVSequence, list[int]] = {}
        self._fresh: dict[tuple[object, ...], torch.Tensor] = {}
        self._trees: dict[KVSequence, DraftTree] = {}

    def open(
        self, text: IntArray, like: tuple[KVSequence, int] | None = None, reusable: int | None = None
    ) -> KVSequence | None:
        sequence = super().open(text, like, reusable)
        if sequence is not None:
            self._texts[sequence] = text[: sequence.length].tolist()
        return sequence

    def verify(self, queries: Sequence[TreeQuery[KVSequence]]) -> list[torch.Tensor]:
        logits = super().verify(queries)
        for query in queries:
            self._texts.setdefault(query.sequence, []).extend(query.tokens.tolist())
            self._trees[query.sequence] = query.tree or DraftTree.empty()
        return logits

    def accept(self, sequence: KVSequence, nodes: IntArray) -> None:
        super().accept(sequence, nodes)
        self._texts[sequence] += self._trees[sequence].tokens[nodes].tolist()
        self.require_equal(self.kv(sequence), self.fresh_kv(self._texts[sequence]))
        self.num_audits += 1

    def kv(self, sequence: KVSequence) -> torch.Tensor:
        return self.cache.pool[:, sequence.slots(0, sequence.length)]

    def fresh_kv(self, text: Sequence[int]) -> torch.Tensor:
        """KV of a text that nothing but a prefill has computed."""
        return self._remembered(("kv", *text), lambda: self._prefilled(text))

    def fresh_logits(self, text: Sequence[int]) -> torch.Tensor:
        """Logits ``[vocab]`` after a text, as plain decoding gets them."""
        return self._remembered(("logits", *text), lambda: self._last_logits(text))

    def _remembered(self, key: tuple[object, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._fresh:
            self._fresh[key] = compute()
        return self._fresh[key]

    def _prefilled(self, text: Sequence[int]) -> torch.Tensor:
        sequence = opened(self, np.array(text, np.int64))
        kv = self.kv(sequence)
        sequence.close()
        return kv

    def _last_logits(self, text: Sequence[int]) -> torch.Tensor:
        sequence = opened(self, np.array(text[:-1], np.int64))
        logits = verify(self, sequence, text[-1], DraftTree.empty())
        sequence.close()
        return logits[0]

    def require_equal(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape, f"{found.shape} entries instead of {expected.shape}"
        worst = (found - expected).abs().max().item() if found.numel() else 0.0
        assert worst <= self.tolerance, f"KV or logits differ from a fresh computation by {worst}"


def check_kv_after_commits(runner: AuditedRunner) -> None:
    """KV after every commit equals a fresh prefill: no, some and all nodes of a path, at odd indices."""
    rng = np.random.default_rng(0)
    for length in ROOTS:
        sequence = opened(runner, rng.integers(1, VOCAB, length))
        for count in (0, 3, 5, 1, 0):
            right = rng.integers(1, VOCAB, 5).tolist()
            tree = drafters.grafted(drafters.chain(right), drafters.junk(11, VOCAB, length)([]), rng)
            # A stranger in front: no node's index is its depth.
            tree = drafters.grafted(drafters.chain([0]), drafters.permuted(tree, rng), rng, below_root=True)
            path = node_path(tree, right)
            verify(runner, sequence, int(rng.integers(1, VOCAB)), tree)
            runner.accept(sequence, np.array(path[:count], np.int64))
        assert sequence.length == length + 5 + 9
        sequence.close()
    runner.cache.check_idle()


def node_path(tree: DraftTree, tokens: Sequence[int]) -> list[int]:
    """Node indices of the path with these tokens."""
    paths = list(paths_of(tree))
    return [paths.index(tuple(tokens[: depth + 1])) for depth in range(len(tokens))]


def check_rows_are_paths(runner: AuditedRunner) -> None:
    """A node's logits equal plain decoding's after its path alone, whatever stands beside it."""
    rng = np.random.default_rng(1)
    for length in ROOTS:
        text = rng.integers(1, VOCAB, length + 1).tolist()
        tree = twins_and_cousins(rng)
        shuffled = drafters.permuted(tree, rng)
        for each in (tree, shuffled):
            sequence = opened(runner, np.array(text[:-1], np.int64))
            logits = verify(runner, sequence, text[-1], each)
            sequence.close()
            runner.require_equal(logits[0], runner.fresh_logits(text))
            for row, path in zip(logits[1:], paths_of(each), strict=True):
                runner.require_equal(row, runner.fresh_logits([*text, *path]))
    runner.cache.check_idle()


def twins_and_cousins(rng: np.random.Generator) -> DraftTree:
    """Three tokens only: equal siblings, equal tokens under different parents, a long thin branch."""
    few = rng.integers(1, VOCAB, 3)
    parents = [ROOT, ROOT, 0, 1, 0, 2, 5, 6, 7, 8, ROOT, 3]
    return drafters.make_tree(few[rng.integers(0, 3, len(parents))].tolist(), parents)


def model_engine(
    runner: ModelRunner, drafting: DraftEngine | None, *, depth: int = 1, eos_ids: tuple[int, ...] = (EOS,)
) -> TargetEngine:
    target = TargetModel(
        runner=runner,
        vocab_size=VOCAB,
        eos_ids=eos_ids,
        detokenizer=lambda _: Letters(0),
        device=runner.decoder.device,
    )
    shape = TreeShape(num_speculative_tokens=MAX_NODES, depth=depth, adaptive=False)
    return TargetEngine(target, verifier=make_verifier("coupled"), drafting=drafting, shape=shape)


def plain_tokens(runner: AuditedRunner, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Plain decoding by definition: a fresh computation per token, independent of the engine."""
    text = list(prompt)
    for _ in range(params.max_tokens):
        logits = runner.fresh_logits(text)[:VOCAB].double()
        if not params.is_greedy:
            noise = torch.from_numpy(race_noise(params.seed or 0, len(text), VOCAB))
            logits = (logits / params.temperature).softmax(0) / noise
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def check_model_identity(
    folder: Path, dtype: torch.dtype, params: SamplingParams, prompt_length: int
) -> dict[str, Outcome]:
    """A network's answers are plain decoding's with every drafter, and its KV a fresh prefill's."""
    runner = AuditedRunner(decoder(folder, dtype))
    prompt = np.random.default_rng(prompt_length).integers(1, VOCAB, prompt_length).tolist()
    plain = plain_tokens(runner, prompt, params)
    truth = [*prompt, *plain, *([1] * 8)]
    engines: dict[str, DraftEngine | None] = {
        "none": None,
        "perfect": drafters.Scripted(drafters.perfect(truth, 7)),
        "wrong": drafters.Scripted(drafters.always_wrong(truth, 7, VOCAB)),
        "partly right": drafters.Scripted(drafters.partly_right(truth, 4, 16, VOCAB, 3)),
        "twin": draft_engine(AuditedRunner(decoder(folder, dtype))),
    }
    outcomes = {}
    for name, drafting in engines.items():
        engine = model_engine(runner, drafting, depth=4, eos_ids=())
        outcomes[name] = serve(engine, prompt, params)
        assert outcomes[name].token_ids == plain, name
    assert runner.num_audits == sum(len(outcome.steps) for outcome in outcomes.values())
    runner.cache.check_idle()
    return outcomes


def draft_engine(runner: ModelRunner, *, children: int = 3) -> LocalModelDrafting:
    engine = ModelDraftEngine(runner, vocab_size=VOCAB)
    return LocalModelDrafting(engine, children=children, eos_ids=(EOS,))


def check_draft_session(runner: AuditedRunner, params: SamplingParams, prompt_length: int) -> int:
    """After any growth and commits a session is what a fresh one over the same text would be.

    Returns how many cached nodes outlived a commit.
    """
    rng = np.random.default_rng(prompt_length)
    prompt = rng.integers(1, VOCAB, prompt_length)
    drafting = draft_engine(runner)
    session = drafting.open(Request(prompt_ids=prompt, params=params), SpeculationStatistics())
    text, survivors = prompt.tolist(), 0
    for _ in range(14):
        for _ in range(int(rng.integers(0, 6))):
            drafting.grow([session], int(rng.integers(1, 4)))
        require_fresh(runner, session, text, prompt_length, params)
        tokens = some_commit(session.tree, rng)
        session.commit(np.array(tokens, np.int64))
        text += tokens
        require_fresh(runner, session, text, prompt_length, params)
        survivors += len(parents_in(session.tree))
    session.close()
    runner.cache.check_idle()
    return survivors


def some_commit(tree: LivingTree, rng: np.random.Generator) -> list[int]:
    """The path to some node, most often one with children, and at times a token nobody has foreseen."""
    nodes = parents_in(tree) if rng.random() < 0.7 else []
    nodes = nodes or tree.slots.tolist()
    path = drafters.tokens_to(tree, int(rng.choice(nodes))) if nodes else []
    return path if path and rng.random() < 0.8 else [*path, int(rng.integers(1, VOCAB))]


def parents_in(tree: LivingTree) -> list[int]:
    """Nodes that have children: these have been computed, so their KV must be there."""
    return [slot for slot in np.unique(tree.parents[tree.slots]).tolist() if slot != ROOT]


def require_fresh(
    runner: AuditedRunner,
    session: ModelDraftSession,
    text: list[int],
    prompt_length: int,
    params: SamplingParams,
) -> None:
    tree, sequence = session.tree, session._sequence
    if not len(tree):
        assert sequence.length <= len(text)
        runner.require_equal(runner.kv(sequence), runner.fresh_kv(text[: sequence.length]))
        return
    runner.require_equal(runner.kv(sequence), runner.fresh_kv(text))
    for slot in [ROOT, *parents_in(tree)]:
        path = drafters.tokens_to(tree, slot)
        if path:
            entry = runner.cache.pool[:, session._nodes.slots[slot]]
            runner.require_equal(entry, runner.fresh_kv([*text, *path])[:, -1])
        children = tree.tokens[tree.slots[tree.parents[tree.slots] == slot]]
        expected = best_children(runner, [*text, *path], prompt_length, params)
        assert set(children.tolist()) == expected, f"children of {path} below {len(text)} tokens"


def best_children(
    runner: AuditedRunner, text: list[int], prompt_length: int, params: SamplingParams
) -> set[int]:
    """The top three of p / E after a text, computed from nothing."""
    ids = np.array(text, np.int64)
    stop_ids = {EOS, *params.stop_token_ids}
    processor = LogitProcessor(params, ids[:prompt_length], VOCAB, stop_ids)
    processor.commit(ids[prompt_length:])
    logits = processor.process(runner.fresh_logits(text)[None], DraftTree.empty())
    streams = streams_of([TokenChooser(params)], [np.array([len(text)])])
    scores = perturbed(logits, streams)[0].double().numpy()
    best = np.argsort(-scores)[:3]
    return {int(token) for token in best if scores[token] / scores.sum() >= MIN_SCORE}


def check_idle_after_closing(target: AuditedRunner) -> None:
    """Requests closed after any number of steps leave no block behind, at the target or at the drafter."""
    draft = AuditedRunner(target.decoder)
    request = Request(prompt_ids=np.arange(1, 60), params=SamplingParams(seed=1, max_tokens=30))
    for steps in range(4):
        for drafting in (draft_engine(draft), drafters.Scripted(drafters.junk(12, VOCAB, 0))):
            with model_engine(target, drafting).start(request) as run:
                for _ in range(steps):
                    run.step()
            target.cache.check_idle()
            draft.cache.check_idle()
