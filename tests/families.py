"""Tiny random configurations of decoder families: name -> (model_type, what differs from SIZES)."""

from transformers import CONFIG_MAPPING

SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
RECURRENT = {"num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
             "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "n_group": 2, "first_k_dense_replace": 1, "topk_group": 1, "num_key_value_heads": 4, "n_shared_experts": 1}
GRANITE = {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
           "attention_multiplier": 0.2}
MAMBA = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "mamba_n_heads": 8,
         "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
WINDOW = {"sliding_window": 8, "num_hidden_layers": 4}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}

FAMILIES = {
    "Llama 3.1": ("llama", {"rope_parameters": ROPE}),
    "Falcon 3": ("llama", {"head_dim": 16}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral (with a window)": ("mistral", {"sliding_window": 8}),
    "Ministral": ("ministral", {"sliding_window": 8, "head_dim": 8}),
    "Ministral 3": ("ministral3", {}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen2.5 (with a window)": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1}),
    "Qwen3-Next": ("qwen3_next", RECURRENT | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3.5 (text)": ("qwen3_5_text", RECURRENT),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512,
                           "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "Gemma 3 (text)": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
                                       "num_hidden_layers": 6}),
    "Phi-2": ("phi", {}),
    "Phi-3, Phi-4": ("phi3", {}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite 3": ("granite", GRANITE),
    "Granite 3 (experts)": ("granitemoe", LOCAL_EXPERTS),
    "Granite 4": ("granitemoehybrid", LOCAL_EXPERTS | MAMBA),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", WINDOW | {"logit_scale": 0.25}),
    "GLM-4": ("glm", {"head_dim": 8}),
    "GLM-4-0414": ("glm4", {"head_dim": 8}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "GPT-2": ("gpt2", GPT),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": ("falcon", {}),
    "EXAONE 4": ("exaone4", WINDOW | {"sliding_window_pattern": 2}),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "gpt-oss": ("gpt_oss", LOCAL_EXPERTS | {"head_dim": 8, "sliding_window": 8}),
    "Mixtral": ("mixtral", LOCAL_EXPERTS),
    "Seed-OSS": ("seed_oss", {"head_dim": 8}),
    "Hunyuan (dense)": ("hunyuan_v1_dense", {"head_dim": 8}),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 8}),
    "LFM2": ("lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "StarCoder2": ("starcoder2", {"sliding_window": None}),
    "StableLM": ("stablelm", {}),
    "Nemotron": ("nemotron", {}),
    "Arcee": ("arcee", {}),
    "Bloom": ("bloom", {}),
}


def config(name):
    kind, more = FAMILIES[name]
    return CONFIG_MAPPING[kind](**(SIZES | more))
