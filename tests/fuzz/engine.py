"""A small fuzzer: real samples, bent in bytes and in structure, in one fast loop; no crash, no
hang, nothing accepted.

A target's `parse` may raise the errors that its callers expect, and no other. What may come back
differs by `kind`:

- "closed": nothing but the samples themselves is accepted (what is signed, encrypted or bound);
- "exact": what is accepted comes back as exactly the bytes that went in: there are no two encodings
  of one value;
- "open": anything may be accepted, for instance because the fuzzer itself signs with the right key
  to reach the parser behind.

Inputs follow from the target's name and a seed, so a failure can be made again.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import cbor2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fedark.foundation.errors import FedarkError

HANG_SECONDS = 20
_BATCH = 64
_MAX_GROWTH = 1 << 16
_BYTES = (
    0x00,
    0x01,
    0x7F,
    0x80,
    0xFF,
    0x30,
    0x40,
    0x5F,
    0x9F,
    0xA0,
    0xBF,
    0xC2,
    0xD2,
    0xF6,
    0xF9,
    0xFB,
)
_Nested = dict | list | tuple | cbor2.CBORTag  # what is in a tag is read as a tuple
_INTEGERS = (
    0,
    1,
    -1,
    23,
    24,
    255,
    256,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
)
_LEAVES: tuple[Any, ...] = (
    None,
    True,
    False,
    0.0,
    -1.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    b"",
    b"\0",
    [],
    {},
    [[]],
    {"a": {}},
)


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        samples: what it accepts.
        parse: raises `expected`, or accepts.
        kind: see the module's docstring.
        structure: samples are CBOR, or JSON, and are bent as such too.
        words: byte strings that mean something in its language.
        message: samples are of this protocol buffer, and are bent field by field too.
    """

    name: str
    samples: Sequence[bytes]
    parse: Callable[[bytes], Any]
    kind: Literal["closed", "exact", "open"]
    structure: bool | Literal["json"] = True
    words: Sequence[bytes] = ()
    message: type[Message] | None = None
    expected: tuple[type[Exception], ...] = (FedarkError,)


@dataclass(frozen=True)
class Failure:
    """An input that did what none may do."""

    what: str
    data: bytes


class Hang(BaseException):
    """One input took longer than `HANG_SECONDS`; not an Exception, so that no parser can swallow
    it.
    """


def fuzz(
    target: Target, inputs: int, *, seed: int, seconds: float = float("inf")
) -> tuple[int, list[Failure]]:
    """Try up to `inputs` inputs within `seconds`; how many were tried, and up to five failures."""
    failures: list[Failure] = []
    known = set(target.samples)
    done, ends, armed = 0, time.monotonic() + seconds, 0.0
    current = b""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    try:
        for data in bent(target, inputs, seed):
            if done % _BATCH == 0 or time.monotonic() > armed + 1:
                armed = time.monotonic()
                if armed > ends:
                    break
                signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
            current = data
            done += 1
            why = _tried(target, data, known)
            if why:
                failures.append(Failure(why, data))
                if len(failures) == 5:
                    break
    except Hang:
        failures.append(Failure(f"took over {HANG_SECONDS} s", current))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return done, failures


def _tried(target: Target, data: bytes, known: set[bytes]) -> str:
    try:
        got = target.parse(data)
    except target.expected:
        return ""
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"[:300]
    if target.kind == "closed" and data not in known:
        return "was accepted"
    if target.kind == "exact" and got != data:
        return "was accepted and is another encoding of the same value"
    return ""


def bent(target: Target, count: int, seed: int) -> Iterator[bytes]:
    """`count` inputs."""
    rng = random.Random(f"{target.name}/{seed}")
    json_ = target.structure == "json"
    parsed = (
        [json.loads(sample) if json_ else _loaded(sample) for sample in target.samples]
        if target.structure
        else []
    )
    trees = [tree for tree in parsed if tree is not None]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.02:
            yield rng.randbytes(rng.choice((0, 1, 2, 8, 64, 300)))
        elif trees and kind < 0.5:
            tree = _changed(rng, rng.choice(trees), 0)
            yield _json(tree) if json_ else _encoded(tree, rng)
        elif target.message is not None and kind < 0.7:
            message = target.message.FromString(rng.choice(target.samples))
            _bend(rng, message)
            yield message.SerializeToString(deterministic=True)
        else:
            yield _edited(rng, rng.choice(target.samples), target)


def _loaded(sample: bytes) -> Any:
    try:
        return cbor2.loads(sample)
    except Exception:
        return None


def _encoded(tree: Any, rng: random.Random) -> bytes:
    data: bytes = cbor2.dumps(tree, canonical=rng.random() < 0.9)
    return data


def _json(tree: Any) -> bytes:
    return json.dumps(tree, skipkeys=True, default=lambda value: value.decode("latin-1")).encode()


