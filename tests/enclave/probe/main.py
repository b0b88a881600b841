"""Entry point of a test's own enclave: started, confined and measured like a real one, with a
session that does what it is told.
"""

from __future__ import annotations

import json
import sys

SPECIFICATION = json.loads(sys.stdin.buffer.read())
sys.path[:] = SPECIFICATION["path"]

from fedark.enclave.main import run  # noqa: E402


class ProbeSession:
    """Does what the prompt of the first record says."""

    message_bytes = 8 << 20

    def __init__(self, run_config: bytes, quote, sealing_key) -> None:
        from fedark.foundation.errors import InputError

        if run_config == b"refuse":
            raise InputError(
                "This run configuration is refused.", safe="Nothing was done.", fix="Send another."
            )
        self._quote = quote

    def handle(self, call, progress):
        from fedark.v1 import enclave_pb2 as pb

        if call.WhichOneof("body") == "start":
            return pb.Reply(hello=pb.Hello(hpke_public=b"hpke", signing_public=b"signing"))
        record = call.records.records[0]
        return pb.Reply(
            measured=pb.Measured(
                local=getattr(self, "do_" + record.prompt)(record.answer, progress)
            )
        )

    def do_echo(self, text, progress) -> bytes:
        return text.encode()

    def do_modules(self, text, progress) -> bytes:
        return json.dumps(sorted(sys.modules)).encode()

    def do_import(self, text, progress) -> bytes:
        import importlib

        try:
            importlib.import_module(text)
        except ImportError as error:
            return f"{type(error).__name__}: {error}".encode()
        return b"imported"

    def do_facts(self, text, progress) -> bytes:
        import os
        import threading

        flags = sys.flags
        return json.dumps(
            {
                "path": sys.path,
                "environment": sorted(os.environ),
                "isolated": flags.isolated,
                "no_site": flags.no_site,
                "dont_write_bytecode": flags.dont_write_bytecode,
                "pycache_prefix": sys.pycache_prefix,
                "cached": sys.modules["cbor2"].__cached__,
                "threads": threading.active_count(),
            }
        ).encode()

    def do_count(self, text, progress) -> bytes:
        from fedark.v1 import enclave_pb2 as pb

        for number in range(int(text)):
            progress(pb.Progress(stage="counting", done=number, total=int(text), value=number / 2))
        return b"counted"

    def do_quote(self, text, progress) -> bytes:
        platform, token = self._quote(b"\x05" * 64, b"\x06" * 32)
        return platform.encode() + b"\0" + token

    def do_refuse(self, text, progress) -> bytes:
        from fedark.foundation.errors import EvidenceRefused

        raise EvidenceRefused("a peer", ["wrong nonce", "debug mode"])

    def do_fail(self, text, progress) -> bytes:
        raise KeyError(text)

    def do_print(self, text, progress) -> bytes:
        print(text, flush=True)
        print(text, file=sys.stderr, flush=True)
        import os

        os.write(1, text.encode())
        os.write(2, text.encode())
        return b"printed"

    def do_hang(self, text, progress) -> bytes:
        import threading

        threading.Event().wait()
        return b""

    def do_hoard(self, text, progress) -> bytes:
        held = []
        while True:
            held.append(bytearray(16 << 20))

    def do_large(self, text, progress) -> bytes:
        return bytes(int(text))

    def do_exit(self, text, progress) -> bytes:
        import os

        os._exit(int(text))

    def do_abort(self, text, progress) -> bytes:
        import os

        os.abort()

    def do_forbidden(self, text, progress) -> bytes:
        import ctypes

        ctypes.CDLL(None).syscall(ctypes.c_long(0x4000_0027))
        return b""

    def do_garbage(self, text, progress) -> bytes:
        import os

        for number in range(3, 256):
            try:
                os.write(number, bytes.fromhex(text))
            except OSError:
                continue
        return b""

    def do_train(self, text, progress) -> bytes:
        import time

        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = get_peft_model(
            BertForSequenceClassification(config),
            LoraConfig(r=2, target_modules=["query", "value"]),
        )
        tokens, labels = torch.randint(0, 64, (16, 16)), torch.arange(16) % 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses, begun = [], time.perf_counter()
        for _ in range(5):
            loss = model(input_ids=tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report = {
            "losses": losses,
            "seconds": time.perf_counter() - begun,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
        return json.dumps(report).encode()


def load():
    import numpy as np

    import fedark.foundation.canonical  # noqa: F401
    from fedark.v1 import enclave_pb2  # noqa: F401

    np.ones((64, 64)) @ np.ones((64, 64))
    return ProbeSession


if __name__ == "__main__":
    run(SPECIFICATION, load)
