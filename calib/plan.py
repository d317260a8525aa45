"""The plan of a run: every problem of every tensor found from headers alone, before any work."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import PretrainedConfig

from qoq.calib.rotation import rotated
from qoq.calib.skeleton import Skeleton, build_skeleton, load_config
from qoq.formats.checkpoint import is_checkpoint, read_config
from qoq.formats.packing import packed_shapes, padded_in_features
from qoq.formats.quantization_config import KEPT_ALWAYS, QuantizationConfig
from qoq.formats.safetensors_file import TensorInfo
from qoq.formats.sources import TensorSource, is_gguf, open_source
from qoq.formats.writer import ShardPlan, plan_shards
from qoq.recipes.errors import InputError, raise_problems
from qoq.recipes.families import Family, family_of
from qoq.recipes.schema import Recipe

KeptDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked for. `model` is a folder or a .gguf file; `model_name` is how reports call it; `strict` stops
    where a linear would fall back on a simpler method."""

    model: Path
    model_name: str
    output: Path
    recipe: Recipe
    revision: str | None = None
    device: str = "cpu"
    kept_dtype: KeptDtype = "float16"
    max_shard_bytes: int = 5_000_000_000
    trust_remote_code: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes and operations a run needs, from sizes alone.

    block         one float32 block, and with GPTQ the moments of the inputs of a linear, or what its tuning keeps
    hidden        calibration hidden states, float32, of every stream
    decoded       the block's quantized linears, int8, and the temporaries of rounding its largest linear
    activations   the widest temporary of a forward pass over one batch
    embedding     the embedding table while it is read and converted
    checkpoint    the finished files; `state` is what the resume state adds while running
    operations    multiply-adds times two, over all passes
    """

    block: int
    hidden: int
    decoded: int
    activations: int
    embedding: int
    checkpoint: int
    state: int
    operations: float

    @property
    def memory(self) -> int:
        """Peak bytes of tensors: the embedding step, or a block with its calibration states."""
        return self.hidden + max(self.embedding, self.block + self.decoded + self.activations)

    @property
    def disk(self) -> int:
        return self.checkpoint + self.state


@dataclass(frozen=True)
class Plan:
    """A checked request: what is read, what is computed, what is written. `model_bytes`: of the model in 16 bit."""

    request: QuantizeRequest
    skeleton: Skeleton
    source: TensorSource
    quantized: Mapping[str, torch.nn.Linear]
    config: QuantizationConfig
    shards: tuple[ShardPlan, ...]
    estimate: Estimate
    model_bytes: int
    warnings: tuple[str, ...]

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.float16 if self.request.kept_dtype == "float16" else torch.bfloat16

    @property
    def streams(self) -> int:
        """Streams of hidden states: of the served model, and where the recipe compares with it, of the float model."""
        return _streams(self.request.recipe)

    def fingerprint(self, calibration: str, source_hashes: Mapping[str, str], tool_version: str) -> str:
        """What must be the same for an unfinished run to be continued."""
        parts = {
            "qoq": tool_version,
            # The text is told by its tokens, wherever its file lies.
            "recipe": self.request.recipe.model_dump(mode="json", exclude={"calibration": {"dataset"}}),
            "source": dict(source_hashes),
            "calibration": calibration,
            "kept_dtype": self.request.kept_dtype,
            "device": torch.device(self.request.device).type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shards": [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_model(path: Path, *, trust_remote_code: bool = False) -> tuple[Skeleton, TensorSource]:
    """Open a 16-bit model: its skeleton and its tensors, names and shapes checked against each other.

    Raises InputError that lists every missing, misshapen or unexpected tensor.
    """
    if not is_gguf(path):
        _refuse_quantized(path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    family = family_of(config.model_type, tuple(config.architectures or ()))
    source = open_source(path, family)
    names = set(source.names())
    if is_gguf(path):
        _refuse_unread_rope(path, config)
        config.tie_word_embeddings = f"{family.lm_head}.weight" not in names
        config.architectures = [family.architecture]
    elif config.tie_word_embeddings and _has_own_head(source, family):
        config.tie_word_embeddings = False
    skeleton = build_skeleton(config, where=str(path))
    problems = []
    for name, shape in skeleton.tensor_shapes().items():
        if name not in names:
            problems.append(f"{name}: missing")
            continue
        info = source.info(name)
        if info.shape != shape:
            problems.append(f"{name}: shape {list(info.shape)}, the configuration says {list(shape)}")
        elif not info.dtype.is_floating_point:
            problems.append(f"{name}: {info.dtype}, expected floating point")
    problems += [f"{name}: the configuration does not know it" for name in _unexpected(skeleton, names, inside=True)]
    raise_problems(
        f"{path}: the weights do not fit the configuration",
        problems,
        remedy="download config.json and weights together",
    )
    return skeleton, source


def make_plan(request: QuantizeRequest) -> Plan:
    """Check a request against the model's headers and work out what a run takes. Touches nothing on disk."""
    skeleton, source = open_model(request.model, trust_remote_code=request.trust_remote_code)
    recipe = request.recipe
    extra = _unexpected(skeleton, set(source.names()), inside=False)
    model_bytes = 2 * sum(math.prod(shape) for shape in skeleton.tensor_shapes().values())
    if recipe.rotation is not None:
        skeleton, source = rotated(skeleton, source, request.device)
    all_linears = skeleton.all_linears()
    quantized = _choose(all_linears, recipe)
    kept = [name for name in all_linears if name not in quantized]
    config = QuantizationConfig(
        group_size=recipe.group_size,
        act_bits=recipe.act_bits,
        kv_bits=recipe.kv_bits,
        zero_domain=recipe.zero_domain,
        norms_folded=recipe.rotation is not None,
        key_rotation="none" if recipe.kv_bits == 16 else recipe.key_rotation,  # any runtime serves "none"
        padded={
            name: linear.in_features
            for name, linear in quantized.items()
            if linear.in_features != padded_in_features(linear.in_features)
        },
        modules_to_not_convert=(KEPT_ALWAYS, *kept),
    )
    dtype = torch.float16 if request.kept_dtype == "float16" else torch.bfloat16
    progressive = recipe.group_size is not None
    tensors = output_tensors(skeleton, quantized, progressive=progressive, dtype=dtype)
    shards = plan_shards(tensors, request.max_shard_bytes)
    warnings = [f"tensor {name} is not part of the model and is left out" for name in extra]
    return Plan(
        request=request,
        skeleton=skeleton,
        source=source,
        quantized=quantized,
        config=config,
        shards=shards,
        estimate=_estimate(skeleton, source, quantized, shards, recipe),
        model_bytes=model_bytes,
        warnings=tuple(warnings),
    )


