"""Data sheets of GPUs, read from gpus.yaml: what their vendor promises, not what anybody measured."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

import yaml

from qoq.recipes.errors import InputError

Operand = Literal["fp16", "int8", "fp8"]


@dataclass(frozen=True)
class Gpu:
    """One card; the fields are described in gpus.yaml."""

    name: str
    title: str
    architecture: str
    memory_mib: int
    bandwidth_gb_s: float
    fp16_tops: float
    int8_tops: float
    sms: int
    boost_ghz: float
    watts: int
    fp8_tops: float | None = None
    aliases: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20

    @property
    def vector_tops(self) -> float:
        """10^12 lanes a second for which an instruction can be issued, outside the tensor cores: 4 warps an SM and
        clock, on every architecture."""
        return self.sms * self.boost_ghz * 4 * 32 * 1e-3

    def tops(self, operand: Operand) -> float | None:
        """10^12 operations a second of the tensor cores; None where they do not know the type."""
        return {"fp16": self.fp16_tops, "int8": self.int8_tops, "fp8": self.fp8_tops}[operand]

    @staticmethod
    def parse(name: str, fields: Mapping[str, Any]) -> Gpu:
        """From an entry of gpus.yaml."""
        names = {key: tuple(fields.get(key, ())) for key in ("aliases", "devices")}
        return Gpu(name, **{**fields, **names})


@lru_cache(maxsize=1)
def gpus() -> Mapping[str, Gpu]:
    """Every data sheet by its name, in the order of gpus.yaml; read-only."""
    table = yaml.safe_load((files("qoq.recipes") / "gpus.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: Gpu.parse(name, fields) for name, fields in table.items()})


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, whatever its letters' case and its hyphens. Raises InputError that names the closest."""
    known = {_plain(each): gpu for gpu in gpus().values() for each in (gpu.name, *gpu.aliases)}
    wanted = _plain(name)
    for prefix in ("nvidia", "geforce"):
        wanted = wanted.removeprefix(prefix)
    gpu = known.get(wanted)
    if gpu is not None:
        return gpu
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    names = list(dict.fromkeys(known[each].name for each in close))
    hint = f"did you mean {' or '.join(names)}? " if names else ""
    raise InputError(f"GPU {name!r}: not in the data sheet", remedy=f"{hint}`qoq gpus` lists every one")


def is_called(device: str, name: str) -> bool:
    """Does `name` (as for --gpu) mean the GPU that the driver calls `device`?

    Whole words count: l4 is not an L40S. h100 is any H100, as h100-sxm is not.
    """
    words = re.findall(r"[a-z0-9]+", device.lower())
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    if _plain(name) in runs:
        return True
    try:
        return device in find_gpu(name).devices
    except InputError:
        return False


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
