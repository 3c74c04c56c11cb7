"""Models whose shapes are asked for often, as the configurations that their authors published them with."""

from __future__ import annotations

from typing import Any

_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522}
_VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 224, "num_labels": 1000}
_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}


def _wide(hidden_size: int, intermediate_size: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return dict(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **others,
    )


def _t5(d_model: int, d_kv: int, d_ff: int, layers: int, heads: int) -> dict[str, Any]:
    return _T5 | {
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
    }


SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("openai-community/gpt2", _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-medium": ("openai-community/gpt2-medium", _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("openai-community/gpt2-large", _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("openai-community/gpt2-xl", _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-1b": (
        "meta-llama/Llama-3.2-1B",
        _LLAMA | _wide(2048, 8192, 16, 32, head_dim=64) | {"tie_word_embeddings": True},
    ),
    "llama-3b": (
        "meta-llama/Llama-3.2-3B",
        _LLAMA | _wide(3072, 8192, 28, 24, head_dim=128) | {"tie_word_embeddings": True},
    ),
    "llama-8b": ("meta-llama/Llama-3.1-8B", _LLAMA | _wide(4096, 14336, 32, 32)),
    "llama-70b": ("meta-llama/Llama-3.1-70B", _LLAMA | _wide(8192, 28672, 80, 64)),
    "llama-405b": ("meta-llama/Llama-3.1-405B", _LLAMA | _wide(16384, 53248, 126, 128)),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.3",
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "vocab_size": 32768,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
        }
        | _wide(4096, 14336, 32, 32),
    ),
    "qwen3-8b": (
        "Qwen/Qwen3-8B",
        _QWEN3
        | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
        | _wide(4096, 12288, 36, 32, num_key_value_heads=8),
    ),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        _QWEN3
        | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "tie_word_embeddings": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        }
        | _wide(2048, 6144, 48, 32, num_key_value_heads=4),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        _MIXTRAL | _wide(4096, 14336, 32, 32) | {"vocab_size": 32000, "max_position_embeddings": 32768},
    ),
    "mixtral-8x22b": (
        "mistralai/Mixtral-8x22B-v0.1",
        _MIXTRAL | _wide(6144, 16384, 56, 48) | {"vocab_size": 32000, "max_position_embeddings": 65536},
    ),
    "gpt-oss-20b": ("openai/gpt-oss-20b", _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("openai/gpt-oss-120b", _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}),
    "bert-base": ("google-bert/bert-base-uncased", _BERT | _wide(768, 3072, 12, 12)),
    "bert-large": ("google-bert/bert-large-uncased", _BERT | _wide(1024, 4096, 24, 16)),
    "vit-b": ("google/vit-base-patch16-224", _VIT | _wide(768, 3072, 12, 12, patch_size=16)),
    "vit-l": ("google/vit-large-patch16-224", _VIT | _wide(1024, 4096, 24, 16, patch_size=16)),
    "vit-h": ("google/vit-huge-patch14-224-in21k", _VIT | _wide(1280, 5120, 32, 16, patch_size=14)),
    "resnet-50": (
        "microsoft/resnet-50",
        {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_labels": 1000},
    ),
    "t5-base": ("google-t5/t5-base", _t5(768, 64, 3072, 12, 12)),
    "t5-large": ("google-t5/t5-large", _t5(1024, 64, 4096, 24, 16)),
    "t5-3b": ("google-t5/t5-3b", _t5(1024, 128, 16384, 24, 32)),
    "t5-11b": ("google-t5/t5-11b", _t5(1024, 128, 65536, 24, 128)),
}
"""By name: the repository whose ``config.json`` the values are from, and the values."""
