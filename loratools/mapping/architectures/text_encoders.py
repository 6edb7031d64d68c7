"""The tables of the text encoders: CLIP, T5 (and UMT5), and the decoder-only language models used as one.

Sites are the names of transformers' classes: CLIPTextModelWithProjection (`text_model.encoder.layers.N…`), T5EncoderModel
(`encoder.block.N…`), Gemma2Model, Qwen and LlamaModel (`layers.N…`). ComfyUI, kohya and OneTrainer all use these names, so the
original namespace equals them. Symbols: h width, mlp inner width of the feed-forward, q and kv the projections of a GQA model.
"""

from __future__ import annotations

from loratools.mapping.architectures import Component
from loratools.mapping.architectures.components import text_encoder
from loratools.mapping.rules import Row, Table, cat, embedding, norm, renamed, site, transposed

# ----------------------------------------------------------------------------------------------------------------------- CLIP

_CLIP_LAYER = "text_model.encoder.layers.{n}"
_RESBLOCK = "transformer.resblocks.{n}"


def _same(name: str, out: str, in_: str) -> Row:
    return site(name, name, out, in_)


_CLIP_ROWS = (
    embedding("text_model.embeddings.token_embedding", "text_model.embeddings.token_embedding", "vocab", "h"),
    embedding("text_model.embeddings.position_embedding", "text_model.embeddings.position_embedding", "positions", "h"),
    *(_same(f"{_CLIP_LAYER}.self_attn.{name}", "h", "h") for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    _same(f"{_CLIP_LAYER}.mlp.fc1", "mlp", "h"),
    _same(f"{_CLIP_LAYER}.mlp.fc2", "h", "mlp"),
    norm(f"{_CLIP_LAYER}.layer_norm1", f"{_CLIP_LAYER}.layer_norm1", "h"),
    norm(f"{_CLIP_LAYER}.layer_norm2", f"{_CLIP_LAYER}.layer_norm2", "h"),
    norm("text_model.final_layer_norm", "text_model.final_layer_norm", "h"),
    _same("text_projection", "proj", "h"),  # CLIPTextModelWithProjection; OneTrainer trains it
)

# open_clip: checkpoints of SD2 and SDXL, adapters of Stable Cascade. The fused tensors are `attn.in_proj_weight`/`in_proj_bias`
# and the position table `positional_embedding`, without a `.weight`. `text_projection` is stored (in, out) there.
_OPEN_CLIP = (
    embedding("token_embedding", "text_model.embeddings.token_embedding", "vocab", "h"),
    embedding("positional_embedding", "text_model.embeddings.position_embedding", "positions", "h"),
    cat(f"{_RESBLOCK}.attn.in_proj", f"{_CLIP_LAYER}.self_attn.q_proj .k_proj .v_proj", "h h h", "h"),
    site(f"{_RESBLOCK}.attn.out_proj", f"{_CLIP_LAYER}.self_attn.out_proj", "h", "h"),
    site(f"{_RESBLOCK}.mlp.c_fc", f"{_CLIP_LAYER}.mlp.fc1", "mlp", "h"),
    site(f"{_RESBLOCK}.mlp.c_proj", f"{_CLIP_LAYER}.mlp.fc2", "h", "mlp"),
    norm(f"{_RESBLOCK}.ln_1", f"{_CLIP_LAYER}.layer_norm1", "h"),
    norm(f"{_RESBLOCK}.ln_2", f"{_CLIP_LAYER}.layer_norm2", "h"),
    norm("ln_final", "text_model.final_layer_norm", "h"),
)

CLIP = Table(
    "clip",
    _CLIP_ROWS,
    {"n": 32},
    {
        "flat-clip": renamed(_CLIP_ROWS, r"^(?:text_model\.)?", ""),  # CLIPTextModel since transformers 5
        "te-processor": renamed(  # diffusers up to 0.16: `self_attn.to_q_lora.up.weight`
            _CLIP_ROWS, r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1_lora"
        ),
        "open_clip": _OPEN_CLIP,
        "open_clip-weights": (*_OPEN_CLIP, transposed("text_projection", "text_projection", "h", "proj")),  # checkpoints only
    },
)

_CLIP_L = {"h": 768, "mlp": 3072, "n": 12}
_CLIP_H = {"h": 1024, "mlp": 4096, "n": 23}  # the checkpoint's 24th layer is not used
_CLIP_G = {"h": 1280, "mlp": 5120, "n": 32}


def clip_l(name: str = "text_encoder", kohya: tuple[str, ...] = ("lora_te1_", "lora_te_")) -> Component:
    """CLIP-L. kohya: `lora_te_` where it is the only encoder (SD1), `lora_te1_` where it is one of several."""
    return text_encoder(name, CLIP, _CLIP_L, kohya=kohya, onetrainer=kohya, clip="clip_l")


def clip_h() -> Component:
    """OpenCLIP-H, the encoder of SD2."""
    kohya = ("lora_te_", "lora_te1_")
    return text_encoder("text_encoder", CLIP, _CLIP_H, kohya=kohya, onetrainer=kohya, clip="clip_h", omi="clip_l")


def clip_g(kohya: tuple[str, ...] = ("lora_te2_", "lora_te_")) -> Component:
    """OpenCLIP-bigG, the second encoder of SDXL and SD3; the only one of the SDXL refiner."""
    return text_encoder("text_encoder_2", CLIP, _CLIP_G, kohya=kohya, onetrainer=kohya, clip="clip_g")


# ------------------------------------------------------------------------------------------------------------------------- T5

_T5_ATTENTION = "encoder.block.{n}.layer.0"
_T5_FEED_FORWARD = "encoder.block.{n}.layer.1"

_T5_ROWS = (
    embedding("shared", "shared", "vocab", "h"),  # tied to encoder.embed_tokens
    embedding("encoder.embed_tokens", "encoder.embed_tokens", "vocab", "h"),
    *(_same(f"{_T5_ATTENTION}.SelfAttention.{name}", "inner", "h") for name in "qkv"),
    _same(f"{_T5_ATTENTION}.SelfAttention.o", "h", "inner"),
    embedding(  # T5 has it in block 0 only, UMT5 in all
        f"{_T5_ATTENTION}.SelfAttention.relative_attention_bias",
        f"{_T5_ATTENTION}.SelfAttention.relative_attention_bias",
        "buckets",
        "heads",
    ),
    norm(f"{_T5_ATTENTION}.layer_norm", f"{_T5_ATTENTION}.layer_norm", "h"),
    _same(f"{_T5_FEED_FORWARD}.DenseReluDense.wi_0", "mlp", "h"),
    _same(f"{_T5_FEED_FORWARD}.DenseReluDense.wi_1", "mlp", "h"),
    _same(f"{_T5_FEED_FORWARD}.DenseReluDense.wo", "h", "mlp"),
    norm(f"{_T5_FEED_FORWARD}.layer_norm", f"{_T5_FEED_FORWARD}.layer_norm", "h"),
    norm("encoder.final_layer_norm", "encoder.final_layer_norm", "h"),
)

T5 = Table("t5", _T5_ROWS, {"n": 24})

_T5_XXL = {"h": 4096, "mlp": 10240, "inner": 4096, "n": 24}  # UMT5-XXL has the same


def t5(name: str, kohya: tuple[str, ...], onetrainer: tuple[str, ...] | None = None, *, clip: str = "t5xxl", omi: str = "t5") -> Component:
    """T5-XXL or UMT5-XXL. kohya and onetrainer number it differently: `lora_te3_` and `lora_te2_` on Flux.1."""
    return text_encoder(name, T5, _T5_XXL, kohya=kohya, onetrainer=onetrainer or kohya, clip=clip, omi=omi)


# ----------------------------------------------------------------------------------------------------------------------- LLMs

_LLM_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",  # Gemma 2
    "post_feedforward_layernorm",
)

