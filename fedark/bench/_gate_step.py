"""One LoRA step, timed from inside: the entry point of two processes of `fedark bench gate`.

Started like an enclave, it confines itself like one, and answers each Round with the seconds of one
step: by the clock, and of processor time. Started with the task "plain" it does the same without a
sandbox, for a line on its standard input each time. Both import and warm up the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

SPECIFICATION = json.loads(sys.stdin.buffer.readline())
sys.path[:] = SPECIFICATION["path"]

from fedark.enclave.main import Create, run  # noqa: E402

_BATCH, _TOKENS = 8, 64


def prepare() -> Callable[[], str]:
    """A step of LoRA (r=8, query and value) on a BERT of MiniLM's size with random weights; returns
    both its seconds.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_labels=8,
    )
    adapted: Any = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(r=8, target_modules=["query", "value"])
    )
    optimizer = torch.optim.AdamW(
        [weight for weight in adapted.parameters() if weight.requires_grad]
    )
    tokens, labels = torch.randint(1000, (_BATCH, _TOKENS)), torch.randint(8, (_BATCH,))

    def step() -> str:
        begun, worked = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        return f"{time.perf_counter() - begun} {time.process_time() - worked}"

    step()
    return step


class _StepSession:
    """Answers Start and Round; see the module's docstring."""

    message_bytes = 8 << 20

    def __init__(self, step: Callable[[], str]) -> None:
        self._step = step

    def handle(self, call: Any, progress: Any) -> Any:
        from fedark.v1 import enclave_pb2 as pb

        if call.WhichOneof("body") == "start":
            return pb.Reply(hello=pb.Hello())
        return pb.Reply(measured=pb.Measured(local=self._step().encode("ascii")))


def load() -> Create:
    step = prepare()
    return lambda run_config, quote, sealing_key: _StepSession(step)


if SPECIFICATION["task"] == "plain":
    take = prepare()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(take(), flush=True)
else:
    run(SPECIFICATION, load)
