"""How often one position's draft is right: with shared noise, without it, and by recursive rejection.

    python benchmarks/coupling.py [--prompts 32] [--tokens 128] [--draws 4] [--seed 0]

The target continues held-out prompts of the demo pair; at every position of these texts k children are
drafted.

- *coupled*: the k first in the order that the shared noise gives the draft's logits. Right if the target's
  token is among them.
- *matching*: the k most likely of the draft, without shared noise (as in EAGLE-2's trees).
- *rejection*: k drawn from the draft without replacement, judged by recursive rejection (Jeon et al.,
  "Recursive Speculative Decoding", 2024; Chen et al., "Sequoia", 2024). With one child its chance, the sum
  over tokens of the smaller of both probabilities, is the most that any rule without shared noise accepts.

The first two are counted, the third is the chance itself but for the children, of which ``--draws`` sets are
drawn at every position; the same code is first compared with enumeration over a small vocabulary. *ahead* is
coupled less rejection, text by text. Intervals of 95 % are of a bootstrap over texts.
"""

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from acceptance import RANKS, continuations, ranks
from common import conditions, finish

from outrider import LLM
from outrider.cluster.bench.prediction import logits_of
from outrider.cluster.bench.report import RESAMPLES
from outrider.models.demo import corpus, pair
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics

TEMPERATURES = (0.5, 1.0, 1.2)
RULES = ("coupled", "matching", "rejection")
SMALL_VOCABULARY, CHECKED_DRAWS, CHECKED_RANKS, MOST_STANDARD_ERRORS = 5, 20_000, 3, 5.0


def rejected_by_draws(target: torch.Tensor, draft: torch.Tensor, children: torch.Tensor) -> torch.Tensor:
    """Chance that recursive rejection rejects all of 1, 2, ... K + 1 children, ``[K + 1, R]``.

    target, draft: probabilities ``[R, V]``, float64. children: of every row, drawn from the draft without
    replacement, int64 ``[R, K]``. The last one that counts is none of these: its chance is the mean over the
    draft's remaining tokens.
    """
    wanted, left = target.clone(), draft.clone()
    rejected = torch.ones(len(target), dtype=target.dtype)
    found = []
    for child in (*children.T, None):
        found.append(rejected * (1 - torch.minimum(wanted, left).sum(1)))
        if child is not None:
            at = child[:, None]
            kept = (wanted.gather(1, at) / left.gather(1, at)).clamp(max=1.0)[:, 0]
            rejected = rejected * (1 - kept)
            wanted = normalised((wanted - left).clamp(min=0.0))
            left = normalised(left.scatter(1, at, 0.0))
    return torch.stack(found)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """``[R, V]``; a row of zeros, whose branch has no chance, stays one."""
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def rejected_by_enumeration(target: torch.Tensor, draft: torch.Tensor, count: int) -> float:
    """The same for one row and ``count`` children, over all ordered sets of children; ``[V]`` each."""
    total = 0.0
    for children in itertools.permutations(range(len(target)), count):
        wanted, left, chance = target.clone(), draft.clone(), 1.0
        for child in children:
            chance *= float(left[child]) * (1 - min(1.0, float(wanted[child] / left[child])))
            if not chance:
                break
            wanted = torch.clamp(wanted - left, min=0.0)
            wanted, left[child] = wanted / wanted.sum(), 0.0
            left = left / left.sum()
        total += chance
    return total


def drawn(draft: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    """Children without replacement in the order of their drawing, int64 ``[R, count]``."""
    race = draft / torch.empty_like(draft).exponential_(generator=random)
    return race.topk(count, dim=1).indices


def check_the_estimate(seed: int) -> float:
    """Largest deviation from enumeration, in standard errors.

    Raises:
        SystemExit: it is too large.
    """
    random = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(4):
        target, draft = torch.rand(2, SMALL_VOCABULARY, generator=random, dtype=torch.float64).pow(3)
        target, draft = target / target.sum(), draft / draft.sum()
        rows = [each.expand(CHECKED_DRAWS, -1) for each in (target, draft)]
        found = rejected_by_draws(*rows, drawn(rows[1], CHECKED_RANKS - 1, random))
        for count, each in enumerate(found, 1):
            error = max(float(each.std()) / CHECKED_DRAWS**0.5, 1e-12)
            worst = max(
                worst, abs(float(each.mean()) - rejected_by_enumeration(target, draft, count)) / error
            )
    if worst > MOST_STANDARD_ERRORS:
        raise SystemExit(f"the estimate is {worst:.1f} standard errors from enumeration")
    return worst


@torch.inference_mode()
def accepted(
    target: torch.Tensor, draft: torch.Tensor, temperature: float, seed: int, first: int, draws: int
) -> dict[str, np.ndarray]:
    """Of one text, by rule: mean acceptance for every number of children, ``[len(RANKS)]``.

    target, draft: logits ``[positions, V]`` of the whole text. first: row of the first generated token.
    """
    counted = [order[first:] for order in ranks(target, draft, temperature, seed)]
    p, q = (torch.softmax(each[first:].double() / temperature, 1) for each in (target, draft))
    random = torch.Generator().manual_seed(seed)
    sets = [rejected_by_draws(p, q, drawn(q, max(RANKS) - 1, random)) for _ in range(draws)]
    by_rejection = 1 - torch.stack(sets).mean((0, 2)).numpy()
    shares = [np.array([(order < k).mean() for k in RANKS]) for order in counted]
    return dict(zip(RULES, (*shares, by_rejection[np.array(RANKS) - 1]), strict=True))


def summary(texts: Sequence[np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Mean over texts by number of children, with its interval. texts: ``[len(RANKS)]`` each."""
    values = np.array(texts)
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [0.025, 0.975], axis=0)
    return {
        str(k): {"mean": round(float(mean), 4), "low": round(float(a), 4), "high": round(float(b), 4)}
        for k, mean, a, b in zip(RANKS, values.mean(0), low, high, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deviation = check_the_estimate(args.seed)
    target, draft = (
        load_model(name, dtype="auto", numerics=Numerics.FAST, max_model_len=None)
        for name in (args.target, args.draft)
    )
    llm = LLM(args.target, numerics="fast")
    prompts = corpus.held_out_prompts(args.prompts)
    result = {}
    for temperature in TEMPERATURES:
        texts = continuations(llm, prompts, temperature, args.tokens, args.seed)
        each = [
            accepted(
                logits_of(target, ids[:-1]),
                logits_of(draft, ids[:-1]),
                temperature,
                args.seed + index,
                first - 1,
                args.draws,
            )
            for index, (ids, first) in enumerate(texts)
        ]
        result[str(temperature)] = {
            **{rule: summary([text[rule] for text in each], args.seed) for rule in RULES},
            "ahead": summary([text["coupled"] - text["rejection"] for text in each], args.seed),
        }
        for rule, by_count in result[str(temperature)].items():
            shown = "  ".join(
                f"{k}: {v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for k, v in by_count.items()
            )
            print(f"T={temperature} {rule:9}  {shown}", flush=True)
    finish(
        {
            "coupling": result,
            "positions": args.prompts * args.tokens,
            "standard_errors_from_enumeration": round(deviation, 2),
            **conditions(dtype=str(target.decoder.dtype), draws=args.draws),
        }
    )


if __name__ == "__main__":
    main()
