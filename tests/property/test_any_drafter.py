"""Any drafter, however bad or malicious, leaves the output unchanged."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments.drafters import Growing, Scripted, make_tree
from instruments.serving import EOS, serve, table_engine
from instruments.table_lm import TableLM

from outrider.actors.drafting import DraftEngine
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import ROOT, DraftTree

VOCAB = 5
PROMPT = [1, 2, 3]
LM = TableLM.random(7, vocab_size=VOCAB, order=2)
PICK = st.integers(0, 40)
TOKEN = st.integers(0, VOCAB - 1)
SCORE = st.sampled_from([0.0, 1e-300, 0.2, 0.5, 1.0])


@st.composite
def living_drafters(draw: st.DrawFn) -> DraftEngine:
    """Each draft step adds drawn children to drawn nodes, and calls drawn nodes expanded."""
    step = st.tuples(st.lists(st.tuples(PICK, TOKEN, SCORE), max_size=8), st.lists(PICK, max_size=3))
    plan = draw(st.lists(step, min_size=1, max_size=5))

    def grow(tree: LivingTree, text: list[int], count: int) -> None:  # noqa: ARG001
        children, expanded = plan[count % len(plan)]
        members = np.append(tree.slots, ROOT)
        tree.mark_expanded(members[[pick % len(members) for pick in expanded]])
        parents = members[[pick % len(members) for pick, _, _ in children]]
        tree.add(parents, [token for _, token, _ in children], [score for _, _, score in children])

    return Growing(grow, capacity=draw(st.sampled_from([1, 3, 20])))


@st.composite
def raw_drafters(draw: st.DrawFn) -> DraftEngine:
    """Each round sends a drawn tree as it is, twins and all."""
    plan = draw(st.lists(st.lists(st.tuples(PICK, TOKEN), max_size=12), min_size=1, max_size=4))

    def propose(text: list[int]) -> DraftTree:
        nodes = plan[len(text) % len(plan)]
        parents = [pick % (index + 1) - 1 for index, (pick, _) in enumerate(nodes)]
        return make_tree([token for _, token in nodes], parents)

    return Scripted(propose)


PARAMETERS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 1.0]), "seed": st.integers(0, 2**32)},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.8]),
        "presence_penalty": st.sampled_from([0.6]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(TOKEN, max_size=2),
        "stop": st.lists(st.text("bcde", min_size=1, max_size=3), max_size=2),
        "ignore_eos": st.booleans(),
    },
)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    drafting=living_drafters() | raw_drafters(),
    values=PARAMETERS,
    max_tokens=st.integers(8, 16),
    depth=st.integers(1, 3),
    adaptive=st.booleans(),
)
def test_output_does_not_depend_on_the_drafter(
    drafting: DraftEngine, values: dict[str, Any], max_tokens: int, depth: int, adaptive: bool
) -> None:
    params = SamplingParams(max_tokens=max_tokens, **values)
    adaptive = adaptive and isinstance(drafting, Growing)
    engine = table_engine(LM, drafting, budget=12, depth=depth, adaptive=adaptive, eos_ids=(EOS,))
    outcome = serve(engine, PROMPT, params)
    plain = serve(table_engine(LM, eos_ids=(EOS,)), PROMPT, params)
    assert outcome.answer == plain.answer
    assert outcome.streamed == outcome.text
    assert len(outcome.steps) <= len(plain.steps)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(drafting=living_drafters() | raw_drafters(), seed=st.integers(0, 2**64 - 1), greedy=st.booleans())
def test_output_is_the_definition_s(drafting: DraftEngine, seed: int, greedy: bool) -> None:
    params = SamplingParams(temperature=0.0 if greedy else 1.0, seed=seed, max_tokens=9)
    outcome = serve(table_engine(LM, drafting, budget=12, depth=2), PROMPT, params)
    assert outcome.token_ids == (LM.greedy(PROMPT, 9) if greedy else LM.sampled(PROMPT, 9, seed))
