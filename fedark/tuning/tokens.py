"""Text to token ids, from a tokenizer's bytes alone.

The ids are those that a user gets from `transformers.AutoTokenizer` outside fedark: the same class
builds the tokenizer from `tokenizer.json` (or a BERT vocabulary, `vocab.txt`) and the settings
beside it. Other formats would need code.
"""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, models
from transformers import BertTokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

from fedark.foundation.errors import ModelError, printable
from fedark.foundation.jsontext import read_json
from fedark.tuning.weights import Files

__all__ = ["TextEncoder"]

_GENERIC = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer"}
_GENERIC |= {"MistralCommonBackend"}
# Of every class: what of its settings is taken from the file, and what never is.
_SETTINGS = {"extra_special_tokens", "split_special_tokens", "add_prefix_space", "truncation_side"}
_SETTINGS |= {"add_bos_token", "add_eos_token"}
_NOT_SETTINGS = {"self", "args", "kwargs", "vocab", "merges", "vocab_file", "merges_file"}
_NOT_SETTINGS |= {"tokenizer_file", "tokenizer_object", "post_processor", "added_tokens_decoder"}
_TOKEN = {"content", "single_word", "lstrip", "rstrip", "normalized", "special"}


class TextEncoder:
    """Encodes prompts and answers.

    Attributes:
        pad_id: id for padding.
        eos_id: id that ends an answer, or None where the tokenizer has none.
        vocabulary_size: one more than the largest id of its vocabulary.
    """

    def __init__(
        self, files: Files, *, max_length: int, pad_id: int | None = None, eos_id: int | None = None
    ) -> None:
        """Read the tokenizer in `files`; `pad_id` and `eos_id` are the model configuration's, where
        it names them.

        Raises:
            ModelError: there is none, it is malformed, or no token can serve for padding.
        """
        backend, self.vocabulary_size = _backend(files)
        self._tokenizer: Tokenizer = backend.backend_tokenizer
        self._max_length = max_length
        self._side = "left" if backend.truncation_side == "left" else "right"
        with _raising(_malformed):
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self.eos_id = eos_id if eos_id is not None else self._id(backend.eos_token)
            pads = (pad_id, self._id(backend.pad_token), self.eos_id)
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

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts with special tokens, at most `max_length` each; over-long ones lose
        their end, or what the tokenizer's `truncation_side` names.
        """
        return [ids for ids, _ in self.cut_texts(texts)]

    def cut_texts(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """As `texts`, and whether each text lost something."""
        with _raising(_failing):
            self._tokenizer.enable_truncation(self._max_length, direction=self._side)
        try:
            encodings = self._encoded(texts)
        finally:
            with _raising(_failing):
                self._tokenizer.no_truncation()
        return [(one.ids or [self.pad_id], bool(one.overflowing)) for one in encodings]

    def prompts(self, prompts: Sequence[str], reserved: Sequence[int]) -> list[list[int]]:
        """Ids of prompts that are to be answered: the opening special token stays, a closing end
        token does not.

        Each leaves `reserved` of the `max_length` tokens free for its answer; an over-long prompt
        loses its start, because what is asked tends to stand at the end.
        """
        result = []
        for (opening, bare), taken in zip(self._opened(prompts), reserved, strict=True):
            body = bare[-max(1, self._max_length - taken - len(opening)) :]
            result.append(opening + body or [self.pad_id])
        return result

    def whole_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """As `prompts`, however long."""
        return [opening + bare or [self.pad_id] for opening, bare in self._opened(prompts)]

    def _opened(self, prompts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The opening special token of each prompt, if it has one, and its other ids."""
        special, plain = self._encoded(prompts), self._encoded(prompts, special=False)
        return [
            (full.ids[:1] if full.ids[:1] != bare.ids[:1] else [], bare.ids)
            for full, bare in zip(special, plain, strict=True)
        ]

    def answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers as they follow a prompt, with the end token; cut where no room for a
        prompt would be left.
        """
        encodings = self._encoded([self._gap + answer for answer in answers], special=False)
        end = [] if self.eos_id is None else [self.eos_id]
        return [(encoding.ids + end)[: self._max_length - 2] for encoding in encodings]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens."""
        with suppress(ModelError), _raising(_failing):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        return ""

    def token(self, number: int) -> str:
        """The text of one token as the tokenizer writes it, a special one's name."""
        with suppress(ModelError), _raising(_failing):
            return self._tokenizer.id_to_token(number) or ""
        return ""

    def _encoded(self, texts: Sequence[str], *, special: bool = True) -> list[Encoding]:
        with _raising(_failing):
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)

    def _id(self, token: Any) -> int | None:
        found = None if token is None else self._tokenizer.token_to_id(str(token))
        return found if found is not None and found < self.vocabulary_size else None


