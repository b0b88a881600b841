"""Many adapters and many texts in one batch answer as each of them alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedark.foundation.errors import InputError, ModelError
from fedark.tuning.mixed import Asked, Mixed
from fedark.tuning.writing import Piece, Wish, Writer


def flats(terms: Any, count: int = 3) -> list[Any]:
    generator = np.random.default_rng(1)
    return [
        (generator.normal(size=terms.travelling) * 0.5).astype(np.float32) for _ in range(count)
    ]


def mixed(task: Any, found: list[Any]) -> Mixed:
    made = task.mixed()
    for number, flat in enumerate(found):
        made.put(f"m{number}", flat)
    return made


CASES = [
    ("minilm", "ffa-lora"),
    ("minilm", "head"),
    ("bert", "lora"),
    ("bert", "head"),
    ("llama", "ffa-lora"),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_rows_of_several_adapters_in_one_batch_are_labelled_as_by_each_adapter_alone(
    zoo: Any, texts: list[str], name: str, method: str
) -> None:
    labels = ("open line", "hold") if name == "llama" else None
    terms = zoo[name].terms(method=method, labels=labels)
    plain, task = zoo[name].load(terms), zoo[name].load(terms)
    found = flats(terms)
    many = mixed(task, found)
    assert many.together
    asked = [Asked(f"m{index % 3}", text) for index, text in enumerate(texts)]
    for row, one, text in zip(many.label(asked), asked, texts, strict=True):
        plain.set_flat(found[int(one.adapter[1])])
        np.testing.assert_allclose(row.values, plain.probabilities([text])[0], atol=2e-5)
        assert row.tokens == plain.read_tokens([text])
        assert not row.cut
    assert len({row.values.tobytes() for row in many.label([asked[0], asked[1]])}) == 2


def test_an_adapter_is_replaced_and_dropped_and_its_place_taken_by_another(
    zoo: Any, texts: list[str]
) -> None:
    task = zoo["minilm"].load()
    found = flats(task.terms, 4)
    many = mixed(task, found[:2])
    before = many.label([Asked("m1", texts[0])])[0].values
    many.drop("m0")
    many.put("other", found[2])
    many.put("more", found[3])
    assert np.array_equal(many.label([Asked("m1", texts[0])])[0].values, before)
    with pytest.raises(InputError):
        many.label([Asked("m0", texts[0])])
    task.set_flat(found[2])
    given = many.label([Asked("other", texts[0])])[0].values
    np.testing.assert_allclose(given, task.probabilities(texts[:1])[0], atol=1e-5)


def test_vectors_have_unit_length_and_long_prompts_are_told(zoo: Any) -> None:
    many = mixed(zoo["minilm"].load(), [])
    many.put("a", many.task.initial())
    short, long = many.embed([Asked("a", "open line"), Asked("a", "line " * 60)])
    assert np.linalg.norm(short.values) == pytest.approx(1, abs=1e-5)
    assert (short.tokens, short.cut) == (4, False)
    assert (long.tokens, long.cut) == (24, True)
    writes = mixed(zoo["gpt2"].load(), [])
    for ask in (writes.label, writes.embed):
        with pytest.raises(ModelError):
            ask([Asked("a", "line")])


def run(writer: Writer, wishes: dict[int, tuple[int, Wish]]) -> dict[int, list[Piece]]:
    """Wish `number` is added before step `wishes[number][0]`."""
    seen: dict[int, list[Piece]] = {number: [] for number in wishes}
    step = 0
    while writer.busy or step <= max(when for when, _ in wishes.values()):
        for number, (when, wish) in wishes.items():
            if when == step:
                writer.add(number, wish)
        for piece in writer.step():
            seen[piece.id].append(piece)
        step += 1
    return seen


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_that_join_and_leave_are_what_each_adapter_writes_alone(
    zoo: Any, texts: list[str], name: str
) -> None:
    plain, task = zoo[name].load(), zoo[name].load()
    found = flats(task.terms)
    writer = Writer(mixed(task, found), rows=5)
    assert writer.rows == 5
    wishes = {n: (n // 2, Wish(f"m{n % 3}", text, 3 + n % 7)) for n, text in enumerate(texts[:14])}
    seen = run(writer, wishes)
    assert len({tuple(p.written for p in pieces) for pieces in seen.values()}) > 3
    for number, (_, wish) in wishes.items():
        plain.set_flat(found[number % 3])
        whole = plain.answers([wish.prompt], longest=wish.longest)[0]
        pieces = seen[number]
        assert "".join(piece.text for piece in pieces) == whole
        assert pieces[-1].end in ("stop", "length")
        assert not any(piece.end for piece in pieces[:-1])
        assert pieces[-1].read == plain.read_tokens([wish.prompt])


def test_a_stop_text_is_never_let_out_in_part(zoo: Any, texts: list[str]) -> None:
    task = zoo["gpt2"].load()
    writer = Writer(mixed(task, flats(task.terms)))
    whole = run(writer, {0: (0, Wish("m0", texts[0], 10))})[0]
    words = "".join(piece.text for piece in whole).split()
    stop = f"{words[2]} {words[3]}"
    pieces = run(writer, {0: (0, Wish("m0", texts[0], 10, stop=(stop,)))})[0]
    text = "".join(piece.text for piece in pieces)
    assert text == " ".join(words).split(stop)[0].strip()
    assert pieces[-1].end == "stop"


def test_a_seed_gives_the_same_text_whoever_is_beside_it(zoo: Any, texts: list[str]) -> None:
    task = zoo["llama"].load()
    writer = Writer(mixed(task, flats(task.terms)))
    wish = Wish("m1", texts[0], 8, temperature=1.5, top_p=0.9, seed=11)
    alone = run(writer, {0: (0, wish)})[0]
    beside = run(
        writer,
        {0: (2, wish)}
        | {n: (0, Wish("m0", text, 9, temperature=2.0, seed=n)) for n, text in enumerate(texts, 1)},
    )[0]
    other = run(writer, {0: (0, Wish("m1", texts[0], 8, temperature=1.5, top_p=0.9, seed=12))})[0]
    told = ["".join(piece.text for piece in pieces) for pieces in (alone, beside, other)]
    assert told[0] == told[1] != told[2]


def test_told_probabilities_are_those_of_the_model(zoo: Any) -> None:
    task = zoo["llama"].load()
    found = flats(task.terms)
    writer = Writer(mixed(task, found))
    pieces = run(writer, {0: (0, Wish("m2", "open line", 1, top=3))})[0]
    task.set_flat(found[2])
    ids = torch.tensor(task._encoder.prompts(["open line"], [1]))
    with torch.no_grad():
        likely = task.scorer(ids, torch.ones_like(ids))[0, -1].log_softmax(-1)
    (token,) = pieces[0].tokens
    assert token.logprob == pytest.approx(float(likely.max()), abs=1e-4)
    assert [value for _, value in token.top] == pytest.approx(likely.topk(3).values.tolist(), 1e-3)
    assert token.top[0][0] == token.text


def test_what_is_too_long_dropped_or_no_number_ends_alone(zoo: Any, texts: list[str]) -> None:
    task = zoo["gpt2"].load()
    found = flats(task.terms)
    writer = Writer(mixed(task, found))
    bad = np.full_like(found[0], 3e38)
    writer._mixed.put("bad", bad)
    for number, wish in enumerate(
        (Wish("m0", "line " * 30, 5), Wish("bad", "open", 5), Wish("m0", texts[0], 5))
    ):
        writer.add(number, wish)
    writer.add(3, Wish("m1", "hold the line", 12))
    seen: dict[int, list[Piece]] = {number: [] for number in range(4)}
    for _ in range(8):
        for piece in writer.step():
            seen[piece.id].append(piece)
        writer.drop(3)
    assert [piece.end for piece in seen[0]] == ["too long"]
    assert [piece.end for piece in seen[1]] == ["failed"]
    assert seen[2][-1].end in ("stop", "length")
    assert [piece.end for piece in seen[3]] == [""]
    assert not writer.busy
    assert writer.forget("m0") == []


def test_keys_and_values_have_a_bound_in_bytes(zoo: Any) -> None:
    task = zoo["gpt2"].load()
    many = mixed(task, [])
    token = 2 * 3 * 16 * 4  # keys and values, layers, width, bytes
    assert Writer(many, rows=9, cache_bytes=4 * token * 24).rows == 4
    assert Writer(many, rows=9, cache_bytes=1).rows == 1


def test_a_model_that_padding_on_the_left_would_mislead_is_written_row_by_row(
    zoo: Any, texts: list[str]
) -> None:
    plain, task = zoo["gpt2"].load(), zoo["gpt2"].load()
    found = flats(task.terms)
    many = mixed(task, found)
    many.decoder.takes -= {"position_ids"}  # as of an architecture that counts from the left
    writer = Writer(many)
    assert writer.rows == 1
    seen = run(writer, {n: (0, Wish(f"m{n}", texts[n], 6)) for n in range(3)})
    for number, flat in enumerate(found):
        plain.set_flat(flat)
        given = "".join(piece.text for piece in seen[number])
        assert given == plain.answers([texts[number]], longest=6)[0]


def test_a_model_that_mixes_rows_is_given_one_adapter_at_a_time(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = zoo["minilm"].load()
    plain = task.scorer.embed

    def mixes(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = plain(ids, mask)
        return rows.flip(0).contiguous()

    monkeypatch.setattr(task.scorer, "embed", mixes)
    assert not task.mixed().together
