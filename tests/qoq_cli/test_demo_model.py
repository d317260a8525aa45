"""The embedded model: it models English, its keys have outliers, and putting outliers in changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import qoq_cli.demo
from qoq_cli.demo.outliers import inject_key_outliers, inject_norm_outliers, make_tiny_outlier

TINY = Path(qoq_cli.demo.__file__).parent / "tiny"
FACTOR, PAIRS, SEED = 8.0, 2, 0  # what make_tiny was run with
WINDOW, WINDOWS = 512, 12
KeyValueHook = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> Tensor:
    """Windows [S, L] evenly spaced over the evaluation text, so that both sources are among them."""
    every = cut(tokenizer, "evaluation.txt")
    return every[:: len(every) // WINDOWS][:WINDOWS]


@pytest.fixture
def attend(tiny: Any) -> Iterator[Callable[[KeyValueHook], None]]:
    """Sets what happens to keys after RoPE and values, each [B, H, L, D], before they are attended to."""

    def set_hook(hook: KeyValueHook) -> None:
        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: Any
        ) -> tuple[Tensor, None]:
            return sdpa_attention_forward(module, query, *hook(module.layer_idx, key, value), None, **options)

        AttentionInterface.register("qoq_demo_test", attention)
        tiny.set_attn_implementation("qoq_demo_test")

    weights = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    yield set_hook
    tiny.set_attn_implementation("sdpa")
    tiny.load_state_dict(weights)


def cut(tokenizer: Any, name: str) -> Tensor:
    ids = torch.tensor(tokenizer((TINY / name).read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    logits = model(windows).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def round_trip_4bit(x: Tensor) -> Tensor:
    """Asymmetric 4-bit quantization per token and head, written out plainly; x is [B, H, L, D]."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8)
    return ((x - low) / scale).round() * scale + low


def without_key_outliers(model: Any) -> dict[str, Tensor]:
    return scale_keys(model, model.state_dict(), 1 / FACTOR)


def scale_keys(model: Any, tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    config = model.config
    return inject_key_outliers(
        tensors,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        factor=factor,
        pairs_per_head=PAIRS,
        seed=SEED,
    )


def test_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(sizes) == {
        "PROVENANCE.md",
        "calibration.txt",
        "config.json",
        "evaluation.txt",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 5e6 < sum(sizes.values()) < 11e6
    assert 150_000 < sizes["calibration.txt"] < 300_000
    assert 60_000 < sizes["evaluation.txt"] < 100_000


def test_evaluation_text_is_not_calibration_text() -> None:
    calibration, evaluation = (
        set((TINY / name).read_text(encoding="utf-8").strip().split("\n\n"))
        for name in ("calibration.txt", "evaluation.txt")
    )
    assert not calibration & evaluation


def test_tokenizer_round_trips_and_starts_with_bos(tokenizer: Any) -> None:
    text = "In the beginning\n\n:naïve: adj. “€ 5” → \t{hacker}"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 4096


def test_weights_are_fp16_and_the_shapes_suit_the_kernels(tiny: Any) -> None:
    stored = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    assert stored.dtype == torch.float16
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    assert all(torch.isfinite(p).all() for p in stored.parameters())
    config = tiny.config
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.hidden_size % 128 == 0
    assert config.intermediate_size % 128 == 0


def test_tiny_models_english_far_better_than_token_frequencies(tiny: Any, tokenizer: Any, windows: Tensor) -> None:
    counts = torch.bincount(cut(tokenizer, "calibration.txt").flatten(), minlength=len(tokenizer)) + 1
    unigram = math.exp(-(counts / counts.sum()).log()[windows[:, 1:]].mean().item())
    model = perplexity(tiny, windows)
    assert unigram > 300
    assert model < unigram / 10


def test_every_kv_head_has_outlier_channels_after_rope(
    tiny: Any, windows: Tensor, attend: Callable[[KeyValueHook], None]
) -> None:
    ratios: dict[int, list[float]] = {}

    def measure(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        channels = key.abs().amax(dim=(0, 2))  # [H, D]
        ratios[layer] = (channels.amax(1) / channels.median(1).values).tolist()
        return key, value

    attend(measure)
    perplexity(tiny, windows[:4])
    assert len(ratios) == tiny.config.num_hidden_layers
    assert min(min(heads) for heads in ratios.values()) > 6


def test_outliers_are_what_makes_a_4bit_cache_hard(
    tiny: Any, windows: Tensor, attend: Callable[[KeyValueHook], None]
) -> None:
    exact = perplexity(tiny, windows)
    attend(lambda _layer, key, value: (round_trip_4bit(key), round_trip_4bit(value)))
    assert perplexity(tiny, windows) > 1.25 * exact
    tiny.load_state_dict(without_key_outliers(tiny))
    assert perplexity(tiny, windows) < 1.05 * exact


def biased_llama() -> Any:
    """A model with every kind of tensor that the rescaling must reach: biases, and gains other than one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            attention_bias=True,
            mlp_bias=True,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize("which", ["tiny", "biased"])
@pytest.mark.parametrize("kind", ["keys", "norms"])
def test_injection_preserves_the_logits_and_its_input(kind: str, which: str, tiny: Any) -> None:
    model = tiny if which == "tiny" else biased_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = dict(model.state_dict())
    if kind == "keys":
        after = scale_keys(model, given, 20.0)
    else:
        after = inject_norm_outliers(given, channels=3, factor=20.0, seed=1)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), f"{name} was changed in place"

    ids = torch.arange(40)[None] % model.config.vocab_size
    with torch.no_grad():
        expected = model(ids).logits
        model.load_state_dict(after)
        got = model(ids).logits
        model.load_state_dict(before)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_injection_is_repeatable_and_the_seed_matters(tiny: Any) -> None:
    def drawn(seed: int) -> Tensor:
        tensors = inject_norm_outliers(tiny.state_dict(), channels=4, factor=2.0, seed=seed)
        return tensors["model.layers.0.input_layernorm.weight"]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_injection_refuses_what_it_cannot_preserve(tiny: Any) -> None:
    tensors = dict(tiny.state_dict())
    with pytest.raises(ValueError, match="not a model of the Llama kind"):
        scale_keys(tiny, {"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, 2.0)
    with pytest.raises(ValueError, match="factor: expected a positive number"):
        scale_keys(tiny, tensors, 0.0)
    with pytest.raises(ValueError, match=r"channels: expected 0\.\.256"):
        inject_norm_outliers(tensors, channels=257, factor=2.0, seed=0)
    with pytest.raises(ValueError, match="k_norm"):
        scale_keys(tiny, tensors | {"model.layers.0.self_attn.k_norm.weight": torch.ones(64)}, 2.0)


def test_tiny_outlier_is_the_same_model_with_outliers_in_its_norms(
    tmp_path: Path, tiny: Any, tokenizer: Any, windows: Tensor
) -> None:
    folder = make_tiny_outlier(TINY, tmp_path / "tiny-outlier")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(folder)("a text")["input_ids"] == tokenizer("a text")["input_ids"]
    assert perplexity(model, windows[:4]) == pytest.approx(perplexity(tiny, windows[:4]), rel=1e-3)
    for mine, theirs in zip(model.model.layers, tiny.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gains = getattr(mine, norm).weight / getattr(theirs, norm).weight
            assert sorted(gains.tolist())[-5:] == pytest.approx([1, 32, 32, 32, 32])
