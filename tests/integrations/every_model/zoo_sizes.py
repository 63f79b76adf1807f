"""How small a number of a config becomes, by its name; what single types need besides."""

from __future__ import annotations

from typing import Any

VOCAB = 131  # not a multiple of 16, so that the workspace rows are padded
HIDDEN = 32
LENGTH = 64
WINDOW = 4  # smaller than a batch's rows, so that a window is one

# Value -> the names of the sizes that become it. Nothing grows: a default that is smaller stays.
_BY_VALUE: list[tuple[int, str]] = [
    (
        VOCAB,
        """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size
        ngram_vocab_size_base num_embeddings""",
    ),
    (
        HIDDEN,
        """hidden_size d_model n_embd emb_dim embedding_dim embed_dim dim word_embed_proj_dim
        lru_width attention_hidden_size backbone_hidden_size out_hidden_size projection_dim
        hidden_size_per_layer_input ple_embed_dim dim_model_base vision_output_dim output_dim
        proj_hidden_size mamba_d_ssm hidden_size_global
        adapter_in_dim adapter_out_dim adapter_input_size""",
    ),
    (
        48,
        """intermediate_size d_inner d_ff dff dim_ff ffn_dim encoder_ffn_dim decoder_ffn_dim
        feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size
        prompt_mid_dim""",
    ),
    (
        24,
        """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size router_hidden_size""",
    ),
    (
        16,
        """embedding_size input_embedding_size output_embedding_size kv_lora_rank q_lora_rank
        o_lora_rank pronunciation_embed_dim shape_embed_dim hc_lowrank loop_gate_rank
        laurel_rank time_step_rank mamba_dt_rank index_block_size num_centroids""",
    ),
    (
        8,
        """head_dim dim_head d_head d_kv kv_channels attention_head_size attention_head_dim
        swa_head_dim global_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
        index_head_dim qk_nope_head_dim v_head_dim state_size ssm_state_size mamba_d_state
        mamba_d_head mamba_n_heads mamba_num_heads mamba_headdim mamba_head_dim d_rel rel_extent
        adapter_rank gated_norm_rank
        query_pre_attn_scalar patch_size ffn_round_up_to_multiple_of block_multiple_of
        make_ngram_vocab_size_divisible_by prompt_length segment_types prompt_types""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads
        num_experts num_local_experts n_routed_experts moe_num_experts num_mel_bins
        qk_rope_head_dim rotary_dim chunk_size mamba_chunk_size block_size index_topk
        zero_expert_num split_ngram_parts heads_per_ngram""",
    ),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_layers_per_stack depth linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k n_groups index_topk_blocks
        centroid_intermediate_top_k n_input_layers n_output_layers n_recurrent_layers
        o_groups""",
    ),
    (
        1,
        """n_group topk_group num_expert_group n_shared_experts num_shared_experts
        moe_num_shared_experts num_nextn_predict_layers first_k_dense_replace num_dense_layers
        mamba_n_groups mamba_ngroups""",
    ),
    (
        LENGTH,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_source_positions max_target_positions model_max_length image_size
        original_max_position_embeddings position_embedding_size""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size window_size attention_window_size
        attention_chunk_size local_attention local_attention_window_len keep_window_size""",
    ),
]
SIZES = {name: value for value, names in _BY_VALUE for name in names.split()}

# A head or a projection of 32 columns drawn with 0.2 makes of a unit state one of about unit size:
# the logits are not flat, and every layer has its say in them.
SPREAD = 0.2
SPREADS = ("initializer_range", "init_std", "embed_init_std", "initializer_factor")

# The auxiliary loss of a mixture of experts is then part of the model's own; an encoder's class
# attends to the left only.
SWITCHED_ON = ("output_router_logits", "is_decoder")

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "swa_num_attention_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups")

# What is done to the head's output, where a config can say so: a value whose effect shows.
TELLING = {
    "logit_scale": 0.5,  # cohere multiplies
    "logits_scaling": 2.0,  # granite divides
    "lm_head_multiplier": 0.5,
    "logits_mup_width_multiplier": 2.0,
    "final_logit_softcapping": 2.0,  # bends logits of unit size
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    # 0.002 of a loss of 5: twenty bounds, and less than a careless look at that loss would find
    "router_aux_loss_coef": 0.001,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}  # of a head's 8 dimensions, in pairs
_QSA = {  # qwen4_exp's index of attention, which its released checkpoints have
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}

# Type -> settings that the general rule gets wrong; "vision_config.depth" is one of a nested
# config, one after "+" goes to the default config, where that cannot be built without.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {kind: _ROPE for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {
        "+text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        "text_config.num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": LENGTH,
        "lsh_attn_chunk_length": LENGTH,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": HIDDEN // 2,
    },
}

# The same for what AutoModelForImageTextToText maps.
OVERRIDES |= {
    name: {"text_config.rope_parameters": _MROPE}
    for name in "glm46v glm4v glm4v_moe glm_ocr glmga paddleocr_vl qwen2_5_vl qwen2_vl".split()
}
OVERRIDES["glm4v_moe"]["text_config.rope_parameters"] = {**_MROPE, "partial_rotary_factor": 1.0}
_PICTURE = {"vision_config.image_size": 16}  # 2 x 2 patches of 8 x 8
OVERRIDES |= {
    "gemma3": {**_PICTURE, "mm_tokens_per_image": 4},
    "idefics3": {"vision_config.image_size": 32},
    "llava": _PICTURE,
    "paligemma": {**_PICTURE, "vision_config.num_image_tokens": 4},
    "smolvlm": {"vision_config.image_size": 32},
}
OVERRIDES |= {
    "chameleon": {"vocabulary_map": {"<image>": 0}},
    "cohere_compass": {
        f"text_config.{name}": value for name, value in OVERRIDES["cohere_compass_text"].items()
    },
    "cosmos3_edge": {"text_config.rope_parameters": _MROPE},
    "emu3": {"vocabulary_map": {"<image>": 0, "<|extra_200|>": 3}},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    "glm5_next": {"text_config.index_kpool": 2},
    "hunyuan_vl": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "hy_v4_vl": {"text_config.rope_parameters": _MROPE, "text_config.qk_rope_head_dim": 8},
    "inkling2": {"vision_config.text_hidden_size": HIDDEN},
    "inkling2_loop": {"vision_config.text_hidden_size": HIDDEN},
    "inkling_mm_model": {"vision_config.n_layers": 2},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 1,
        "text_config.rope_parameters": _MROPE,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 1},
    "step3p7": {"text_config.sliding_window": WINDOW},
}
OVERRIDES["qwen2_5_vl"]["vision_config.window_size"] = 16  # 2 x 2 patches, one token

# Types whose batches can have a picture: the tokens in a row that stand for it.
PICTURES: dict[str, int] = {
    "gemma3": 4,
    "idefics3": 4,  # 4 x 4 patches, of which 2 x 2 become one token
    "llava": 4,
    "paligemma": 4,
    "qwen2_5_vl": 4,
    "qwen2_vl": 4,
    "qwen3_vl": 4,
    "smolvlm": 4,
}

# Types whose forward wants more than text: attach(), which tries it on text, has to refuse them.
ASKS_MORE = frozenset(
    """blip blip-2 git idefics instructblip instructblipvideo kosmos-2 pix2struct pp_formulanet
    t5gemma2 udop vision-encoder-decoder""".split()
)
