"""Dispatch: every shape gets a kernel that fits the architecture, with its reason."""

from __future__ import annotations

import math
from itertools import groupby
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.kernels import dispatch
from qoq.kernels.dispatch import GemmChoice, choose_gemm, covering_tokens, gemm_specs, gemm_table, gemm_tile
from qoq.kernels.gemm_tiles import (
    ARCHITECTURES,
    HOPPER,
    OUT_FORMATS,
    WEIGHT_FORMATS,
    WORKSPACE_SUMS_PER_SM,
    DecodeTile,
    GemmTile,
    HopperTile,
    Sm90Tile,
    SplitTile,
    shared_bytes_of_sm,
)

TILES = {name: gemm_tile(name) for name in gemm_table()["tiles"]}


@given(
    st.sampled_from([*ARCHITECTURES, HOPPER, "sm_87", "sm_103a", "sm_121a"]),
    st.sampled_from(WEIGHT_FORMATS),
    st.integers(1, 70000),
    st.integers(1, 1000),
    st.integers(1, 300),
)
def test_every_shape_is_chosen_for(architecture: str, weights: str, m: int, stripes: int, groups: int) -> None:
    choice = choose_gemm(architecture, weights, m, 32 * stripes, 128 * groups)
    assert choice.reason
    specs = {spec for spec, _ in gemm_specs(architecture)}
    for out in OUT_FORMATS:
        assert choice.tile.spec(architecture, weights, out) in specs
    if isinstance(choice.tile, DecodeTile | SplitTile):
        return
    share = choice.share(architecture, weights, m, 32 * stripes, 128 * groups, num_sms=132)
    tiles = math.ceil(32 * stripes / choice.tile.block_n) * math.ceil(m / choice.tile.block_m)
    steps = math.ceil(groups / choice.tile.groups)
    assert share.blocks * share.units_each + share.longer == (tiles - share.whole) * steps
    assert 0 <= share.longer < share.blocks
    if choice.stream:
        assert 1 <= share.blocks <= tiles * steps
        assert share.whole % share.blocks == 0
        assert 0 <= tiles - share.whole < share.blocks
    else:
        assert 1 <= share.blocks <= tiles
        assert share.whole == tiles


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, HOPPER])
def test_tiles_fit_shared_memory_and_workspace(architecture: str, weights: str) -> None:
    for tile in {TILES[row["tile"]] for row in dispatch._rows(architecture, weights)[1]}:
        spec = tile.spec(architecture, weights, "float16")
        assert spec.threads <= 1024
        room = shared_bytes_of_sm(architecture)
        if isinstance(tile, DecodeTile | SplitTile):
            assert tile.blocks_per_sm * (spec.shared_bytes + 1024) <= room
            continue
        blocks, stages = tile.resident(architecture, weights)
        assert spec.shared_bytes >= stages * tile.stage_bytes(weights)
        assert blocks * (spec.shared_bytes + 1024 + 128) <= room
        assert 2 <= stages <= tile.stages
        assert 1 <= blocks * tile.block_n * tile.block_m <= WORKSPACE_SUMS_PER_SM


@pytest.mark.parametrize("blocks", [1, 7, 132, 264])
@pytest.mark.parametrize(("tiles", "k_steps"), [(1, 300), (24, 32), (131, 32), (33, 7), (5, 1)])
def test_shared_tiles_have_owners_of_their_own(blocks: int, tiles: int, k_steps: int) -> None:
    """The arithmetic of gemm_schedule.cuh: a block begins at most one tile that it does not finish."""
    units_each, longer = divmod(tiles * k_steps, min(blocks, tiles * k_steps))
    first = [b * units_each + min(b, longer) for b in range(blocks + 1)]

    def owner(tile: int) -> int:
        unit, in_longer = tile * k_steps, longer * (units_each + 1)
        return unit // (units_each + 1) if unit < in_longer else longer + (unit - in_longer) // units_each

    shared = []
    for tile in range(tiles):
        begin, end = tile * k_steps, (tile + 1) * k_steps
        holder = owner(tile)
        assert first[holder] <= begin < first[holder + 1]
        if first[holder + 1] < end:
            shared.append(holder)
    assert len(shared) == len(set(shared))


def test_a_tile_too_large_for_the_workspace_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace"):
        GemmTile(256, 256, 4, 2, 3, 1)
    with pytest.raises(ValueError, match="workspace"):
        Sm90Tile(256, 4, 2, 1)


def test_what_hoppers_kernel_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        Sm90Tile(40, 2, 4, 1)
    with pytest.raises(ValueError, match="warpgroups"):
        Sm90Tile(64, 3, 4, 1)
    with pytest.raises(ValueError, match="shared memory"):
        Sm90Tile(128, 1, 4, 4).resident(HOPPER, "int8")


