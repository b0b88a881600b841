"""Token ids: the same as outside fedark, truncated where it does least harm."""

from __future__ import annotations

import json
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, BertTokenizerFast

from fedark.foundation.errors import ModelError
from fedark.tuning import tokens
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
    text = {**json.loads(zoo["llama"].files()["tokenizer.json"]), "padding": None}
    with pytest.raises(ModelError, match="padding"):
        TextEncoder({"tokenizer.json": json.dumps(text).encode()}, max_length=8)


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


CORPUS = ["the pump leaks water", "The Motor hums, loud and OLD", "valves \u00fcber 1234"]
HOSTILE = [
    *(
        "",
        " ",
        "  two  blanks ",
        "\ttab\nline\r\nend",
        "\u00a0\u2003\u200b\u200d\ufeff",
        "\x00\x01\x7f",
    ),
    *(
        "THE PUMP",
        "\u00dcBER stra\u00dfe \u0130\u0131",
        "e\u0301 \u00e9 \ufb01 \u2460",
        "\u4e2d\u6587pump\u8a9e",
    ),
    *(
        "\U0001f600\U0001f468\u200d\U0001f469",
        "\u202eabc",
        "a<mask>b <s> </s> <pad> <unk>",
        "[CLS] [SEP][MASK]x",
    ),
    *(
        "\u2581the\u2581 pump",
        "<new> pump<new>",
        "<0x41>",
        "##s ##",
        "can't won't 3.14 a-b_c",
        "\u0627\u0644\u0633",
    ),
    *(
        "long " * 40,
        "the " * 3 + "pump",
        "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
        "<|endoftext|>",
        "A.B.C. http://x.y/?z=1&w",
    ),
]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyzTHEPUMPO\u00fc\u4e2d\u6587")
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(special_tokens=special, initial_alphabet=letters)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def byte_level(*, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIALS, "<|endoftext|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return made


def metaspace() -> Tokenizer:
    """As Llama 2 has it."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *bytes_])
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIALS, unk_token="<unk>")
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return made


def new(token: str, **how: bool) -> dict[str, Any]:
    return {
        "content": token,
        **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
        **how,
    }


BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
LIKE_BART = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ENDS = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
ADDED = {"added_tokens_decoder": {"900": new("<new>", lstrip=True, special=False)}}
TOKENIZERS: list[tuple[Any, str, str, list[dict[str, Any]]]] = [
    (
        wordpiece,
        "bert",
        "BertTokenizer",
        [
            {"do_lower_case": False},
            {"do_lower_case": True, "strip_accents": False},
            {"strip_accents": True, "do_lower_case": False},
            {"tokenize_chinese_chars": False},
            {"extra_special_tokens": ["<new>"]},
            {"truncation_side": "left"},
            {"model_max_length": 4, "padding_side": "left"},
            {"split_special_tokens": True},
            ADDED,
        ],
    ),
    (wordpiece, "distilbert", "DistilBertTokenizer", [{"do_lower_case": False}]),
    (wordpiece, "electra", "ElectraTokenizerFast", [{"strip_accents": False}]),
    (wordpiece, "mpnet", "MPNetTokenizer", [{"do_lower_case": False}]),
    (wordpiece, "bert", "PreTrainedTokenizerFast", [{"do_lower_case": False}]),
    (
        byte_level,
        "roberta",
        "RobertaTokenizer",
        [{"add_prefix_space": True}, {"trim_offsets": False}, ADDED],
    ),
    (byte_level, "gpt2", "GPT2Tokenizer", [{"add_prefix_space": True}, {"add_bos_token": True}]),
    (byte_level, "bart", "BartTokenizerFast", [{"add_prefix_space": True}]),
    (byte_level, "qwen2", "Qwen2Tokenizer", [{"add_prefix_space": True}]),
    (byte_level, "llama", "LlamaTokenizer", [{"legacy": False}, {"add_prefix_space": False}]),
    (byte_level, "llama", "PreTrainedTokenizerFast", [{"add_bos_token": True}]),
    (
        byte_level,
        "gpt_neox",
        "GPTNeoXTokenizer",
        [{"add_prefix_space": True}, {"add_eos_token": True}],
    ),
    (byte_level, "modernbert", "PreTrainedTokenizerFast", [{}]),
    (
        metaspace,
        "llama",
        "LlamaTokenizer",
        [
            {"legacy": True},
            {"legacy": False},
            {"add_prefix_space": False},
            {"add_bos_token": False},
            {"add_eos_token": True},
        ],
    ),
    (metaspace, "mistral", "LlamaTokenizerFast", [{"add_prefix_space": False}]),
    (metaspace, "gemma", "GemmaTokenizer", [{}]),
    (metaspace, "phi3", "LlamaTokenizer", [{"legacy": False}]),
    (unigram, "t5", "T5Tokenizer", [{"extra_ids": 4}, {"add_prefix_space": False}]),
    (
        unigram,
        "albert",
        "AlbertTokenizer",
        [{"do_lower_case": False, **ENDS}, {"keep_accents": True, **ENDS}],
    ),
    (unigram, "xlnet", "XLNetTokenizer", [{"remove_space": False}, {"do_lower_case": True}]),
    (unigram, "xlm-roberta", "XLMRobertaTokenizer", [{"add_prefix_space": False}]),
    (unigram, "camembert", "CamembertTokenizer", [{}]),
]


@pytest.mark.parametrize(
    ("build", "model_type", "name", "settings"),
    [
        pytest.param(build, model_type, name, one, id=f"{model_type}-{name}-{number}")
        for build, model_type, name, variants in TOKENIZERS
        for number, one in enumerate([ENDS if name == "AlbertTokenizer" else {}, *variants])
    ],
)
def test_ids_of_hostile_texts_are_those_of_autotokenizer_or_refused(
    tmp_path: Any, build: Any, model_type: str, name: str, settings: dict[str, Any]
) -> None:
    """Settings beside tokenizer.json that say something else than it does."""
    build().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    own = BERT if build is wordpiece else LIKE_BART
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, **own, **settings})
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(HOSTILE, truncation=True, max_length=16, padding=False)["input_ids"]
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    encoder = TextEncoder(files, max_length=16)
    differ = [
        (text, theirs.convert_ids_to_tokens(a), theirs.convert_ids_to_tokens(b))
        for text, a, b in zip(HOSTILE, encoder.texts(HOSTILE), expected, strict=True)
        if a != (b or [encoder.pad_id])
    ]
    assert not differ, differ[0]


class PanicException(BaseException):
    """What pyo3 raises where Rust code panics; its own class cannot be imported."""


class Panicking:
    """A tokenizer whose Rust code panics in one call, with a text in what it says."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name

    def __getattr__(self, name: str) -> Any:
        def panic(*_: Any, **__: Any) -> None:
            raise PanicException("slice index out of range in 'open the secret line'")

        return panic if name == self._name else getattr(self._tokenizer, name)


@pytest.mark.parametrize("name", ["no_padding", "no_truncation", "token_to_id"])
def test_a_panic_of_the_library_while_it_loads_is_a_refusal(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files = zoo["llama"].files()
    backend, size = tokens._backend(files)
    tokenizer = Panicking(backend.backend_tokenizer, name)
    stand_in = SimpleNamespace(
        backend_tokenizer=tokenizer, truncation_side="right", eos_token="</s>", pad_token="<pad>"
    )
    monkeypatch.setattr(tokens, "_backend", lambda _: (stand_in, size))
    with pytest.raises(ModelError, match="malformed") as caught:
        TextEncoder(files, max_length=6)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("enable_truncation", lambda encoder: encoder.texts(["open"])),
        ("no_truncation", lambda encoder: encoder.texts(["open"])),
        ("encode_batch_fast", lambda encoder: encoder.prompts(["open"], [1])),
        ("encode_batch_fast", lambda encoder: encoder.answers(["open"])),
    ],
)
def test_a_panic_of_the_library_on_a_text_is_a_refusal_without_the_text(
    zoo: Any, name: str, use: Any
) -> None:
    encoder = TextEncoder(zoo["llama"].files(), max_length=6)
    encoder._tokenizer = Panicking(encoder._tokenizer, name)
    with pytest.raises(ModelError, match="fails on a text") as caught:
        use(encoder)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_panic_of_the_library_on_an_answers_ids_is_an_empty_text(zoo: Any) -> None:
    encoder = TextEncoder(zoo["llama"].files(), max_length=6)
    for name in ("decode", "id_to_token"):
        encoder._tokenizer = Panicking(encoder._tokenizer, name)
    assert (encoder.text([1, 2]), encoder.token(1)) == ("", "")