_LLM_ROWS = (
    embedding("embed_tokens", "embed_tokens", "vocab", "h"),
    _same("layers.{n}.self_attn.q_proj", "q", "h"),
    _same("layers.{n}.self_attn.k_proj", "kv", "h"),
    _same("layers.{n}.self_attn.v_proj", "kv", "h"),
    _same("layers.{n}.self_attn.o_proj", "h", "q"),
    _same("layers.{n}.mlp.gate_proj", "mlp", "h"),
    _same("layers.{n}.mlp.up_proj", "mlp", "h"),
    _same("layers.{n}.mlp.down_proj", "h", "mlp"),
    *(norm(f"layers.{{n}}.self_attn.{name}", f"layers.{{n}}.self_attn.{name}", "head") for name in ("q_norm", "k_norm")),  # Qwen 3
    *(norm(f"layers.{{n}}.{name}", f"layers.{{n}}.{name}", "h") for name in _LLM_NORMS),
    norm("norm", "norm", "h"),
)

LLM = Table("llm", _LLM_ROWS, {"n": 40}, {"causal-lm": renamed(_LLM_ROWS, r"^", "model.")})  # *ForCausalLM

LLM_WIDTHS = {
    "gemma2_2b": {"h": 2304, "mlp": 9216, "q": 2048, "kv": 1024, "n": 26},
    "llama": {"h": 4096, "mlp": 14336, "q": 4096, "kv": 1024, "n": 32},
    "qwen25_7b": {"h": 3584, "mlp": 18944, "q": 3584, "kv": 512, "n": 28},
    "qwen3_4b": {"h": 2560, "mlp": 9728, "q": 4096, "kv": 1024, "n": 36},
}


def language_model(
    clip: str, name: str = "text_encoder", kohya: tuple[str, ...] = ("lora_te_", "lora_te1_"), onetrainer: tuple[str, ...] = ()
) -> Component:
    """A decoder-only language model whose hidden states condition the denoiser. clip: ComfyUI's name of it."""
    return text_encoder(name, LLM, LLM_WIDTHS.get(clip, {}), kohya=kohya, onetrainer=onetrainer or kohya, clip=clip)
