"""What a GEMM kernel is instantiated with, and what that takes of an SM: sizes of tiles, stages, shared memory.

`GemmTile` is for sm80/gemm.cu, which every architecture since Ampere runs. Hopper has three kernels of its own, that
read operands as `tiles` lays them out: `Sm90Tile` is for sm90/gemm.cu and many tokens, `SplitTile` for
sm90/gemm_split.cu, `DecodeTile` for sm90/gemm_decode.cu and few. Their specs are compiled for "sm_90a".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from qoq.kernels.compiler import KernelSpec
from qoq.recipes.schema import GROUP_SIZE

WeightFormat = Literal["g128", "per_channel", "int8"]
OutFormat = Literal["float16", "bfloat16", "int32"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("g128", "per_channel", "int8")
OUT_FORMATS: tuple[OutFormat, ...] = ("float16", "bfloat16", "int32")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100a", "sm_120a")
"""What the portable kernels are compiled for in continuous integration."""
HOPPER = "sm_90a"
"""What those of Hopper are compiled for."""

_SHARED_KIB = {"sm_80": 164, "sm_87": 164, "sm_90": 228, "sm_90a": 228, "sm_100a": 228, "sm_103a": 228}
_OTHER_SHARED_KIB = 100
_RESERVED_KIB = 1
"""Of the shared memory of an SM (CUDA programming guide, "Technical Specifications"), each block loses this much."""

WORKSPACE_SUMS_PER_SM = 36864
"""Sums (int32) of shared tiles that the workspace of the GEMMs holds for each SM: blocks_per_sm * block_n * block_m."""

_FEW_STAGES = 3
_STAGE_ALIGNMENT = 128
_STATIC_SHARED_BYTES = 128

_WGMMA_TOKENS = (8, 16, 32, 48, 64, 96, 128, 192, 256)
_WARPGROUP_CHANNELS = 64
_WEIGHT_BLOCK_BYTES: dict[WeightFormat, int] = {"g128": 4224, "per_channel": 4096, "int8": 8192}
_PIECE_TOKENS = 32
_KEEPS_REGISTERS = 128
"""Tokens up to which the registers of a block suffice as they are given out."""
_BARRIER_BYTES = 16
_FEWEST_STAGES = 2

_SPLITS = (1, 2, 4)
_SUMS_PADDING = 4

_DECODE_TOKENS = (8, 16, 24, 32)
_UNIT_CHANNELS = 16
_MOST_UNITS = 4


def shared_bytes_of_sm(architecture: str) -> int:
    """Shared memory of one SM, in bytes."""
    return _SHARED_KIB.get(architecture, _OTHER_SHARED_KIB) * 1024


def weight_block_bytes(weights: WeightFormat) -> int:
    """Of a block of 64 channels by 128 inputs, as Hopper's kernels read it."""
    return _WEIGHT_BLOCK_BYTES[weights]


