"""The recipe: every choice that decides which numbers a checkpoint holds."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

GROUP_SIZE = 128
"""The only level-2 group size; the packed kernels read no other."""

ZeroDomain = Literal["pre_scale", "post_scale"]
KeyRotation = Literal["none", "hadamard"]
"""What queries and keys are multiplied by after RoPE, head by head, before keys are quantized."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SmoothAttention(_Frozen):
    """SmoothAttention (QServe paper, section 4.2): keys / lambda, queries * lambda, so that keys quantize well.

    lambda = absmax(K)^alpha / absmax(Q)^beta for each channel of a KV head, one for both channels of a RoPE pair.
    `fixed` uses `alpha` and `beta` as given. `search` tries each of `alphas` with beta = 1 - alpha, and each KV head
    takes the one whose 4-bit keys change the attention output least: with alpha + beta = 1 any outlier in the keys that
    the queries undo cancels exactly.
    """

    mode: Literal["fixed", "search"] = "search"
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    beta: float = Field(0.0, ge=0.0, le=1.0)
    alphas: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)
    search_tokens: int = Field(8192, ge=1, description="calibration tokens the search looks at")

    @model_validator(mode="after")
    def _check_alphas(self) -> SmoothAttention:
        if not self.alphas or not all(0.0 <= a <= 1.0 for a in self.alphas):
            raise ValueError(f"alphas must be one or more numbers in [0, 1], got {list(self.alphas)}")
        return self


class OutputSmoothing(_Frozen):
    """Smoothing of down_proj's input (QServe paper, section 4.3.2): inputs / lambda, weight columns * lambda.

    lambda = absmax(input)^alpha / absmax(weight column)^beta. `fixed` uses `alpha` and `beta` as given. `search` takes
    the one of `alphas`, with beta = 1 - alpha, or none, that changes the product of quantized inputs and weights least.
    """

    mode: Literal["fixed", "search"] = "search"
    alpha: float = Field(0.3, ge=0.0, le=1.0)
    beta: float = Field(0.7, ge=0.0, le=1.0)
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    search_tokens: int = Field(2048, ge=1, description="calibration tokens the search looks at")

    @model_validator(mode="after")
    def _check_alphas(self) -> OutputSmoothing:
        if not self.alphas or not all(0.0 <= a <= 1.0 for a in self.alphas):
            raise ValueError(f"alphas must be one or more numbers in [0, 1], got {list(self.alphas)}")
        return self


class Gptq(_Frozen):
    """GPTQ (Frantar et al., 2022), on inputs as the quantized linears before leave them.

    `damping` times the mean of diag(H) is added to the diagonal of H; "auto" takes more for fewer calibration tokens.
    `target`: what a linear's outputs are to be close to. "served" takes its own outputs before it is rounded, on the
    inputs it is served; "exact" those of the 16-bit model, so that linears make up for what the ones before them lost.
    """

    damping: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto"] = 0.01
    target: Literal["served", "exact"] = "served"


class Tuning(_Frozen):
    """Gradient descent on the codes and level-1 scales of each block, towards its output in the 16-bit model.

    `steps` of Adam on `tokens` calibration tokens each. The rates, of codes (in codes a step) and scales (relative),
    fall to zero. GPTQ comes first, with the target "exact".
    """

    steps: int = Field(100, ge=1)
    tokens: int = Field(4096, ge=1)
    code_rate: float = Field(0.005, gt=0.0, le=1.0)
    scale_rate: float = Field(0.002, gt=0.0, le=0.1)


class Calibration(_Frozen):
    """What text the observations are made on: `samples` windows of `seq_len` tokens."""

    dataset: str = "pileval"
    samples: int = Field(128, ge=1)
    seq_len: int = Field(1024, ge=16)
    seed: int = 0


class Recipe(_Frozen):
    """How a model becomes a W4A8KV4 checkpoint.

    `group_size` is 128 (progressive: int8 per channel, then uint4 per group) or None (uint4 per channel).
    `zero_domain`: zeros of a group are whole in codes ("pre_scale") or, finer, in level-1 units ("post_scale").
    `symmetric`: the zero of every group is code 8, so that weights are int4 times a scale: less exact, and what servers
    without zeros ask for.
    `rounding` is "rtn", to nearest, or "gptq", as the settings of that name say. A transform that is None is not
    applied. `rotation`: norm gains are folded into the linears that follow, and hidden states and values rotated.
    `reorder`: inputs of down_proj are sorted by their absmax, so that those of a group are alike.
    `align_keys`: RoPE pairs of keys are turned so that their mean lies on the diagonal, which narrows the range of a
    head; not in families whose keys have norms of their own.
    `key_rotation`: "hadamard" rotates queries and keys after RoPE, while the model runs, so that a quantized key cache
    loses less to outlier channels. Only a runtime that rotates (qoq's own) can serve such a checkpoint; any can "none",
    which a checkpoint with a cache of 16 bits always says.
    `tuning`: codes and scales of a block are tuned together after GPTQ.
    `grid`: level-2 scales and zeros (level 1 per channel) from the range of the weights, or searched for the least
    error.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    group_size: Literal[128] | None = 128
    zero_domain: ZeroDomain = "pre_scale"
    symmetric: bool = False
    rounding: Literal["rtn", "gptq"] = "rtn"
    gptq: Gptq = Gptq()
    tuning: Tuning | None = None
    grid: Literal["range", "search"] = "range"
    act_bits: Literal[8, 16] = 8
    kv_bits: Literal[4, 8, 16] = 4
    rotation: Literal["hadamard"] | None = None
    smooth_output: OutputSmoothing | None = None
    reorder: Literal["absmax"] | None = None
    align_keys: Literal["mean"] | None = None
    smooth_attention: SmoothAttention | None = None
    key_rotation: KeyRotation = "none"
    calibration: Calibration = Calibration()
    include: tuple[str, ...] = Field((), description="regular expressions: only linears that match one are quantized")
    ignore: tuple[str, ...] = Field((), description="regular expressions: linears that match one stay in 16 bit")

    @field_validator("include", "ignore")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
        return patterns

    @model_validator(mode="after")
    def _check_zeros(self) -> Recipe:
        if self.zero_domain == "post_scale" and self.group_size is None:
            raise ValueError("zero_domain post_scale needs groups: group_size is 128")
        if self.symmetric and (self.zero_domain != "pre_scale" or self.group_size is None):
            raise ValueError("symmetric needs groups, and zeros that are codes: group_size 128, zero_domain pre_scale")
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Recipe:
        if self.tuning is not None and (self.rounding != "gptq" or self.gptq.target != "exact"):
            raise ValueError("tuning needs rounding gptq with the target exact: it starts there, and has the same aim")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Recipe:
        if self.align_keys is not None and self.key_rotation != "none":
            raise ValueError("align_keys and key_rotation exclude each other: rotated, an aligned mean is an outlier")
        return self

    @property
    def scheme(self) -> str:
        """The short form used in folder names, such as `w4a8kv4-g128`."""
        weights = "g128" if self.group_size else "per-channel"
        return f"w4a{self.act_bits}kv{self.kv_bits}-{weights}"
