"""Qwen2 and Qwen2.5: biases on q, k and v."""

from qoq.recipes.families.family import Family

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    key_fold="projections",
    gguf_arch="qwen2",
    gguf_permuted=False,
)
