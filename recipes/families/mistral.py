"""Mistral 7B: Llama with sliding windows in its first version."""

from qoq.recipes.families.family import Family

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    key_fold="projections",
    gguf_arch="llama",
    gguf_permuted=True,
)
