"""The paper's architecture (Sec. 5.1) as a layout, and its Table 2 as printed."""

from __future__ import annotations

from sparkling_cli.layout.model import AxisInfo, ModelLayout, TensorPattern

LAYER = "model.layers.{layers}."
EXPERT = LAYER + "mlp.experts.{experts}."

PAPER_LAYOUT = ModelLayout(
    name="paper",
    axes={
        "layers": AxisInfo(24),
        "hidden": AxisInfo(1024, widenable=True),
        "ffn": AxisInfo(512, widenable=True),
        "q_per_kv": AxisInfo(4),
        "kv_heads": AxisInfo(4),
        "head_dim": AxisInfo(96),
        "experts": AxisInfo(64),
        "vocab": AxisInfo(50304),
    },
    tensors=tuple(
        TensorPattern(name, layout)
        for name, layout in {
            "model.embed_tokens.weight": "vocab -> hidden",
            LAYER + "input_layernorm.weight": "scale hidden",
            LAYER + "self_attn.q_proj.weight": "(kv_heads q_per_kv head_dim) <- hidden",
            LAYER + "self_attn.k_proj.weight": "(kv_heads head_dim) <- hidden",
            LAYER + "self_attn.v_proj.weight": "(kv_heads head_dim) <- hidden",
            LAYER + "self_attn.o_proj.weight": "hidden <- (kv_heads q_per_kv head_dim)",
            LAYER + "self_attn.q_norm.weight": "scale head_dim",
            LAYER + "self_attn.k_norm.weight": "scale head_dim",
            LAYER + "post_attention_layernorm.weight": "scale hidden",
            LAYER + "mlp.gate.weight": "experts <- hidden",
            EXPERT + "gate_proj.weight": "ffn <- hidden",
            EXPERT + "up_proj.weight": "ffn <- hidden",
            EXPERT + "down_proj.weight": "hidden <- ffn",
            "model.norm.weight": "scale hidden",
            "lm_head.weight": "vocab <- hidden",
        }.items()
    ),
    config={},
    tied=(("model.embed_tokens.weight", "lm_head.weight"),),
)

#: axes doubled -> (active, total) parameters, as printed.
TABLE_2_PARAMETERS = {
    (): ("450M", "2.56B"),
    ("ffn",): ("751M", "5B"),
    ("hidden",): ("900M", "5.13B"),
    ("ffn", "hidden"): ("1.5B", "9.96B"),
}

#: axes doubled -> (FLOPs from scratch, progressive, in units of 1e20; share saved), as printed.
TABLE_2_FLOPS = {
    ("ffn",): (9.01, 7.21, 0.20),
    ("hidden",): (10.80, 8.10, 0.25),
    ("ffn", "hidden"): (18.00, 11.70, 0.35),
}