def _backend(files: Files) -> tuple[Any, int]:
    """The tokenizer that AutoTokenizer makes of these files, and one more than its largest id.

    What the file tokenizer.json says is not all: most classes of transformers build the tokenizer
    anew from its vocabulary and the settings beside it. So the same class is asked here, with the
    settings that it knows, and with no name of a file that it could open.

    Raises:
        ModelError: there is none, or its files are malformed or do not fit each other.
    """
    settings = _object(files, "tokenizer_config.json")
    text = _object(files, "tokenizer.json")
    if "tokenizer.json" not in files and "vocab.txt" not in files:
        raise ModelError(
            "The base model has neither tokenizer.json nor vocab.txt.",
            safe="Nothing was loaded.",
            fix=(
                "Save a fast tokenizer with it:"
                " AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
            ),
        )
    with _raising(_malformed):
        byte_level = b'"ByteLevel"' in bytes(files.get("tokenizer.json", b""))
        made = _class(settings, _object(files, "config.json"), byte_level=byte_level)
        if made is TokenizersBackend and not text:
            made = BertTokenizer  # the only one that is a list of words
        options = _options(made, settings, _object(files, "special_tokens_map.json"), text)
        options |= _vocabulary(made, files, text)
        backend = made(**options)
        known = backend.backend_tokenizer.get_vocab(with_added_tokens=False).values()
        return backend, 1 + max(*known, *(added["id"] for added in text.get("added_tokens", ())), 0)


