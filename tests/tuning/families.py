"""Tiny random bases of many architectures, each as its makers publish it: an encoder with its
language head, a decoder as a language model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

WORDS = (
    *("the", "pump", "valve", "motor", "cable", "leaks", "sparks", "hums", "is"),
    *("not", "old", "new", "loud", "wet", "dry", "a", "b", "c"),
)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # as in RoBERTa, whose positions begin after <pad>
VOCABULARY = len(WORDS) + len(SPECIAL)
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_SEQ2SEQ = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64},
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QV = ("q_proj", "v_proj")
_BERT = ("query", "value")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        kind: "encoder", "decoder" or "both" (encoder and decoder).
        config, model: names of classes of transformers.
        targets: of the adapter.
        options: of the configuration; `plain` leaves out the sizes that most architectures name
            alike.
    """

    kind: str
    config: str
    model: str
    targets: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = True

    def save(self, folder: Path, **changes: Any) -> None:
        """Write model and tokenizer."""
        sizes = _SIZES if self.plain else {"vocab_size": VOCABULARY}
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**sizes, **IDS, **self.options, **changes})
        save(folder, getattr(transformers, self.model)(config))


def _encoder(
    stem: str, targets: tuple[str, ...], head: str = "ForMaskedLM", **options: Any
) -> Family:
    return Family("encoder", f"{stem}Config", f"{stem}{head}", targets, options)


def _decoder(stem: str, targets: tuple[str, ...] = _QV, **options: Any) -> Family:
    return Family("decoder", f"{stem}Config", f"{stem}ForCausalLM", targets, options)


