"""Token ids: the same as outside fedark, truncated where it does least harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, BertTokenizerFast

from fedark.foundation.errors import ModelError
from fedark.tuning.tokens import TextEncoder


@pytest.mark.parametrize("name", ["minilm", "llama"])
def test_ids_are_those_of_autotokenizer(zoo: Any, texts: list[str], name: str) -> None:
    theirs = AutoTokenizer.from_pretrained(zoo[name].folder)(
        texts, truncation=True, max_length=6, padding=False
    )["input_ids"]
    assert TextEncoder(zoo[name].files(), max_length=6).texts(texts) == theirs


def test_a_truncation_or_padding_in_the_file_does_not_matter(zoo: Any) -> None:
    encoder = TextEncoder(zoo["minilm"].files(), max_length=64)
    assert len(encoder.texts(["open " * 30])[0]) == 32
    assert len(encoder.texts(["open"])[0]) == 3


def test_a_bert_vocabulary_serves_as_fallback(tmp_path: Any) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "line", "##s", "open", ",", "uber"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    encoder = TextEncoder({"vocab.txt": (tmp_path / "vocab.txt").read_bytes()}, max_length=16)
    texts = ["Open, LINES", "\u00dcber [MASK] what"]
    theirs = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})(
        texts, padding=False
    )["input_ids"]
    assert encoder.texts(texts) == theirs
    assert encoder.pad_id == 0


def test_prompts_keep_their_opening_token_and_lose_their_start(zoo: Any) -> None:
    encoder = TextEncoder(zoo["llama"].files(), max_length=8)
    short, long = encoder.prompts(["open line", "open " * 20 + "bus hot"], [2, 2])
    assert short == encoder.texts(["open line"])[0]
    assert len(long) == 6
    assert long[0] == 2
    assert long[-2:] == encoder.texts(["bus hot"])[0][1:]


def test_an_encoder_like_closing_token_does_not_stand_before_the_answer(zoo: Any) -> None:
    encoder = TextEncoder(zoo["minilm"].files(), max_length=8)
    assert encoder.prompts(["open"], [1]) == [encoder.texts(["open"])[0][:-1]]


def test_answers_end_with_the_end_token_and_leave_room(zoo: Any) -> None:
    encoder = TextEncoder(zoo["llama"].files(), max_length=8)
    short, long = encoder.answers(["open line", "open " * 20])
    assert short[-1] == 3
    assert len(short) == 3
    assert len(long) == 6
    assert len(encoder.prompts(["open " * 20], [len(long)])[0]) == 2


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"\xff"},
        {"vocab.txt": b"a\nb"},
        {"vocab.txt": b"\xff"},
        {"tokenizer_config.json": b"[]", "vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]"},
        {
            "tokenizer_config.json": b'{"pad_token": "\\ud811"}',
            "vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]",
        },
    ],
)
def test_a_missing_or_malformed_tokenizer_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(ModelError):
        TextEncoder(files, max_length=8)


def test_a_tokenizer_without_any_token_for_padding_is_refused(zoo: Any) -> None:
    with pytest.raises(ModelError, match="padding"):
        TextEncoder(
            {
                "tokenizer.json": zoo["llama"].files()["tokenizer.json"],
                "tokenizer_config.json": json.dumps({}).encode(),
            },
            max_length=8,
        )


@pytest.mark.parametrize("part", ["model", "post_processor"])
def test_a_tokenizer_that_fails_on_a_text_is_refused(part: str) -> None:
    """Found by fuzzing: the library raises bare Exception for the one, and panics, which is no
    Exception, for the other.
    """
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "a": 1, "open": 2}, unk_token="[CLS]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 0)]
    )
    text = json.loads(tokenizer.to_str())
    if part == "model":
        text["model"]["unk_token"] = "nowhere"
    else:
        text["post_processor"]["special_tokens"] = {}
    encoder = TextEncoder({"tokenizer.json": json.dumps(text).encode()}, max_length=8, pad_id=0)
    with pytest.raises(ModelError, match="fails on a text"):
        encoder.texts(["shed"])
