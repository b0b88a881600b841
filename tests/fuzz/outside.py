"""Targets outside a run: what nodes and their host tell each other to join, what a key broker
answers, and a provider's model.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine import Target
from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract, SignedContract
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, ModelError
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.operate.broker.client import BrokerClient
from fedark.operate.joining import Admission, Invitation, JoinRequest, parse, request_headers
from fedark.operate.node.hostclient import HostClient, _refusal
from fedark.operate.offer import OFFER_LABEL, Offer
from fedark.operate.party import KEYS
from fedark.translog.memory import HeadMemory
from fedark.tuning.tokens import TextEncoder
from fedark.v1 import enclave_pb2, stage_pb2

Made = Iterator[Target]
_JSON = (
    b'{"',
    b'"}',
    b"null",
    b"1e999",
    b"[" * 400,
    b"[" * 5000,
    b"\\u0000",
    b"NaN",
    b"-1",
    b'"version":2',
    b"[{}]",
    b"true",
)


def outside(world: Any, folder: Path) -> Made:
    """All of them."""
    yield from _joining(folder / "host", world.contract, world.recorded.clock)
    yield _broker_reply(world, folder)
    yield from _tokenizer()
    yield from _model_folder()
    yield _configuration(folder / "models")


def _same(name: str, read: Callable[[bytes], Any], sample: bytes) -> Target:
    """White space and the order of fields are free; all else is as it was signed."""
    original = read(sample)

    def parsed(data: bytes) -> None:
        if read(data) != original:
            raise AssertionError("something else was accepted")

    return Target(name, [sample], parsed, "open", structure=False, words=_JSON)


def _joining(folder: Path, contract: Contract, clock: Callable[[], Any]) -> Made:
    from direct import admitted, make_host, make_node

    from fedark.operate.host.admission import invite
    from fedark.operate.host.service import PREFIX, HostService
    from fedark.operate.joining import dump

    host = make_host(folder / "host")
    maker, north = (
        admitted(host, folder / name, name, role)
        for name, role in (("maker", "provider"), ("north", "customer"))
    )
    waiting = make_node(host, folder / "east", "east", "customer")
    invitation = dump(invite(host, "west", "customer"))
    yield Target(
        "invitation",
        [invitation],
        lambda data: parse(data, Invitation, "it"),
        "open",
        structure=False,
        words=_JSON,
    )

    def request(data: bytes) -> JoinRequest:
        found = parse(data, JoinRequest, "it")
        found.verify()
        return found

    def bundle(data: bytes) -> Admission:
        found = parse(data, Admission, "it")
        found.verify(north.admission.aggregator)
        return found

    yield _same("join request", request, (waiting.path / "request.json").read_bytes())
    yield _same("admission", bundle, (north.path / "host.json").read_bytes())

    signing = PartyKeys.load(maker.path / KEYS).signing
    offer = Offer(
        job="dispatch", provider="maker", created="today", models=contract.models,
        evaluation=contract.evaluation
    )  # fmt: skip
    signed = offer.sign(signing)

    def offered(data: bytes) -> Offer:
        return Offer.verify(data, signing.public, by="maker")

    yield Target("offer", [signed], offered, "closed")
    body = canonical.decode(signed)[0]
    yield Target(
        "offer, signed",
        [body],
        lambda data: offered(canonical.encode([data, signing.sign(OFFER_LABEL, data)])),
        "open",
    )

    service, calls = HostService(host), []
    digest = hashlib.sha384(b"x").hexdigest()
    for method, path, body in (
        ("GET", "jobs", b""), ("GET", "bundle", b""), ("PUT", "offers", signed),
        ("GET", f"jobs/{digest}", b""),
        ("PUT", f"jobs/{digest}/answer", b'{"answer": "ready", "reason": "x"}'),
        ("GET", f"catalogue/{digest}", b""),
        ("PUT", f"catalogue/{digest}/manifest", b"manifest"),
        ("PUT", f"catalogue/{digest}/payload/0", b"piece"),
        ("GET", f"catalogue/{digest}/payload/0", b""),
        ("POST", "join", (waiting.path / "request.json").read_bytes()),
    ):  # fmt: skip
        calls.append(canonical.encode([method, path, body, True]))
    transport = maker.transport_key()

    def call(data: bytes) -> None:
        made = canonical.decode(data)
        if not (
            isinstance(made, list)
            and len(made) == 4
            and [type(part) for part in made] == [str, str, bytes, bool]
        ):
            return
        method, path, body, signed = made
        headers = {"fedark-version": "1"}
        if signed:
            headers = request_headers(transport, "maker", method, PREFIX + path, body)
        with clock():
            answer = service.handle(method, PREFIX + path, headers, body)
        if answer.status == 500:
            raise RuntimeError("the host failed")

    yield Target("host call", calls, call, "open", words=_JSON)

    client = HostClient.__new__(HostClient)
    client._name = "north"
    jobs = f'[{{"digest": "{digest}", "name": "y", "status": "z", "reason": ""}}]'.encode()
    answers = [b'{"size": 1, "total": 2, "whole": false}', jobs]
    for path in ("hello", "jobs", "bundle", f"jobs/{digest}"):
        headers = request_headers(transport, "maker", "GET", PREFIX + path, b"") | {
            "fedark-version": "1"
        }
        answers.append(service.handle("GET", PREFIX + path, headers, b"").body)
    reads: tuple[Callable[[], Any], ...] = (
        client.hello, client.bundle, client.jobs, lambda: client.held(digest),
        lambda: client.put_piece(digest, 0, b"x"),
    )  # fmt: skip

    def told(data: bytes) -> None:
        client._call_or_none = lambda *_: data  # type: ignore[method-assign]
        for read in reads:
            with contextlib.suppress(FedarkError):
                read()
        str(_refusal(400, data))

    told(jobs)
    assert client.jobs()[0]["digest"] == digest
    yield Target("host answer", answers, told, "open", structure=False, words=_JSON)


def _broker_reply(world: Any, folder: Path) -> Target:
    """Whatever is accepted, the enclave gets what the provider gave: the log names each key."""
    grants = world.grants
    signed = SignedContract.verify(world.contract, dict(world.about().contract_signatures))
    enclave = SimpleNamespace(
        call=lambda call, timeout=None: enclave_pb2.Reply(
            evidence=enclave_pb2.Evidence(evidence=world.evidence)
        )
    )
    numbers, key = itertools.count(), SigningKey()
    heads: HeadMemory | None = None

    def obtained(data: bytes) -> None:
        client = BrokerClient.__new__(BrokerClient)
        client._timeout = 1.0
        client.challenge = lambda request: SimpleNamespace(nonce=bytes(32))  # type: ignore[method-assign]
        client.release = lambda request: stage_pb2.Grants.FromString(data)  # type: ignore[method-assign]
        nonlocal heads
        with world.recorded.clock():
            if (number := next(numbers)) % 100 == 0:
                heads = HeadMemory(folder / f"broker-heads-{number}.sqlite")
            case: dict[str, Any] = {
                "run_id": "run-1",
                "party": "north",
                "signing": key,
                "heads": heads,
            }
            got = client.obtain(enclave, signed, **case)  # type: ignore[arg-type]
        if got.by_model != grants.by_model:
            raise AssertionError("another grant was accepted")

    sample = grants.SerializeToString(deterministic=True)
    obtained(sample)
    expected = (FedarkError, DecodeError)
    return Target(
        "broker reply",
        [sample],
        obtained,
        "open",
        structure=False,
        message=stage_pb2.Grants,
        expected=expected,
    )


def _tokenizer() -> Made:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {
        word: i
        for i, word in enumerate(
            ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "open", "close", "##d", "the", "line")
        )
    }
    made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(["[PAD]"])
    pairs = Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], unk_token="</s>")
    )
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    pairs.add_special_tokens(["</s>"])
    samples = [one.to_str().encode() for one in (made, pairs)]
    settings = (
        b'{"pad_token": {"content": "[PAD]", "lstrip": false}, "eos_token": "[SEP]",'
        b' "do_lower_case": true}'
    )

    def encode(data: bytes) -> None:
        encoder = TextEncoder({"tokenizer.json": data}, max_length=16, pad_id=0)
        encoder.texts(["open the line", "", "ab \u202e\U0001f600"])
        encoder.prompts(["open the line"], [4])
        encoder.answers(["close"])

    for sample in samples:
        encode(sample)
    yield Target("tokenizer", samples, encode, "open", structure=False, words=_JSON)
    vocabulary = "\n".join(words).encode()

    def settle(data: bytes) -> None:
        TextEncoder({"vocab.txt": vocabulary, "tokenizer_config.json": data}, max_length=16)

    settle(settings)
    yield Target("tokenizer settings", [settings], settle, "open", structure=False, words=_JSON)


def _model_folder() -> Made:
    from types import SimpleNamespace

    from fedark.foundation.modelfolder import index_names
    from fedark.tuning.base import POOLING, _pooling

    index = b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    words = (*_JSON, b"../", b"/", b"\\u0000")

    def names(data: bytes) -> None:
        try:
            found = index_names(data)
        except ValueError:
            raise ModelError("refused") from None  # as its callers do
        if any("/" in name or not name.endswith(".safetensors") for name in found):
            raise AssertionError("a name leads out of the folder")

    yield Target("weight index", [index], names, "open", structure=False, words=words)
    config = SimpleNamespace(model_type="bert", is_encoder_decoder=False)

    def pool(data: bytes) -> None:
        for files in (
            {POOLING: data},
            {POOLING: b'{"pooling_mode": "mean"}', "modules.json": data},
        ):
            _pooling(files, {}, config, "classification", "auto")

    pooling = (
        b'{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}',
        b'{"embedding_dimension": 384, "pooling_mode": "mean"}',
        b'[{"idx": 2, "name": "2", "path": "2_Dense",'
        b' "type": "sentence_transformers.models.Dense"}]',
    )
    yield Target("pooling settings", list(pooling), pool, "open", structure=False, words=words)


def _configuration(folder: Path) -> Target:
    """A model of each kind, whose weights stay as they are; it may take no more memory than a small
    one needs.

    One input in four names another architecture, any that the library has.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from fedark.contract.contract import AdapterTerms, ModelTerms, ServerTerms, TrainingTerms
    from fedark.records.reading import Record
    from fedark.tuning.base import load_base
    from fedark.tuning.task import TaskModel

    words = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "open",
        "close",
        "the",
        "line",
        "a",
        "b",
        "c",
    )
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    narrow = {"intermediate_size": 8, "max_position_embeddings": 32}
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    labels, pooling = (
        ("open", "close"),
        {"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}'},
    )
    architectures = sorted(CONFIG_MAPPING.keys())
    bases: dict[str, tuple[dict[str, bytes], ModelTerms]] = {}
    for model, targets, extra in (
        (BertModel(BertConfig(**sizes, **narrow)), ("query", "value"), pooling),
        (
            GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(words), n_embd=8, n_layer=2, n_head=2, n_positions=32, **ids
                )
            ),
            ("c_attn",),
            {},
        ),
        (LlamaForCausalLM(LlamaConfig(**sizes, **narrow, num_key_value_heads=1)), ("q_proj",), {}),
    ):
        name = model.config.model_type
        model.save_pretrained(folder / name)
        files = {
            file: (folder / name / file).read_bytes()
            for file in ("config.json", "model.safetensors")
        }
        files |= {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": b'{"tokenizer_class": "TokenizersBackend",'
            b' "pad_token": "[PAD]"}',
            **extra,
        }
        task: Any = "classification" if extra else "instruction"
        adapter = AdapterTerms(rank=1, targets=targets)
        layout = load_base(files, task, labels, shapes_only=True).layout(adapter)
        terms = ModelTerms(
            name="m", task=task, bundle="0" * 96, weights="0" * 96, prompt="{text}",
            labels=labels if extra else (), adapter=adapter,
            training=TrainingTerms(max_length=16), server=ServerTerms(), layout=layout,
        )  # fmt: skip
        bases[name] = files, terms

    def load(data: bytes) -> None:
        named = re.search(b"|".join(name.encode() for name in bases), data)
        files, terms = bases[named[0].decode() if named else "bert"]
        chosen = zlib.crc32(data)
        if chosen % 4 == 0 and data not in samples:
            name = architectures[chosen // 4 % len(architectures)]
            data = re.sub(rb'"model_type": "[^"]*"', f'"model_type": "{name}"'.encode(), data)
        with _little_memory():
            loaded = TaskModel.load({**files, "config.json": data}, terms)
            loaded.evaluate([Record("open the line", "open"), Record("a", "close")])

    samples = [files["config.json"] for files, _ in bases.values()]
    for sample in samples:
        load(sample)
    return Target("model configuration", samples, load, "open", structure="json", words=_JSON)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """For the time being, this process gets a gigabyte more than it has; to ask for it is a
    failure, refused or not.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    try:
        yield
    except FedarkError as error:
        cause = error.__context__
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                raise AssertionError("asked for too much memory") from cause
            cause = cause.__context__
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
