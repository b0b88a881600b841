"""Text to token ids, from a tokenizer's bytes alone.

The `tokenizers` library reads `tokenizer.json`, which is what `transformers.AutoTokenizer` uses
too, so the ids are those that a user gets outside fedark. A BERT vocabulary (`vocab.txt`) is the
only fallback; other formats would need code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import (
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.tuning.weights import Files

__all__ = ["TextEncoder"]


class TextEncoder:
    """Encodes prompts and answers.

    Attributes:
        pad_id: id for padding.
        eos_id: id that ends an answer, or None where the tokenizer has none.
    """

    def __init__(
        self, files: Files, *, max_length: int, pad_id: int | None = None, eos_id: int | None = None
    ) -> None:
        """Read the tokenizer in `files`; `pad_id` and `eos_id` are the model configuration's, where
        it names them.

        Raises:
            ModelError: there is none, it is malformed, or no token can serve for padding.
        """
        settings = _settings(files)
        self._tokenizer = _tokenizer(files, settings)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self.eos_id = eos_id if eos_id is not None else self._special(settings, "eos_token")
        pads = (pad_id, self._special(settings, "pad_token"), self.eos_id)
        pad = next((value for value in pads if value is not None), None)
        if pad is None:
            raise ModelError(
                "The tokenizer has no token for padding.",
                safe="Nothing was loaded.",
                fix="Add a pad_token to it.",
            )
        self.pad_id = pad
        first = self._encoded(["a"], special=False)[0].tokens[:1]
        # Sentencepiece-like tokenizers mark a word's start themselves; others need the blank that
        # stands before it.
        self._gap = "" if first and first[0].startswith("\u2581") else " "

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts with special tokens, at most `max_length` each; over-long ones lose
        their end.
        """
        self._tokenizer.enable_truncation(self._max_length)
        encodings = self._encoded(texts)
        self._tokenizer.no_truncation()
        return [encoding.ids or [self.pad_id] for encoding in encodings]

    def prompts(self, prompts: Sequence[str], reserved: Sequence[int]) -> list[list[int]]:
        """Ids of prompts that are to be answered: the opening special token stays, a closing end
        token does not.

        Each leaves `reserved` of the `max_length` tokens free for its answer; an over-long prompt
        loses its start, because what is asked tends to stand at the end.
        """
        special, plain = self._encoded(prompts), self._encoded(prompts, special=False)
        result = []
        for full, bare, taken in zip(special, plain, reserved, strict=True):
            opening = full.ids[:1] if full.ids[:1] != bare.ids[:1] else []
            body = bare.ids[-max(1, self._max_length - taken - len(opening)) :]
            result.append(opening + body or [self.pad_id])
        return result

    def answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers as they follow a prompt, with the end token; cut where no room for a
        prompt would be left.
        """
        encodings = self._encoded([self._gap + answer for answer in answers], special=False)
        end = [] if self.eos_id is None else [self.eos_id]
        return [(encoding.ids + end)[: self._max_length - 2] for encoding in encodings]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens."""
        try:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        except BaseException as error:  # as in `_encoded`
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return ""

    def _encoded(self, texts: Sequence[str], *, special: bool = True) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        except BaseException as error:
            # The library raises bare Exception, and where its Rust code panics something that is
            # none, with a text in it.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(
                "The tokenizer fails on a text.",
                safe="Nothing was trained on it.",
                fix="Save the tokenizer again.",
            ) from None

    def _special(self, settings: dict[str, Any], name: str) -> int | None:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        found: int | None = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return found


def _settings(files: Files) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            value = read_json(files.get(name, b"{}"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ModelError(
                f"{name} is not a JSON object.",
                safe="Nothing was loaded.",
                fix="Save the tokenizer again.",
            )
        merged.update(value)
    return merged


def _tokenizer(files: Files, settings: dict[str, Any]) -> Tokenizer:
    if "tokenizer.json" in files:
        try:
            return Tokenizer.from_str(bytes(files["tokenizer.json"]).decode())
        except Exception:  # the library raises bare Exception, with content of the file in its text
            raise ModelError(
                "tokenizer.json is malformed.",
                safe="Nothing was loaded.",
                fix="Save the tokenizer again.",
            ) from None
    if "vocab.txt" not in files:
        raise ModelError(
            "The base model has neither tokenizer.json nor vocab.txt.",
            safe="Nothing was loaded.",
            fix=(
                "Save a fast tokenizer with it:"
                " AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
            ),
        )
    try:
        words = bytes(files["vocab.txt"]).decode().split("\n")
    except UnicodeDecodeError:
        raise ModelError(
            "vocab.txt is not UTF-8.", safe="Nothing was loaded.", fix="Save the tokenizer again."
        ) from None
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words) if word.rstrip("\r")}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]
    if missing:
        raise ModelError(
            f"vocab.txt is not a BERT vocabulary: it lacks {', '.join(missing)}.",
            safe="Nothing was loaded.",
            fix="Save a fast tokenizer (tokenizer.json) with the model.",
        )
    unknown = "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens(
        [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary]
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    settings.setdefault("pad_token", "[PAD]")
    return tokenizer