def test_tiles_without_a_schedule_fit_or_say_so() -> None:
    with pytest.raises(ValueError, match="tokens"):
        DecodeTile(40, 2, 8, 2, 1, 1)
    with pytest.raises(ValueError, match="ring"):
        DecodeTile(32, 4, 8, 1, 1, 1)
    with pytest.raises(ValueError, match="units"):
        DecodeTile(8, 5, 8, 2, 1, 1)
    with pytest.raises(ValueError, match="int8"):
        DecodeTile(8, 2, 8, 2, 1, 1).spec(HOPPER, "int8", "int32")
    with pytest.raises(ValueError, match="stages"):
        SplitTile(64, 1, 4, 1, 6, 1)
    with pytest.raises(ValueError, match="tokens"):
        SplitTile(256, 1, 1, 1, 4, 1)
    with pytest.raises(ValueError, match="groups"):
        SplitTile(64, 4, 1, 1, 4, 1)
    assert not SplitTile(128, 2, 1, 1, 10, 1).fits(HOPPER, "g128")
    with pytest.raises(ValueError, match="does not fit"):
        SplitTile(128, 2, 1, 1, 10, 1).spec(HOPPER, "g128", "float16")
    with pytest.raises(TypeError, match="one tile"):
        GemmChoice(DecodeTile(8, 2, 8, 2, 1, 1), False, "").share(HOPPER, "g128", 1, 128, 128, 132)


def test_hopper_has_its_own_kernels_and_the_portable_ones() -> None:
    for weights in WEIGHT_FORMATS:
        assert all(isinstance(choose_gemm(HOPPER, weights, m, 4096, 4096).tile, HopperTile) for m in (1, 64, 5000))
    sources = {spec.source for spec, _ in gemm_specs("sm_90")}
    assert sources == {"sm80/gemm.cu", "sm90/gemm.cu", "sm90/gemm_split.cu", "sm90/gemm_decode.cu"}
    assert {spec.source for spec, _ in gemm_specs("sm_80")} == {"sm80/gemm.cu"}


def test_rows_name_tiles_and_end_without_a_limit() -> None:
    rows = gemm_table()["measured"]
    assert {row["tile"] for row in rows} == set(TILES), "a tile without a row is only worth keeping while tuning"
    assert len(set(TILES.values())) == len(TILES), "two names for one tile"
    problem = itemgetter("architecture", "weights", "n", "k")
    for _, same in groupby(sorted(rows, key=problem), problem):
        limits = [row["max_m"] for row in same]
        assert limits.count(None) == 1
        assert len(limits) == len(set(limits))


def test_an_architecture_never_measured_says_so() -> None:
    assert "measured on sm_90" in choose_gemm("sm_89", "g128", 1, 4096, 4096).reason


def test_measured_rows_answer_for_shapes_like_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"a": vars(GemmTile(128, 16, 4, 1, 4, 2)), "b": vars(GemmTile(128, 64, 4, 2, 4, 2))}
    row = {"architecture": "sm_90", "weights": "g128", "stream": True}
    rows = [
        {**row, "n": 4096, "k": 4096, "max_m": 16, "tile": "a"},
        {**row, "n": 4096, "k": 4096, "max_m": None, "tile": "b"},
        {**row, "n": 28672, "k": 4096, "max_m": None, "tile": "a"},
    ]
    table = {"tiles": tile, "measured": rows}
    monkeypatch.setattr(dispatch, "gemm_table", lambda: table)
    monkeypatch.setattr(dispatch, "_choices", dispatch._choices.__wrapped__)
    assert choose_gemm("sm_90", "g128", 16, 5120, 4096) == GemmChoice(
        GemmTile(**tile["a"]), True, "measured on sm_90 for [4096, 4096], M <= 16: a"
    )
    assert choose_gemm("sm_90", "g128", 17, 5120, 4096).tile.block_m == 64
    assert choose_gemm("sm_90", "g128", 5000, 22016, 4096).tile.block_m == 16
    assert covering_tokens("sm_90", "g128", 5120, 4096) == (1, 17)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (192, 640)])
@pytest.mark.parametrize("architecture", ["sm_90", HOPPER])
def test_covering_tokens_reach_every_kernel(architecture: str, weights: str, shape: tuple[int, int]) -> None:
    tokens = covering_tokens(architecture, weights, *shape)
    reached = {choose_gemm(architecture, weights, m, *shape) for m in tokens}
    assert reached == {choose_gemm(architecture, weights, m, *shape) for m in range(1, 9000, 7)} | reached
    assert len(reached) == len(tokens)