@dataclass(frozen=True)
class GemmTile:
    """Template arguments of one instantiation of sm80/gemm.cu; see there."""

    block_n: int
    block_m: int
    warps_n: int
    warps_m: int
    stages: int
    blocks_per_sm: int
    groups: int = 1
    warps_k: int = 1

    def __post_init__(self) -> None:
        if self.blocks_per_sm * self.block_n * self.block_m > WORKSPACE_SUMS_PER_SM:
            raise ValueError(f"{self}: the workspace has {WORKSPACE_SUMS_PER_SM} sums for each SM")

    def stage_bytes(self, weights: WeightFormat) -> int:
        """Of `groups` times 128 inputs: weights, activations and, for g128, a scale and a zero byte a channel."""
        per_channel = {"g128": 66, "per_channel": 64, "int8": 128}[weights]
        size = (self.block_n * per_channel + self.block_m * GROUP_SIZE) * self.groups
        return -(-size // _STAGE_ALIGNMENT) * _STAGE_ALIGNMENT

    @property
    def partial_bytes(self) -> int:
        """Of the sums that warps add where they share K."""
        return 4 * self.block_n * self.block_m if self.warps_k > 1 else 0

    def resident(self, architecture: str, weights: WeightFormat) -> tuple[int, int]:
        """Blocks an SM holds, and stages each then has: fewer than asked for where shared memory is short."""
        wanted = min(self.stages, _FEW_STAGES)
        for blocks, least in [*((b, wanted) for b in range(self.blocks_per_sm, 0, -1)), (1, 2)]:
            room = shared_bytes_of_sm(architecture) // blocks - _RESERVED_KIB * 1024 - _STATIC_SHARED_BYTES
            stages = min(self.stages, (room - self.partial_bytes) // self.stage_bytes(weights))
            if stages >= least:
                return blocks, stages
        raise ValueError(f"{self} does not fit the shared memory of {architecture}")

    def spec(self, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
        """The instantiation for `architecture`."""
        return _gemm_spec(self, architecture, weights, out)


@cache
def _gemm_spec(tile: GemmTile, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
    blocks, stages = tile.resident(architecture, weights)
    defines = {
        "WEIGHT_FORMAT": WEIGHT_FORMATS.index(weights),
        "OUT_FORMAT": OUT_FORMATS.index(out),
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "WARPS_N": tile.warps_n,
        "WARPS_M": tile.warps_m,
        "STAGES": stages,
        "BLOCKS_PER_SM": blocks,
        "GROUPS": tile.groups,
        "WARPS_K": tile.warps_k,
    }
    threads = 32 * tile.warps_n * tile.warps_m * tile.warps_k
    shared = stages * tile.stage_bytes(weights) + tile.partial_bytes
    return KernelSpec("sm80/gemm.cu", "qoq_gemm_sm80", tuple(defines.items()), threads, shared)


@dataclass(frozen=True)
class Sm90Tile:
    """Template arguments of one instantiation of sm90/gemm.cu; see there."""

    tokens: int
    warpgroups: int
    stages: int
    blocks_per_sm: int

    def __post_init__(self) -> None:
        if self.tokens not in _WGMMA_TOKENS:
            raise ValueError(f"{self}: wgmma takes {_WGMMA_TOKENS} tokens")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"{self}: expected 1, 2 or 4 warpgroups")
        if self.blocks_per_sm * self.block_n * self.block_m > WORKSPACE_SUMS_PER_SM:
            raise ValueError(f"{self}: the workspace has {WORKSPACE_SUMS_PER_SM} sums for each SM")

    @property
    def groups(self) -> int:
        """Of 128 inputs in a stage; this kernel has one."""
        return 1

    @property
    def block_n(self) -> int:
        return _WARPGROUP_CHANNELS * self.warpgroups

    @property
    def block_m(self) -> int:
        return self.tokens

    @property
    def threads(self) -> int:
        """Warpgroups that multiply, and a warp that copies: a whole warpgroup where it has registers to give."""
        moves_registers = self.tokens > _KEEPS_REGISTERS and self.warpgroups > 1
        return 128 * self.warpgroups + (128 if moves_registers else 32)

    def stage_bytes(self, weights: WeightFormat) -> int:
        """Of 128 inputs: weights with their scales, and activations."""
        return self.warpgroups * _WEIGHT_BLOCK_BYTES[weights] + self.tokens * GROUP_SIZE

    @property
    def staging_bytes(self) -> int:
        """Of all warpgroups, for outputs on their way: one or two pieces, and eight bytes a token."""
        piece = (
            self.tokens if self.tokens < _PIECE_TOKENS else _PIECE_TOKENS // (2 if self.tokens % _PIECE_TOKENS else 1)
        )
        pieces = 1 if piece == self.tokens else 2
        return self.warpgroups * (pieces * piece * 2 * _WARPGROUP_CHANNELS + 8 * self.tokens)

    def resident(self, architecture: str, weights: WeightFormat) -> tuple[int, int]:
        """Blocks an SM holds, and stages each then has: fewer than asked for where shared memory is short."""
        room = shared_bytes_of_sm(architecture) // self.blocks_per_sm - _RESERVED_KIB * 1024 - _STATIC_SHARED_BYTES
        stages = min(self.stages, (room - self.staging_bytes) // (self.stage_bytes(weights) + _BARRIER_BYTES))
        if stages < _FEWEST_STAGES:
            raise ValueError(f"{self} does not fit the shared memory of {architecture}")
        return self.blocks_per_sm, stages

    def spec(self, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
        """The instantiation for `architecture`, which is HOPPER."""
        _, stages = self.resident(architecture, weights)
        defines = {
            "WEIGHT_FORMAT": WEIGHT_FORMATS.index(weights),
            "OUT_FORMAT": OUT_FORMATS.index(out),
            "TOKENS": self.tokens,
            "GROUPS": self.warpgroups,
            "STAGES": stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }
        shared = stages * (self.stage_bytes(weights) + _BARRIER_BYTES)
        shared += 0 if out == "int32" else self.staging_bytes
        return KernelSpec("sm90/gemm.cu", "qoq_gemm_sm90", tuple(defines.items()), self.threads, shared)


@dataclass(frozen=True)
class DecodeTile:
    """Template arguments of one instantiation of sm90/gemm_decode.cu, for 4-bit weights; see there."""

    tokens: int
    units: int
    warps: int
    stages: int
    cluster: int
    blocks_per_sm: int

    def __post_init__(self) -> None:
        if self.tokens not in _DECODE_TOKENS:
            raise ValueError(f"{self}: expected one of {_DECODE_TOKENS} tokens")
        if not 1 <= self.units <= _MOST_UNITS or self.cluster not in (1, 2):
            raise ValueError(f"{self}: expected 1 to {_MOST_UNITS} units and a cluster of 1 or 2")
        if self.tokens * 4 * (self.block_n + _SUMS_PADDING) > self.stages * self.units * (_UNIT_CHANNELS * 64):
            raise ValueError(f"{self}: the sums of a warp do not fit its ring")

    @property
    def block_n(self) -> int:
        return _UNIT_CHANNELS * self.units

    @property
    def block_m(self) -> int:
        return self.tokens

    def ring_bytes(self, weights: WeightFormat) -> int:
        """Of all warps of a block."""
        unit = weight_block_bytes(weights) * _UNIT_CHANNELS // _WARPGROUP_CHANNELS
        return self.warps * self.stages * self.units * unit

    def fits(self, architecture: str, weights: WeightFormat) -> bool:
        """Whether `blocks_per_sm` of them have room on an SM, and the kernel is for such weights."""
        received = self.tokens * self.block_n // self.cluster * 4 if self.cluster > 1 else 0
        each = self.ring_bytes(weights) + received + self.warps * self.stages * 8 + _RESERVED_KIB * 1024
        return weights != "int8" and self.blocks_per_sm * each <= shared_bytes_of_sm(architecture)

    def spec(self, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
        """The instantiation for `architecture`, which is HOPPER. Raises ValueError where it does not fit."""
        if not self.fits(architecture, weights):
            raise ValueError(f"{self} does not take {weights} weights, or does not fit the SM of {architecture}")
        defines = {
            "WEIGHT_FORMAT": WEIGHT_FORMATS.index(weights),
            "OUT_FORMAT": OUT_FORMATS.index(out),
            "TOKENS": self.tokens,
            "UNITS": self.units,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }
        shared, threads = self.ring_bytes(weights), 32 * self.warps
        return KernelSpec("sm90/gemm_decode.cu", "qoq_gemm_decode_sm90", tuple(defines.items()), threads, shared)


@dataclass(frozen=True)
class SplitTile:
    """Template arguments of one instantiation of sm90/gemm_split.cu; see there."""

    tokens: int
    channel_groups: int
    splits: int
    cluster: int
    stages: int
    blocks_per_sm: int

    def __post_init__(self) -> None:
        if self.tokens not in _WGMMA_TOKENS or self.tokens > _KEEPS_REGISTERS:
            raise ValueError(f"{self}: expected one of {_WGMMA_TOKENS} tokens up to {_KEEPS_REGISTERS}")
        if self.channel_groups not in (1, 2) or self.splits not in _SPLITS or self.cluster not in _SPLITS:
            raise ValueError(f"{self}: expected 1 or 2 channel groups, and {_SPLITS} splits and blocks of a cluster")
        if self.stages % self.splits:
            raise ValueError(f"{self}: expected a multiple of {self.splits} stages")

    @property
    def block_n(self) -> int:
        return _WARPGROUP_CHANNELS * self.channel_groups

    @property
    def block_m(self) -> int:
        return self.tokens

    def shared_bytes(self, weights: WeightFormat) -> int:
        """Of the stages; afterwards of the sums of every split, and those of other blocks of the cluster."""
        stage = self.channel_groups * _WEIGHT_BLOCK_BYTES[weights] + self.tokens * GROUP_SIZE
        sums = self.splits * self.tokens * 4 * (self.block_n + _SUMS_PADDING)
        received = (self.cluster - 1) * self.tokens * 4 * self.block_n // self.cluster
        return max(self.stages * stage, sums + received)

    def fits(self, architecture: str, weights: WeightFormat) -> bool:
        """Whether `blocks_per_sm` of them have room on an SM."""
        each = self.shared_bytes(weights) + self.stages * _BARRIER_BYTES + _RESERVED_KIB * 1024
        return self.blocks_per_sm * each <= shared_bytes_of_sm(architecture)

    def spec(self, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
        """The instantiation for `architecture`, which is HOPPER. Raises ValueError where it does not fit."""
        if not self.fits(architecture, weights):
            raise ValueError(f"{self} does not fit the SM of {architecture} with {weights} weights")
        defines = {
            "WEIGHT_FORMAT": WEIGHT_FORMATS.index(weights),
            "OUT_FORMAT": OUT_FORMATS.index(out),
            "TOKENS": self.tokens,
            "GROUPS": self.channel_groups,
            "SPLITS": self.splits,
            "CLUSTER": self.cluster,
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }
        threads = 128 * self.channel_groups * self.splits + 32
        shared = self.shared_bytes(weights)
        return KernelSpec("sm90/gemm_split.cu", "qoq_gemm_split_sm90", tuple(defines.items()), threads, shared)


HopperTile = Sm90Tile | SplitTile | DecodeTile
Tile = GemmTile | HopperTile