def _has_own_head(source: TensorSource, family: Family) -> bool:
    """Whether the files hold an lm_head of their own although the configuration ties it; transformers unties it too."""
    head, embedding = f"{family.lm_head}.weight", f"{family.embedding}.weight"
    if not {head, embedding} <= set(source.names()) or source.info(head) != source.info(embedding):
        return False
    return not torch.equal(source.load(head), source.load(embedding))


def _refuse_quantized(path: Path) -> None:
    if not (path / "config.json").is_file():
        return
    if is_checkpoint(path):
        raise InputError(f"{path}: already a qoq checkpoint", remedy="pass the 16-bit model it was made from")
    quantization = read_config(path).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"{path}: already quantized ({method})", remedy="pass the 16-bit model it was made from")


def _refuse_unread_rope(path: Path, config: PretrainedConfig) -> None:
    """Refuse a GGUF file whose RoPE is scaled in a way that transformers does not read from such files."""
    from qoq.formats.gguf_header import read_gguf_header

    header = read_gguf_header(path)
    scaling = header.metadata.get(f"{header.metadata.get('general.architecture')}.rope.scaling.type", "none")
    scaled_by = [name for name in ("rope_freqs.weight",) if name in header.tensors]
    scaled_by += [] if scaling == "none" else [f"rope.scaling.type {scaling}"]
    if scaled_by and config.rope_parameters["rope_type"] == "default":
        raise InputError(
            f"{path}: the RoPE of this model is scaled ({', '.join(scaled_by)}), which is not read from GGUF files",
            remedy="pass the model's safetensors",
        )


def _unexpected(skeleton: Skeleton, names: set[str], *, inside: bool) -> list[str]:
    """Source tensors the model does not have, inside its blocks (an error: they would be ignored) or elsewhere."""
    known = set(skeleton.model.state_dict())
    prefix = f"{skeleton.family.blocks}."
    extra = [name for name in names - known if not name.endswith("rotary_emb.inv_freq")]
    return sorted(name for name in extra if name.startswith(prefix) == inside)


