"""Checkpoints that the runtime is tested on, and the oracle: transformers with the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qoq.formats.manifest import MANIFEST_NAME, describe_files, write_manifest
from qoq.kernels.hf import set_kv_bits
from qoq.kernels.loading import load_model
from tests.kernels.hf_cases import PADDED, SHARED, VOCABULARY, write_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], int | None]] = {
    "llama": (lambda: LlamaConfig(**SHARED), 128),
    "llama3 rope, tied": (
        lambda: LlamaConfig(**{**SHARED, "tie_word_embeddings": True}, rope_parameters=LLAMA3_ROPE),
        128,
    ),
    "yarn": (lambda: LlamaConfig(**SHARED, rope_parameters=YARN_ROPE), None),
    "linear rope, biases": (
        lambda: LlamaConfig(**SHARED, rope_parameters=LINEAR_ROPE, attention_bias=True, mlp_bias=True),
        128,
    ),
    "qwen2": (lambda: Qwen2Config(**{**SHARED, "tie_word_embeddings": True}), None),
    "qwen2, windows": (
        lambda: Qwen2Config(**SHARED, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        128,
    ),
    "qwen3": (lambda: Qwen3Config(**{**SHARED, **PADDED}), 128),
    "mistral": (lambda: MistralConfig(**{**SHARED, **PADDED, "sliding_window": 8}), None),
}


def write_complete(folder: Path, name: str, **overrides: Any) -> Path:
    """A checkpoint of MODELS with its manifest."""
    write_model(folder, *MODELS[name], **overrides)
    files = [path.name for path in folder.iterdir() if path.name != MANIFEST_NAME]
    write_manifest(folder, {"files": describe_files(folder, files)})
    return folder


def random_prompts(lens: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (length,), generator=random).tolist() for length in lens]


@contextmanager
def exact_attention() -> Iterator[None]:
    """transformers' sdpa with sums in float64, as the reference cache of the runtime has them.

    In float32 the order of sums, which depends on how many tokens go through at once, turns the last bit of a value
    now and then, and with it an int8 code: the same model twice, but not the same numbers.
    """
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        output, weights = original(module, query.double(), key.double(), value.double(), mask, **kwargs)
        return output.to(query.dtype), weights

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", original)


class Oracle:
    """transformers on the CPU in float32, one prompt at a time."""

    def __init__(self, folder: Path, kv_bits: int | None = None) -> None:
        self.model: Any = load_model(folder)
        if kv_bits is not None:
            set_kv_bits(self.model, kv_bits)

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` tokens after the prompt, each the likeliest."""
        with torch.inference_mode(), exact_attention():
            tokens = self.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(tokens[0, len(prompt) :].tolist())

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[L, V] of a text."""
        with torch.inference_mode(), exact_attention():
            logits: Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits

    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """By how much each token of the answer is less likely than the likeliest there, in logits, with PyTorch's own
        float32 attention: 0 for a greedy answer, small for a tie."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return logits.amax(-1) - logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
