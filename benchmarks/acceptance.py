"""How often the target's own token is among the draft's first k choices, on held-out code.

    python benchmarks/acceptance.py [--quantization int8] [--prompts 32] [--tokens 128] [--seed 0]

Two kinds of positions. *Continuations*: what speculation meets, the target's own continuations
of held-out prompts. *Text*: held-out files themselves, where both models see the true text.
In both the target takes its token with the request's noise, and the draft ranks its guesses
with the same noise (coupled) or without any (uncoupled).
"""

import argparse

import numpy as np
import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.cluster.bench.prediction import logits_of
from outrider.kernels.guesses import perturbed
from outrider.models.demo import corpus, pair
from outrider.models.loader import LoadedModel, load_model
from outrider.models.numerics import Numerics
from outrider.speculation.sampling import LogitProcessor, TokenChooser, streams_of
from outrider.speculation.tree import DraftTree

WINDOW = 512
RANKS = (1, 2, 4, 8)
TEMPERATURES = (0.0, 0.7, 1.0)


def continuations(
    llm: LLM, prompts: list[str], temperature: float, tokens: int, seed: int
) -> list[tuple[np.ndarray, int]]:
    """Prompt with continuation, and the prompt's length; every prompt has its own seed."""
    texts = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=temperature, max_tokens=tokens, seed=seed + index, ignore_eos=True
        )
        (output,) = llm.generate(prompt, params, speculative=False)
        ids = output.prompt_token_ids
        texts.append((np.array(ids + output.outputs[0].token_ids), len(ids)))
    return texts


def windows(model: LoadedModel, positions: int, seed: int) -> list[np.ndarray]:
    """Windows of held-out text, no two from the same place, spread over all files."""
    texts = [model.tokenizer.encode(corpus.read_source(path)) for path in corpus.held_out_library_files()]
    places = [(i, s) for i, text in enumerate(texts) for s in range(0, len(text) - WINDOW, WINDOW)]
    chosen = np.random.default_rng(seed).permutation(len(places))[: -(-positions // WINDOW)]
    return [np.array(texts[i][s : s + WINDOW]) for i, s in (places[c] for c in chosen)]


@torch.inference_mode()
def ranks(
    target: torch.Tensor, draft: torch.Tensor, temperature: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the target's token in the draft's coupled and in its uncoupled order, each ``[positions]``."""
    params = SamplingParams(temperature=temperature, seed=seed)
    processor = LogitProcessor(params, np.zeros(1, np.int64), target.shape[1], ())
    chooser = TokenChooser(params)
    rows = np.zeros(len(target), np.int64)
    positions = np.arange(1, len(target) + 1)
    tokens = chooser.choose(processor.process(target, DraftTree.empty(), rows), positions)
    processed = processor.process(draft, DraftTree.empty(), rows)
    coupled = perturbed(processed, streams_of([chooser], [positions]))
    mine = torch.from_numpy(tokens)[:, None]
    orders = (coupled, processed)
    return tuple((order > order.gather(1, mine)).sum(1).numpy() for order in orders)  # type: ignore[return-value]


def shares(
    target: LoadedModel,
    draft: LoadedModel,
    texts: list[tuple[np.ndarray, int]],
    temperature: float,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Share of positions from each text's first one on whose token is among the first k, by k."""
    found = []
    for index, (ids, first) in enumerate(texts):
        both = ranks(logits_of(target, ids), logits_of(draft, ids), temperature, seed + index)
        found.append([order[max(0, first - 1) :] for order in both])
    coupled, uncoupled = (np.concatenate(each) for each in zip(*found, strict=True))
    return {
        "coupled": {str(k): round(float((coupled < k).mean()), 4) for k in RANKS},
        "uncoupled": {str(k): round(float((uncoupled < k).mean()), 4) for k in RANKS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--quantization", help="of the draft's weights")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    target, draft = (
        load_model(name, dtype="auto", numerics=Numerics.FAST, max_model_len=None, quantization=quantization)
        for name, quantization in ((args.target, None), (args.draft, args.quantization))
    )
    llm = LLM(args.target, numerics="fast")
    prompts = corpus.held_out_prompts(args.prompts)
    held_out = [(ids, 0) for ids in windows(target, args.prompts * args.tokens, args.seed)]
    result: dict[str, dict[str, object]] = {"continuations": {}, "text": {}}
    for temperature in TEMPERATURES:
        generated = continuations(llm, prompts, temperature, args.tokens, args.seed)
        for kind, texts in (("continuations", generated), ("text", held_out)):
            found = shares(target, draft, texts, temperature, args.seed)
            result[kind][str(temperature)] = found
            firsts = "  ".join(f"{k}: {share:.3f}" for k, share in found["coupled"].items())
            print(
                f"T={temperature} {kind}: among the first {firsts}; alone first {found['uncoupled']['1']:.3f}"
            )
    positions = args.prompts * args.tokens
    used = conditions(dtype=str(target.decoder.dtype), quantization=args.quantization)
    finish({"acceptance": result, "positions": positions, **used})


if __name__ == "__main__":
    main()
