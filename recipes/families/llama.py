"""Llama 2 and 3, SmolLM2, Yi and others of the same shape."""

from qoq.recipes.families.family import Family

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    key_fold="projections",
    gguf_arch="llama",
    gguf_permuted=True,
)
