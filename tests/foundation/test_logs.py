"""Log lines are JSON, carry job and session, and hold no secret, also where one was planted."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import PartyKeys
from fedark.foundation.logs import JsonFormatter, Teller, explain, of_run, tell_error, working_on


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


def test_an_error_of_the_system_is_told_with_its_file_and_not_as_a_class_alone() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/at-all").read_bytes()
    assert explain(caught.value).startswith("FileNotFoundError: /nowhere/at-all: No such file")
    found = line("it failed", error=caught.value)
    assert found["what"] == "/nowhere/at-all: No such file or directory"


def test_one_session_is_written_the_same_way_by_everyone() -> None:
    assert of_run(bytes(48), "ab" * 16) == {"job": "0" * 16, "session": "ab" * 8}
    assert of_run(b"", "") == {"job": "", "session": ""}  # and lines carry neither
    with working_on(**of_run(b"", "")):
        assert not {"job", "session"} & line("x").keys()


def test_what_a_supervisor_says_has_a_level() -> None:
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    log = logging.getLogger("fedark")
    log.addHandler(handler)
    before, log.level = log.level, logging.INFO
    try:
        say = Teller(plain=False)
        say("it runs")
        tell_error(say, "it has failed: 100 %s")
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert [(record.levelname, record.getMessage()) for record in seen] == [
        ("INFO", "it runs"),
        ("ERROR", "it has failed: 100 %s"),
    ]
    said: list[str] = []
    tell_error(said.append, "plain")
    assert said == ["plain"]