def _changed(rng: random.Random, tree: Any, depth: int) -> Any:
    """`tree` with one place changed; a byte string that is CBOR itself may be changed inside."""
    if isinstance(tree, cbor2.CBORTag) and rng.random() < 0.95:
        return cbor2.CBORTag(tree.tag, _changed(rng, tree.value, depth))
    if isinstance(tree, dict) and tree and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(tree))
        copy = dict(tree)
        match rng.randrange(12):
            case 0:
                del copy[key]
            case 1:
                copy[rng.choice(("", "x", 0, -1, b"k"))] = rng.choice(_LEAVES)
            case 2:
                copy[key] = copy[rng.choice(list(tree))]
            case _:
                copy[key] = _changed(rng, copy[key], depth + 1)
        return copy
    if isinstance(tree, list | tuple) and tree and (depth == 0 or rng.random() < 0.8):
        index = rng.randrange(len(tree))
        items = list(tree)
        match rng.randrange(8):
            case 0:
                del items[index]
            case 1:
                items.insert(index, items[rng.randrange(len(items))])
            case 2:
                items *= rng.choice((2, 17))
            case _:
                items[index] = _changed(rng, items[index], depth + 1)
        return items
    if isinstance(tree, bytes) and len(tree) > 16 and rng.random() < 0.3:
        inner = _loaded(tree)
        if isinstance(inner, _Nested):
            return cbor2.dumps(_changed(rng, inner, depth + 1), canonical=True)
    return _leaf(rng, tree)


def _bend(rng: random.Random, message: Message, *, outer: bool = True) -> None:
    """Change one place in `message`, or in a message in it."""
    fields = message.ListFields()
    if not fields or rng.random() < 0.02:
        return
    # Most of what is sent is in the last field of the outer message; the first name the run.
    field, value = fields[-1] if outer and rng.random() < 0.7 else rng.choice(fields)
    if rng.random() < 0.05:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            del value[key]
        elif field.message_type.fields_by_name["value"].message_type is not None:
            _bend(rng, value[key], outer=False)
        else:
            value[key] = _scalar(rng, field.message_type.fields_by_name["value"], value[key])
    elif field.is_repeated:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.extend(value[: rng.randrange(20)])
        elif field.message_type is not None:
            _bend(rng, value[at], outer=False)
        else:
            value[at] = _scalar(rng, field, value[at])
    elif field.message_type is not None:
        _bend(rng, value, outer=False)
    else:
        setattr(message, field.name, _scalar(rng, field, value))


def _scalar(rng: random.Random, field: FieldDescriptor, value: Any) -> Any:
    """Another value of the field's own type."""
    if isinstance(value, bytes):
        tree = _loaded(value) if rng.random() < 0.5 else None
        if isinstance(tree, _Nested):
            return cbor2.dumps(_changed(rng, tree, 0), canonical=True)
        return _edited(rng, value, Target("", [value], bytes, "open"))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.randrange(4)
    changed = _leaf(rng, value)
    if isinstance(value, str):
        return changed if isinstance(changed, str) else "x"
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return float(changed) if isinstance(changed, int | float) else 0.0
    return changed % (1 << 32) if isinstance(changed, int) else 0


def _leaf(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.25:
        return rng.choice(_LEAVES)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, *_INTEGERS))
    if isinstance(value, bytes) and value:
        at = rng.randrange(len(value))
        flipped = value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1 :]
        return rng.choice(
            (value[:-1], value + b"\0", flipped, flipped, bytes(len(value)), value[::-1])
        )
    if isinstance(value, str) and value:
        return rng.choice(
            (value[:-1], value + "\0", value.upper(), value + "\u202e", "../" + value, value * 50)
        )
    if isinstance(value, float):
        return rng.choice(
            (
                value + 1,
                -value,
                5e-324,
                float("inf"),
                float("nan"),
                int(value) if abs(value) < 1e9 else 0,
            )
        )
    return rng.choice((*_LEAVES, *_INTEGERS))


def _edited(rng: random.Random, data: bytes, target: Target) -> bytes:
    """`data` with one to four edits of its bytes."""
    out = bytearray(data)
    for _ in range(1 + min(3, int(rng.expovariate(1.2)))):
        size = len(out)
        at = rng.randrange(size + 1)
        match rng.randrange(10):
            case 0 | 1 | 2:
                if at < size:
                    out[at] ^= 1 << rng.randrange(8)
            case 3:
                if at < size:
                    out[at] = rng.choice(_BYTES)
            case 4:
                out[at:at] = rng.randbytes(rng.choice((1, 1, 2, 4, 32)))
            case 5:
                del out[at : at + rng.choice((1, 1, 2, 4, 32))]
            case 6:
                del out[at:]
            case 7:
                length = rng.choice((1, 4, 16, 64))
                out[at:at] = out[at : at + length] * rng.choice((1, 1, 3))
            case 8:
                other = rng.choice(target.samples)
                start = rng.randrange(len(other) + 1)
                out[at:] = other[start:]
            case _:
                if target.words:
                    out[at:at] = rng.choice(target.words)
                elif at + 4 <= size:
                    out[at : at + 4] = rng.choice(
                        (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01")
                    )
        if len(out) > len(data) + _MAX_GROWTH:
            break
    return bytes(out)
