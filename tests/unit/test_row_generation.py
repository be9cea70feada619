"""Rows of tables: texts beside them, errors in a column, and several tables in one engine's steps."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.api.local_backend import LocalBackend
from outrider.cluster.api.service import ModelSettings, OfferedModel
from outrider.cluster.batch import GenerationStage, ProcessorConfig
from outrider.cluster.row_generation import COLUMNS, RowGenerator
from outrider.speculation.errors import InvalidConfigError

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    path: Path = make_model_folder("llama")
    return path


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), speculative_config={"method": "ngram"}, max_num_seqs=4) as model:
        yield model


def generated(llm: LLM, *tables: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What becomes of tables that are there at once."""

    async def all_of_them() -> list[list[dict[str, Any]]]:
        backend = LocalBackend(llm)
        model = OfferedModel(backend.card, ModelSettings(names=("x",), chat_template=TEMPLATE))
        generator = RowGenerator(backend, model, 0)
        try:
            return await asyncio.gather(*map(generator.rows, tables))
        finally:
            await backend.close()

    return asyncio.run(all_of_them())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "a row must have either prompt or messages"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "either prompt or messages"),
    ({"prompt": "a", "sampling_params": {"max_token": 3}}, "sampling_params has no 'max_token' here"),
    ({"prompt": "a", "sampling_params": {"stream": True}}, "sampling_params has no 'stream' here"),
    ({"prompt": "a", "sampling_params": {"temperature": "hot"}}, "temperature: should be a valid number"),
    ({"prompt": "a", "sampling_params": {"top_p": 2}}, "top_p must be within (0, 1], not 2"),
    ({"prompt": "a", "sampling_params": {"n": 2}}, "a row must ask for one text, not 2"),
    ({"prompt": ["a", "b"]}, "a row must ask for one text, not 2"),
    ({"prompt": "a", "sampling_params": 7}, "sampling_params must be a mapping, not 7"),
]


def test_errors_are_their_row_s(llm: LLM) -> None:
    good = {"prompt": [5, 6], "sampling_params": {"max_tokens": 6, "seed": 1, "top_k": None}}
    chat = {"messages": [{"role": "user", "content": "fox"}], "sampling_params": {"max_tokens": 6, "seed": 1}}
    (expected,) = llm.generate([[5, 6]], SamplingParams(max_tokens=6, seed=1))
    (rows,) = generated(llm, [good, *(each for each, _ in WRONG), chat])
    assert all(set(each) == set(COLUMNS) for each in rows)
    assert rows[0]["generated_tokens"] == expected.outputs[0].token_ids
    assert rows[0]["generated_text"] == expected.outputs[0].text
    assert rows[0]["num_generated_tokens"] == len(expected.outputs[0].token_ids)
    assert rows[0]["num_input_tokens"] == 2
    assert rows[0]["error"] is rows[-1]["error"] is None
    assert rows[-1]["num_generated_tokens"] > 0
    for answer, (_, words) in zip(rows[1:-1], WRONG, strict=True):
        assert words in answer["error"]
        assert [name for name in COLUMNS if answer[name] is not None] == ["error"]


def test_tables_share_steps(folder: Path) -> None:
    """One request a table: in steps of its own each would take as many as it has tokens."""
    params = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.0}
    tables = [[{"prompt": [number, 5], "sampling_params": params}] for number in range(1, 5)]
    with LLM(str(folder), max_num_seqs=4) as llm:
        before = llm.engine.steps
        generated(llm, *tables)
        assert 40 <= llm.engine.steps - before < 80


def test_rows_without_a_seed_are_drawn_from_what_they_are(folder: Path) -> None:
    rows = [{"prompt": [5], "item": number, "sampling_params": {"max_tokens": 8}} for number in range(3)]
    with LLM(str(folder), max_num_seqs=4) as llm:
        (first,) = generated(llm, [*rows, rows[0]])
    with LLM(str(folder), max_num_seqs=2) as llm:
        (again,) = generated(llm, rows[::-1])
    texts = [each["generated_tokens"] for each in first]
    assert texts[0] == texts[3]
    assert texts[0] != texts[1]
    assert [each["generated_tokens"] for each in again] == texts[2::-1]


def test_an_engine_that_ended_is_no_row_s_error(llm: LLM) -> None:
    async def ask() -> None:
        backend = LocalBackend(llm)
        model = OfferedModel(backend.card, ModelSettings(names=("x",)))
        await backend.close()
        backend._service.ended.set_exception(RuntimeError("gone"))
        await RowGenerator(backend, model, 0).rows([{"prompt": "a"}])

    with pytest.raises(UnavailableError):
        asyncio.run(ask())


def test_the_columns_are_those_of_the_stage(folder: Path) -> None:
    import pyarrow as pa

    stage = GenerationStage(ProcessorConfig(model_source=str(folder)))
    rows = [{"prompt": "a", "sampling_params": {"top_p": 2.0}, "error": "old"}]
    table = asyncio.run(stage(pa.Table.from_pylist(rows)))
    assert table.column_names == ["prompt", "sampling_params", *COLUMNS]
    assert table.schema.field("generated_tokens").type == pa.list_(pa.int64())
    assert table["error"].to_pylist() == ["top_p must be within (0, 1], not 2.0"]


IMPOSSIBLE: list[dict[str, Any]] = [
    {"batch_size": 0},
    {"max_concurrent_batches": 0},
    {"concurrency": 0},
    {"concurrency": (2, 1)},
    {"seed": -1},
]


@pytest.mark.parametrize("values", IMPOSSIBLE)
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidConfigError, match=name):
        ProcessorConfig(**values)
