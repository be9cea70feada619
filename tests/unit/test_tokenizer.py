"""Tokenizer, and the promise that streamed text, joined, is the text of all ids."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer, check_same_vocabulary
from outrider.speculation.errors import CheckpointError, ModelNotFoundError, VocabularyMismatchError

TEXT = "a naïve café, 東京 and 😀👩‍👩‍👧 — def f(n):\n    return n  # ünï�ödd\n"


@pytest.fixture(scope="session")
def byte_level(tiny_tokenizer_folder: Path) -> Tokenizer:
    """The tiny tokenizer with a special token that no attribute of transformers names (as Llama 3 has)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer._tokenizer.add_special_tokens([AddedToken("<|reserved|>", special=True)])
    return Tokenizer(tokenizer)


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer, as Llama 2 has: a few words, and a token for each byte."""
    words = ["<unk>", "▁the", "▁", "fox", "東", "▁a", "."]
    tokens = words + [f"<0x{byte:02X}>" for byte in range(256)]
    raw = RawTokenizer(
        models.BPE(
            {token: id_ for id_, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


class Counting(Tokenizer):
    """Notes how many ids each call decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer._tokenizer)
        self.decoded: list[int] = []

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded.append(len(ids))
        return super().decode(ids, skip_special_tokens)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *, chunk: int = 1, skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    pushed = [detokenizer.push(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]
    return [*pushed, detokenizer.flush()]


def test_encodes_and_decodes_as_transformers(tiny_tokenizer_folder: Path) -> None:
    ours, theirs = Tokenizer.load(tiny_tokenizer_folder), AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    ids = ours.encode(TEXT)
    assert ids == theirs.encode(TEXT)
    assert ours.decode(ids) == TEXT
    assert ours.eos_token_id == theirs.eos_token_id == 0
    assert ours.vocab_size == len(theirs) == 300
    assert ours.decode([0, *ids]) == TEXT
    assert ours.decode([0, *ids], skip_special_tokens=False) == "<|endoftext|>" + TEXT


def test_special_tokens_are_added_as_the_model_wants(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).encode("fox") == [0, *Tokenizer.load(tiny_tokenizer_folder).encode("fox")]


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read") as raised:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_model_folder_without_tokenizer(make_model_folder, tmp_path: Path) -> None:
    """transformers alone would make up an empty tokenizer from the model type."""
    shutil.copy(make_model_folder("llama") / "config.json", tmp_path)
    with pytest.raises(ModelNotFoundError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_streamed_text_is_whole_text(byte_level: Tokenizer, chunk: int) -> None:
    ids = byte_level.encode(TEXT * 5)
    assert "".join(pieces(byte_level, ids, chunk=chunk)) == TEXT * 5


def test_half_characters_are_held_back(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("é😀")
    assert len(ids) > 4, "the characters must be split over several tokens"
    emitted = pieces(byte_level, ids)
    assert [piece for piece in emitted if piece] == ["é", "😀"]
    assert emitted[-1] == ""
    assert pieces(byte_level, ids[:-1])[-1] == "\ufffd", "flush emits what is left"


def test_text_comes_as_soon_as_it_is_complete(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the quick fox")
    assert pieces(byte_level, ids) == [*(byte_level.decode([id_]) for id_ in ids), ""]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_their_text(
    data: st.DataObject, byte_level: Tokenizer, byte_fallback: Tokenizer
) -> None:
    """Includes invalid UTF-8, special tokens and the padding of a head beyond the tokenizer."""
    tokenizer = data.draw(st.sampled_from([byte_level, byte_fallback]))
    # Byte tokens of the characters' middle and special ids come up as often as all others together.
    bytes_ = [tokenizer.encode(character)[-1] for character in "é東😀\u0080"]
    special = [0, tokenizer.vocab_size - 1, tokenizer.vocab_size + 3]
    one = st.integers(0, tokenizer.vocab_size + 9) | st.sampled_from(bytes_ + special)
    word = st.sampled_from(["é", "東京", "😀", " the fox", "a.\n"]).map(tokenizer.encode)
    parts = data.draw(st.lists(one.map(lambda id_: [id_]) | word, max_size=80))
    ids = [id_ for part in parts for id_ in part]
    skip = data.draw(st.booleans())
    emitted = pieces(tokenizer, ids, chunk=data.draw(st.integers(1, 5)), skip=skip)
    assert "".join(emitted) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("seed", range(4))
def test_long_garbage_streams_to_its_text(byte_level: Tokenizer, byte_fallback: Tokenizer, seed: int) -> None:
    """Long enough to cut the window hundreds of times at every kind of place."""
    draw = random.Random(seed)
    for tokenizer in (byte_level, byte_fallback):
        ids = [draw.randrange(tokenizer.vocab_size + 5) for _ in range(3000)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_cut_within_a_character(byte_level: Tokenizer) -> None:
    """The window is cut while a character is incomplete, for each number of bytes it lacks."""
    filler, character = byte_level.encode("x")[0], byte_level.encode("😀")
    for length in range(40):
        ids = [filler] * length + character + [300] * 10 + character[:2] + [300] * 10 + character[2:]
        assert "".join(pieces(byte_level, ids)) == "x" * length + "😀😀"


def test_byte_runs_wait_for_their_end(byte_fallback: Tokenizer) -> None:
    """A later bad byte turns a whole run into U+FFFD, so its first characters cannot go out before."""
    the, newline = byte_fallback.vocabulary["▁the"], byte_fallback.vocabulary["<0x0A>"]
    lead = byte_fallback.vocabulary["<0xE2>"]
    assert pieces(byte_fallback, [the, newline, the]) == ["the", "", "\n the", ""]
    assert pieces(byte_fallback, [the, newline, lead, the]) == ["the", "", "", "\ufffd\ufffd the", ""]
    assert pieces(byte_fallback, [the, newline]) == ["the", "", "\n"]


def test_cost_does_not_grow_with_the_text(byte_level: Tokenizer) -> None:
    """A window that waits for valid text would grow without bound on invalid bytes."""
    counting = Counting(byte_level)
    continuation = byte_level.encode("\u0080")[-1:]
    for ids in (byte_level.encode(TEXT * 20), byte_level.encode("\ufffd" * 500), continuation * 2000):
        counting.decoded.clear()
        pieces(counting, ids)
        assert max(counting.decoded) <= IncrementalDetokenizer.WINDOW + 1
        assert len(counting.decoded) <= 2 * len(ids) + 1


def test_cost_of_a_byte_run(byte_fallback: Tokenizer) -> None:
    counting = Counting(byte_fallback)
    pieces(counting, [byte_fallback.vocabulary["<0x41>"]] * 2000)
    assert sum(counting.decoded) <= 2100


def test_fingerprint_is_of_tokens_and_ids(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    assert tokenizer.fingerprint == Tokenizer.load(tiny_tokenizer_folder).fingerprint
    assert len(tokenizer.fingerprint) == 64
    swapped = swap_two_ids(tiny_tokenizer_folder, tmp_path)
    assert swapped.vocab_size == tokenizer.vocab_size
    assert swapped.fingerprint != tokenizer.fingerprint


def test_vocabularies_that_differ_are_named(
    tiny_tokenizer_folder: Path, byte_level: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    check_same_vocabulary(tokenizer, Tokenizer.load(tiny_tokenizer_folder))
    with pytest.raises(
        VocabularyMismatchError,
        match=r"\(301 and 300 tokens\): '<\|reserved\|>' is id 300 in the draft and missing in the target",
    ):
        check_same_vocabulary(tokenizer, byte_level)
    with pytest.raises(
        VocabularyMismatchError,
        match=r"\(300 and 300 tokens\): '!' is id 2 in the draft and id 1 in the target",
    ):
        check_same_vocabulary(tokenizer, swap_two_ids(tiny_tokenizer_folder, tmp_path))


def swap_two_ids(folder: Path, out: Path) -> Tokenizer:
    """The tokenizer of ``folder`` with the ids 1 and 2 exchanged."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    raw = json.loads((out / "tokenizer.json").read_text())
    swapped = {1: 2, 2: 1}
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = {token: swapped.get(id_, id_) for token, id_ in vocabulary.items()}
    (out / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.load(out)