def _choose(linears: Mapping[str, torch.nn.Linear], recipe: Recipe) -> dict[str, torch.nn.Linear]:
    """Linears that the recipe's `include` and `ignore` leave for quantization."""

    def matching(patterns: tuple[str, ...], key: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for name in linears if re.search(pattern, name)}
            if not hits:
                some = ", ".join(list(linears)[:3])
                raise InputError(
                    f"--{key} {pattern!r} matches no linear of the model", remedy=f"names look like {some}"
                )
            found |= hits
        return found

    included = matching(recipe.include, "include") if recipe.include else set(linears)
    ignored = matching(recipe.ignore, "ignore")
    return {name: linear for name, linear in linears.items() if name in included and name not in ignored}


def output_tensors(
    skeleton: Skeleton, quantized: Mapping[str, torch.nn.Linear], *, progressive: bool, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint in the order it is written; `dtype` is that of what stays in 16 bit."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape in skeleton.tensor_shapes().items():
        owner, _, part = name.rpartition(".")
        if owner not in quantized:
            tensors[name] = TensorInfo(dtype, shape)
        elif part == "weight":
            linear = quantized[owner]
            shapes = packed_shapes(
                linear.out_features,
                linear.in_features,
                progressive=progressive,
                has_bias=linear.bias is not None,
            )
            tensors |= {f"{owner}.{piece}": TensorInfo(kind, size) for piece, (kind, size) in shapes.items()}
    return tensors


def _estimate(
    skeleton: Skeleton,
    source: TensorSource,
    quantized: Mapping[str, torch.nn.Linear],
    shards: tuple[ShardPlan, ...],
    recipe: Recipe,
) -> Estimate:
    calibration = recipe.calibration
    tokens = calibration.samples * calibration.seq_len
    linears = skeleton.linears(0)
    weights = sum(linear.weight.numel() for linear in linears.values())
    largest = max(linear.weight.numel() for linear in linears.values())
    widest = max(linear.out_features for linear in linears.values())
    batch_tokens = max(calibration.seq_len, 2048)
    embedding = skeleton.vocab_size * skeleton.hidden_size
    stored = source.info(f"{skeleton.family.embedding}.weight").dtype.itemsize
    streams = _streams(recipe)
    hidden = streams * tokens * skeleton.hidden_size * 4
    # Passes over a block, times two for what is not a matrix product: measured on small models, CPU and GPU.
    passes = 1.5 + (1.0 if recipe.smooth_attention or recipe.align_keys else 0.0)
    passes += 1.0 if recipe.smooth_output or recipe.reorder else 0.0
    moments, other = 0, 0.0
    if recipe.rounding == "gptq":
        # As far as the inputs of each linear, and a float block to compare with.
        passes += 1.3 * streams + (streams - 1)
        inputs = [linears[roles[0]].in_features for roles in _shared(skeleton)]
        # Sums in float64; three matrices come and go while the largest is factored into one of float32.
        moments = (8 * streams + 4 + 3 * 8) * max(inputs) ** 2
        # The products of the inputs, two factorings and an inversion in float64, and the updates.
        other = sum(2.0 * tokens * k * k * streams + 8.0 * k**3 for k in inputs)
        other += sum(2.0 * linear.weight.numel() * linear.in_features for linear in linears.values())
    activations = batch_tokens * widest * 4 * 4
    tuned = 0
    if recipe.tuning is not None:
        step = max(recipe.tuning.tokens, calibration.seq_len)
        passes += 3.0 * recipe.tuning.steps * step / tokens
        # Positions, gradients and two averages of them; what is kept of a pass until the gradients come back.
        tuned = 7 * 4 * weights
        kept = 3 * sum(one.in_features + one.out_features for one in linears.values())
        kept += 3 * skeleton.num_heads * calibration.seq_len  # attention keeps scores and probabilities
        activations = max(activations, 4 * step * kept)
    operations = 2 * passes * 2.0 * weights * tokens + other
    return Estimate(
        block=weights * 4 + max(moments, tuned),
        hidden=hidden,
        decoded=weights + largest * 4 * 4,
        activations=activations,
        embedding=embedding * (stored + 4),
        checkpoint=sum(shard.nbytes for shard in shards),
        state=hidden * 2,
        operations=operations * skeleton.num_blocks if quantized else 0.0,
    )


def _streams(recipe: Recipe) -> int:
    return 2 if recipe.rounding == "gptq" and recipe.gptq.target == "exact" else 1


def _shared(skeleton: Skeleton) -> list[tuple[str, ...]]:
    """Full names of the linears of block 0 that multiply the same input."""
    family = skeleton.family
    prefix = family.block_prefix(0)
    return [tuple(prefix + family.roles[role] for role in roles) for roles in family.shared_inputs]
