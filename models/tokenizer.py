"""Text to token ids and back, through transformers' tokenizers."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from outrider.speculation.errors import (
    CheckpointError,
    InvalidRequestError,
    ModelNotFoundError,
    VocabularyMismatchError,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these holds the vocabulary of every supported model."""


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTES_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
"""GPT-2's alphabet of bytes (Radford et al. 2019): printable ones are themselves, the others follow 0xFF."""


_OF_THE_RENDERER = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Tokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, tokenizer: Any) -> None:
        """Wraps a tokenizer of transformers."""
        self._tokenizer = tokenizer
        # What transformers does around its library's decoding takes three times as long as that.
        kind = type(tokenizer)
        is_plain = (
            getattr(kind, "_decode", None) is PreTrainedTokenizerFast._decode
            and kind.decode is PreTrainedTokenizerBase.decode
        )
        self._decode = (
            tokenizer.backend_tokenizer.decode
            if is_plain
            else partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Tokenizer saved in ``folder``; nothing is downloaded and no code of the folder runs.

        Raises:
            ModelNotFoundError: the folder has no tokenizer files.
            CheckpointError: they cannot be read.
        """
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ModelNotFoundError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the tokenizers library raises plain Exception
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {reason}") from error
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that this model's tokenizer adds by itself.

        Raises:
            InvalidRequestError: it has half of a character, as JSON can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is not valid text: {error}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the model's chat template writes it.

        messages: mappings with ``role`` and ``content``. template: Jinja, in place of the model's own;
        it runs in a sandbox. variables: what the template may use beside.

        Raises:
            InvalidRequestError: there is no template, it refuses these messages, or a variable would be
                a setting of whoever renders it.
        """
        for name in variables or ():
            if name in _OF_THE_RENDERER:
                raise InvalidRequestError(f"chat_template_kwargs.{name} is not supported")
        if template is None and self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template; send a prompt, or configure a template"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program, and raises what programs raise
            raise InvalidRequestError(f"the chat template refuses the messages: {error}") from error
        # A template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; U+FFFD stands for bytes that are no UTF-8.

        Ids beyond the tokenizer's own, which a padded head can give, have no text.
        """
        text: str = self._decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def vocab_size(self) -> int:
        """Number of real tokens, the added ones included."""
        return len(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, the added ones included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the sorted (token, id) pairs: equal exactly for equal vocabularies."""
        pairs = json.dumps(sorted(self.vocabulary.items()), separators=(",", ":"))
        return hashlib.sha256(pairs.encode()).hexdigest()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``decode`` leaves out by default: every token marked special, named or not."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset(id_ for id_, token in added.items() if token.special)

    @cached_property
    def ids(self) -> frozenset[int]:
        """Every id that has a token."""
        return frozenset(self.vocabulary.values())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are spelt in the printable stand-ins for bytes of GPT-2's tokenizer."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else backend.decoder
        return "ByteLevel" in type(decoder).__name__ or "ByteLevel" in repr(decoder)

    def token_text(self, token_id: int) -> str:
        """One token by itself; U+FFFD stands for bytes that are no UTF-8. Nothing is hidden."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, exactly, where the vocabulary spells bytes; else of ``token_text``."""
        if self.is_byte_level and token_id not in self._tokenizer.added_tokens_decoder:
            spelt = self._tokenizer.convert_ids_to_tokens(token_id)
            if spelt is not None and all(character in BYTES_OF for character in spelt):
                return bytes(BYTES_OF[character] for character in spelt)
        if token_id in self.byte_fallback_ids:
            return bytes([int(self._tokenizer.convert_ids_to_tokens(token_id)[3:5], 16)])
        return self.token_text(token_id).encode()

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """Ids of the tokens ``<0x00>`` to ``<0xFF>`` with which SentencePiece vocabularies spell bytes."""
        names = (f"<0x{byte:02X}>" for byte in range(256))
        return frozenset(self.vocabulary[name] for name in names if name in self.vocabulary)


class IncrementalDetokenizer:
    """Turns a growing list of ids into a growing text.

    All that ``push`` and ``flush`` return, joined, equals ``Tokenizer.decode`` of all ids.
    Only a short window of the last ids is ever decoded again, so a token costs the same
    at the end of a long text as at its start.

    Invariants: ``_window`` holds the last settled ids that have text, and ``_sent``
    characters of its text have been emitted, all but at most a final U+FFFD. An
    incomplete UTF-8 sequence decodes to that one U+FFFD, has at most three bytes, and so
    lies within the ``KEPT`` ids that stay when the window is cut; what comes before it
    cannot change its text, because a UTF-8 decoder resynchronises at each lead byte.
    """

    KEPT = 8
    WINDOW = 24

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._sent = 0
        self._run: list[int] = []
        """Byte tokens at the end. A run of them decodes as a whole: one bad byte turns even
        its complete characters into U+FFFD, so none is settled before the run has ended."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that the next ids complete; may be empty."""
        settled = self._settle(ids)
        return self._emit(hold_incomplete=True) if settled else ""

    def flush(self) -> str:
        """Text still held back; for the end of the ids."""
        self._window += self._run
        self._run = []
        return self._emit(hold_incomplete=False)

    def _settle(self, ids: Sequence[int]) -> bool:
        before = len(self._window)
        for id_ in ids:
            if id_ in self._hidden or id_ not in self._tokenizer.ids:
                continue
            self._run.append(id_)
            if id_ not in self._tokenizer.byte_fallback_ids:
                self._window += self._run
                self._run = []
        return len(self._window) > before

    def _emit(self, *, hold_incomplete: bool) -> str:
        text = self._decode(self._window)
        end = len(text) - (hold_incomplete and text.endswith("\ufffd"))
        new = text[self._sent : end]
        self._sent = end
        if len(self._window) > self.WINDOW:
            self._window = self._window[-self.KEPT :]
            self._sent = len(self._decode(self._window)) - (len(text) - end)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Passes if both tokenizers have the same tokens with the same ids.

    The heads of the two models may still differ: rows beyond the tokenizer are padding.

    Raises:
        VocabularyMismatchError: with both sizes and one token that differs.
    """
    if target.fingerprint == draft.fingerprint:
        return
    differing = {token for token, _ in target.vocabulary.items() ^ draft.vocabulary.items()}
    token = min(differing, key=lambda token: (target.vocabulary.get(token, 2**32), token))
    raise VocabularyMismatchError(
        f"draft and target have different vocabularies ({draft.vocab_size} and {target.vocab_size} tokens): "
        f"{token!r} is {_id_text(draft, token)} in the draft and {_id_text(target, token)} in the target"
    )


def _id_text(tokenizer: Tokenizer, token: str) -> str:
    id_ = tokenizer.vocabulary.get(token)
    return "missing" if id_ is None else f"id {id_}"