@contextmanager
def _raising(told: Callable[[], ModelError]) -> Iterator[None]:
    """What the library raises, told as something of ours: it raises anything, and where its Rust
    code panics what is no Exception, each with content of a file or of a text in it.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise told() from None


def _malformed() -> ModelError:
    return ModelError(
        "The tokenizer's files are malformed or do not fit each other.",
        safe="Nothing was loaded.",
        fix="Save it again: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
    )


def _failing() -> ModelError:
    return ModelError(
        "The tokenizer fails on a text.",
        safe="Nothing was trained on it.",
        fix="Save the tokenizer again.",
    )


def _class(settings: Mapping[str, Any], config: Mapping[str, Any], *, byte_level: bool) -> Any:
    """The class that AutoTokenizer takes; see `AutoTokenizer.from_pretrained`."""
    model_type = config.get("model_type")
    registered = _plain(TOKENIZER_MAPPING_NAMES.get(model_type)) if model_type else ""
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    own_code = "AutoTokenizer" in (settings.get("auto_map") or ())  # never run here
    mistaken = model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    name = _plain(declared) or registered
    if declared and not own_code:
        if _plain(declared) == "LlamaTokenizer" and not mistaken and byte_level:
            name = ""
        elif registered and registered != _plain(declared):
            name = registered if mistaken else _plain(declared)
            name = "" if registered in _GENERIC else name
    found = tokenizer_class_from_name(name) if name and name not in _GENERIC else None
    if found is None or found.__name__ in _GENERIC:
        return TokenizersBackend
    if not (isinstance(found, type) and issubclass(found, TokenizersBackend)):
        raise ModelError(
            f"The base model's tokenizer, {printable(name, 60)}, is written in Python, which fedark"
            " does not run.",
            safe="Nothing was loaded.",
            fix="Choose a base model with a fast tokenizer.",
        )
    return found


def _options(
    made: type[TokenizersBackend],
    settings: Mapping[str, Any],
    special: Mapping[str, Any],
    text: Mapping[str, Any],
) -> dict[str, Any]:
    """What the class is to be made with; see `PreTrainedTokenizerBase._from_pretrained`."""
    tokens = set(made.SPECIAL_TOKENS_ATTRIBUTES)
    legacy = "added_tokens_decoder" not in settings
    merged = {**settings, **(special if legacy else {})}
    if merged.get("additional_special_tokens") and not merged.get("extra_special_tokens"):
        merged["extra_special_tokens"] = merged.pop("additional_special_tokens")
    known = {*inspect.signature(made.__init__).parameters, *tokens, *_SETTINGS} - _NOT_SETTINGS
    if text:
        known -= {"add_bos_token", "add_eos_token"}  # its own template says
    options = {key: _token(value) for key, value in merged.items() if key in known}
    named = {
        key: _token(value)
        for key, value in settings.items()
        if key.endswith("_token") and key not in tokens and isinstance(value, str)
    }
    if isinstance(extra := options.get("extra_special_tokens"), dict):
        named |= extra
        del options["extra_special_tokens"]
    if named:
        options["model_specific_special_tokens"] = named
    if legacy:
        listed = {token["id"]: token for token in text.get("added_tokens", ())}
    else:
        listed = {int(index): token for index, token in settings["added_tokens_decoder"].items()}
    added = {
        index: AddedToken(**{k: v for k, v in token.items() if k in _TOKEN})
        for index, token in listed.items()
    }
    by_text = {str(token): token for token in added.values()}
    for key in tokens & options.keys():
        options[key] = by_text.get(str(options[key]), options[key])
    return {**options, "added_tokens_decoder": added}


def _vocabulary(
    made: type[TokenizersBackend], files: Files, text: Mapping[str, Any]
) -> dict[str, Any]:
    """The vocabulary in the form that the class takes; see
    `TokenizersBackend.convert_to_native_format`.
    """
    if not text:
        if made.model is not models.WordPiece:
            made_name = printable(made.__name__, 60)
            raise ModelError(
                f"The base model has a vocab.txt alone, from which no {made_name} is made.",
                safe="Nothing was loaded.",
                fix="Save a fast tokenizer (tokenizer.json) with the model.",
            )
        words = bytes(files["vocab.txt"]).decode().split("\n")
        rows = {word.rstrip("\r"): n for n, word in enumerate(words) if word.rstrip("\r")}
        if missing := [one for one in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if one not in rows]:
            raise ModelError(
                f"vocab.txt is not a BERT vocabulary: it lacks {', '.join(missing)}.",
                safe="Nothing was loaded.",
                fix="Save a fast tokenizer (tokenizer.json) with the model.",
            )
        return {"vocab": rows}
    whole = Tokenizer.from_str(bytes(files["tokenizer.json"]).decode())
    if made is TokenizersBackend or "__init__" not in made.__dict__:
        return {"tokenizer_object": whole}
    model = text["model"]
    vocabulary = model["vocab"]
    form = getattr(made.model, "__name__", "")
    if form == "Unigram" or (form == "" and isinstance(vocabulary, list)):
        vocabulary = [tuple(row) for row in vocabulary]
    elif isinstance(vocabulary, list):
        vocabulary = {
            row[0] if isinstance(row, list) else row: n for n, row in enumerate(vocabulary)
        }
    result = {"vocab": vocabulary, "post_processor": whole.post_processor}
    if form == "BPE" and "merges" in model:
        result["merges"] = [
            tuple(row.split(" ")) if isinstance(row, str) else tuple(row) for row in model["merges"]
        ]
    normalizer = text.get("normalizer") or {}
    for one in normalizer.get("normalizers", [normalizer]):
        if one.get("type") == "Precompiled":
            result["_spm_precompiled_charsmap"] = base64.b64decode(one["precompiled_charsmap"])
            break
    return result


def _plain(name: Any) -> str:
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _token(value: Any) -> Any:
    """A special token of a settings file, and what else stands there."""
    if isinstance(value, list):
        return [_token(one) for one in value]
    if isinstance(value, dict) and "content" in value:
        return AddedToken(**{key: one for key, one in value.items() if key in _TOKEN}, special=True)
    return value


def _object(files: Files, name: str) -> Any:
    """The members of a JSON file; of one that is not there, none."""
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
    return value
