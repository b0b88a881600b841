"""Entry point of the inference enclave: loads torch, transformers and peft, and answers once with
each task kind to warm up.

The warm-up makes libraries load what they load late, and start the threads that they start once,
while that is still easy.
"""

from __future__ import annotations

import json
import sys

SPECIFICATION = json.loads(sys.stdin.buffer.read())
sys.path[:] = SPECIFICATION["path"]

from fedark.enclave.main import Create, run  # noqa: E402


def load() -> Create:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from fedark.enclave import inference  # noqa: F401
    from fedark.enclave.roles import create

    small = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens = torch.ones((2, 4), dtype=torch.long)
    for model, targets in (
        (BertForSequenceClassification(BertConfig(**small)), ["query", "value"]),
        (LlamaForCausalLM(LlamaConfig(**small)), ["q_proj", "v_proj"]),
    ):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        with torch.no_grad():
            adapted(input_ids=tokens)
    return create


run(SPECIFICATION, load)
