"""Log lines are JSON, carry job and session, and hold no secret, also where one was planted."""

from __future__ import annotations

import json
import logging
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import PartyKeys
from fedark.foundation.logs import JsonFormatter, working_on


def line(text: str, *args: object, error: BaseException | None = None) -> dict[str, object]:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("fedark.x", logging.INFO, "file.py", 1, text, args, info)
    formatted = JsonFormatter("node", party="north").format(record)
    assert "\n" not in formatted
    return json.loads(formatted)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_line_carries_time_level_source_party_and_what_is_worked_on() -> None:
    with working_on(job="3f", session="a1"), working_on(stage="round"):
        found = line("round %d", 2)
    assert found.pop("time").endswith("Z")  # type: ignore[attr-defined]
    assert found == {
        "level": "INFO",
        "from": "node",
        "party": "north",
        "job": "3f",
        "session": "a1",
        "stage": "round",
        "text": "round 2",
    }
    assert "job" not in line("later")


def test_a_line_stays_one_line_whatever_its_text_holds() -> None:
    assert line('a\nb"} {"level": "forged')["text"] == 'a\nb"} {"level": "forged'
    assert line("\x1b[31mred\x00")["text"] == "?[31mred?"


KEY = ec.generate_private_key(ec.SECP384R1())
PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PLANTED = {
    "a private key": (PEM, PEM.splitlines()[1]),
    "one whose lines are escaped": (PEM.replace("\n", "\\n"), PEM.splitlines()[2]),
    "half of one": (PEM[: len(PEM) // 2], PEM.splitlines()[1][:40]),
    "the body of one": (PEM.splitlines()[1], PEM.splitlines()[1][8:]),
    "a signing key": (key := PartyKeys().signing.secret_bytes().hex(), key[8:]),
    "an HPKE key": (key := PartyKeys().hpke.secret_bytes().hex(), key[8:]),
    "a token": (key := secrets.token_hex(32), key[8:]),
    "a labelled password": ("password=hunter2", "hunter2"),
    "a header": ("Authorization: Bearer abc.def", "abc.def"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_secret_is_taken_out_of_texts_and_of_errors(kind: str) -> None:
    text, secret = PLANTED[kind]
    assert secret in text.replace("\\n", "\n")
    for found in (
        line(text),
        line("the key is %s, keep it", text),
        line("x", error=raised(ProtocolError(f"got {text}"))),
    ):
        assert secret not in json.dumps(found), found


def test_of_a_foreign_error_only_its_class_and_its_way_are_told() -> None:
    found = line("failed", error=raised(ValueError("customer record: quartz falcon")))
    assert found["error"] == "ValueError"
    assert "test_logs.py" in str(found["where"])
    assert "quartz" not in json.dumps(found)


def test_of_our_own_errors_the_words_are_told() -> None:
    assert line("failed", error=raised(ProtocolError("out of order")))["what"] == "out of order"