FAMILIES = {
    "albert": _encoder("Albert", _BERT, embedding_size=8),
    "bert": _encoder("Bert", _BERT),
    "bert, bare": _encoder("Bert", _BERT, head="Model"),
    "big-bird": _encoder("BigBird", _BERT, block_size=4, attention_type="original_full"),
    "camembert": _encoder("Camembert", _BERT),
    "convbert": _encoder("ConvBert", _BERT, embedding_size=16, head_ratio=1),
    "data2vec-text": _encoder("Data2VecText", _BERT),
    "deberta": _encoder(
        "Deberta", ("in_proj",), relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "deberta-v2": _encoder(
        "DebertaV2",
        ("query_proj", "value_proj"),
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        **{"norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "distilbert": Family(
        "encoder",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        ("q_lin", "v_lin"),
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64},
        plain=False,
    ),
    "electra": _encoder("Electra", _BERT, head="ForPreTraining", embedding_size=8),
    "ernie": _encoder("Ernie", _BERT),
    "funnel": Family(
        "encoder",
        "FunnelConfig",
        "FunnelForMaskedLM",
        ("q_head", "v_head"),
        {
            **{"block_sizes": [1, 1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
            **{"num_decoder_layers": 1, "max_position_embeddings": 64},
        },
        plain=False,
    ),
    "layoutlm": _encoder("LayoutLM", _BERT),
    "longformer": _encoder("Longformer", _BERT, attention_window=[8, 8]),
    "mobilebert": _encoder(
        "MobileBert", _BERT, embedding_size=8, intra_bottleneck_size=8, head="ForPreTraining"
    ),
    "modernbert": _encoder(
        "ModernBert",
        ("Wqkv",),
        global_attn_every_n_layers=2,
        local_attention=8,
        cls_token_id=0,
        sep_token_id=2,
    ),
    "mpnet": _encoder("MPNet", ("q", "v")),
    "nystromformer": _encoder("Nystromformer", _BERT, segment_means_seq_len=64, num_landmarks=64),
    "rembert": _encoder("RemBert", _BERT, input_embedding_size=8, output_embedding_size=8),
    "roberta": _encoder("Roberta", _BERT),
    "roformer": _encoder("RoFormer", _BERT, embedding_size=16),
    "xlm-roberta": _encoder("XLMRoberta", _BERT),
    "xlnet": Family(
        "encoder",
        "XLNetConfig",
        "XLNetLMHeadModel",
        ("layer_1", "layer_2"),
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        plain=False,
    ),
    "bart": Family(
        "both", "BartConfig", "BartForConditionalGeneration", _QV, _SEQ2SEQ, plain=False
    ),
    "mbart": Family(
        "both", "MBartConfig", "MBartForConditionalGeneration", _QV, _SEQ2SEQ, plain=False
    ),
    "t5": Family(
        "both",
        "T5Config",
        "T5ForConditionalGeneration",
        ("q", "v"),
        {
            **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
            "decoder_start_token_id": 1,
        },
        plain=False,
    ),
    "bloom": Family(
        "decoder",
        "BloomConfig",
        "BloomForCausalLM",
        ("query_key_value",),
        {"hidden_size": 16, "n_layer": 2, "n_head": 2},
        plain=False,
    ),
    "cohere": _decoder("Cohere"),
    "deepseek-v3": _decoder(
        "DeepseekV3",
        ("kv_b_proj",),
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **_MOE},
        **{"first_k_dense_replace": 1, "num_key_value_heads": 2},
    ),
    "falcon": _decoder("Falcon", ("query_key_value",)),
    "gemma": _decoder("Gemma", head_dim=8, num_key_value_heads=1),
    "gemma2": _decoder("Gemma2", head_dim=8, num_key_value_heads=1, sliding_window=16),
    "gemma3": Family(
        "decoder",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _QV,
        {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 16},
    ),
    "gpt2": Family("decoder", "GPT2Config", "GPT2LMHeadModel", ("c_attn",), _SMALL, plain=False),
    "gpt-bigcode": Family(
        "decoder", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", ("c_attn",), _SMALL, plain=False
    ),
    "gpt-j": Family(
        "decoder", "GPTJConfig", "GPTJForCausalLM", _QV, {**_SMALL, "rotary_dim": 4}, plain=False
    ),
    "gpt-neo": Family(
        "decoder",
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        _QV,
        {
            **{"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8},
            **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
        },
        plain=False,
    ),
    "gpt-neox": _decoder("GPTNeoX", ("query_key_value",)),
    "gpt-oss": _decoder(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, num_key_value_heads=1
    ),
    "granite": _decoder("Granite", embedding_multiplier=3.0, logits_scaling=2.0),
    "llama": _decoder("Llama", num_key_value_heads=1),
    "llama, tied": _decoder("Llama", num_key_value_heads=1, tie_word_embeddings=True),
    "mamba": Family(
        "decoder",
        "MambaConfig",
        "MambaForCausalLM",
        ("in_proj",),
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        plain=False,
    ),
    "mistral": _decoder("Mistral", num_key_value_heads=1, sliding_window=16),
    "mixtral": _decoder("Mixtral", num_key_value_heads=1, num_local_experts=4),
    "olmo2": _decoder("Olmo2"),
    "opt": Family(
        "decoder",
        "OPTConfig",
        "OPTForCausalLM",
        _QV,
        {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
            **{"word_embed_proj_dim": 16, "max_position_embeddings": 64},
        },
        plain=False,
    ),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3", ("qkv_proj",), original_max_position_embeddings=64),
    "qwen2": _decoder("Qwen2", num_key_value_heads=1),
    "qwen2-moe": _decoder(
        "Qwen2Moe", num_key_value_heads=1, num_experts=4, shared_expert_intermediate_size=16, **_MOE
    ),
    "qwen3": _decoder("Qwen3", num_key_value_heads=1, head_dim=8),
    "qwen3-moe": _decoder("Qwen3Moe", num_key_value_heads=1, head_dim=8, num_experts=4, **_MOE),
    "smollm3": _decoder("SmolLM3", num_key_value_heads=1),
    "stablelm": _decoder("StableLm", num_key_value_heads=2),
    "starcoder2": _decoder("Starcoder2", num_key_value_heads=1),
}
"""By name; a comma stands before a variant of the same architecture."""


def save(folder: Path, model: PreTrainedModel) -> None:
    """Write a model and a tokenizer of a few words for it."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that an error anywhere moves the logits; norms stay near one.
            spread = 0.05 if parameter.ndim == 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and "bias" not in name else 0.0))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def table() -> str:
    """The list as docs/models.md has it."""
    rows = [
        "| architecture | base as published | targets | classification | answers |",
        "|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        classifies = (
            getattr(transformers, family.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        )
        targets = ", ".join(f"`{target}`" for target in family.targets)
        answers = "yes" if family.kind == "decoder" else ""
        rows.append(f"| {name} | `{family.model}` | {targets} | {'yes' * classifies} | {answers} |")
    return "\n".join(rows) + "\n"
