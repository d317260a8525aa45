"""`qoq bench --what e2e` on the GPU at hand: its options, and the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.precisions import PRECISIONS, Precision, find_precision
from qoq.recipes.shapes import ModelShape
from qoq_cli.bench_options import MAX_SEQUENCES, check_price, choose, numbers, served_lengths, split
from qoq_cli.progress import progress
from qoq_cli.sizes import parse_size
from qoq_cli.terminal import Terminal

if TYPE_CHECKING:
    from qoq.kernels.roofline import Roofline

_OURS = tuple(name for name, precision in PRECISIONS.items() if precision.weights in ("g128", "per_channel"))
_DEFAULT_OURS = ("w4a8kv4-g128", "w4a8kv8-g128")
_AGAINST = {"fp16": "fp16", "bf16": "fp16", "w8a8": "w8a8kv8", "fp8": "fp8"}
_MOST_SEQUENCES = 512
_MAX_REQUESTS = 1 << 20


@dataclass(frozen=True)
class ServedPlan:
    """The options, checked. `lengths` are of prompts and answers."""

    batches: list[int]
    lengths: list[tuple[int, int]]
    precisions: list[Precision]
    requests: int | None
    memory_bytes: int | None
    lm_head_bits: int
    price: float | None

    @staticmethod
    def parse(
        batch: str | None,
        prompt_len: str | None,
        output_len: str | None,
        precision: str | None,
        against: str,
        requests: int | None,
        memory: str | None,
        lm_head_bits: int | None,
        price: float | None,
    ) -> ServedPlan:
        """From the options of `qoq bench`. Raises InputError that names the option."""
        check_price(price)
        if requests is not None and not 1 <= requests <= _MAX_REQUESTS:
            raise InputError(f"--requests {requests}: out of range", remedy=f"pass 1 to {_MAX_REQUESTS}")
        if lm_head_bits not in (None, 8, 16):
            raise InputError(f"--lm-head-bits {lm_head_bits}: not supported", remedy="use 16 or 8")
        ours = _DEFAULT_OURS if precision is None else choose("--precision", split("--precision", precision), _OURS)
        others = [] if against == "none" else split("--against", against)
        names = dict.fromkeys([*ours, *(_AGAINST[name] for name in others if name in _AGAINST)])
        return ServedPlan(
            batches=[_MOST_SEQUENCES] if batch is None else numbers("--batch", batch, MAX_SEQUENCES),
            lengths=served_lengths(prompt_len, output_len),
            precisions=[find_precision(name) for name in names],
            requests=requests,
            memory_bytes=None if memory is None else parse_size("--memory", memory),
            lm_head_bits=lm_head_bits or 16,
            price=price,
        )


def run_served(
    terminal: Terminal, plan: ServedPlan, shape: ModelShape, index: int, roofline: Roofline, seed: int
) -> dict[str, Any]:
    """Measure; what `--json` has under "e2e"."""
    import torch

    from qoq.kernels.bench_served import ServedCase, bench_served
    from qoq.kernels.footprint import CHUNK_TOKENS
    from qoq.kernels.runtime.model import Options

    cases = [
        ServedCase(prompt_len, output_len, batch, plan.requests)
        for prompt_len, output_len in plan.lengths
        for batch in plan.batches
    ]
    precisions, skipped = plan.precisions, {}
    if torch.cuda.get_device_capability(index) < (8, 9):
        precisions = [precision for precision in precisions if precision.weights != "fp8"]
        skipped = {"fp8": "this GPU has no float8"} if len(precisions) < len(plan.precisions) else {}
    options = Options(
        device="cuda",  # the current one
        chunk_tokens=CHUNK_TOKENS,
        memory_bytes=plan.memory_bytes,
        lm_head_bits=plan.lm_head_bits,
        prefill_first=True,  # all requests come at once: what counts is tokens a second
        compiled=True,  # baselines have fused kernels around their products too
    )
    with progress(terminal, "whole model") as update:
        report = bench_served(
            shape, precisions, cases, options=options, read_gb_s=roofline.read_gb_s, seed=seed, on_step=update
        )
    if not report.results:
        raise EnvironmentProblem(
            "\n".join(["nothing could be measured:", *(f"  - {what}: {why}" for what, why in report.skipped.items())]),
            remedy="try a smaller model, shorter prompts or fewer sequences; `qoq doctor` looks at the machine",
        )
    results = [asdict(result) for result in report.results]
    for result in results:
        tokens, joules = result["requests"] * result["case"]["output_len"], result["joules"]
        result["joules_per_token"] = None if joules is None else joules / tokens
        result["tokens_per_dollar"] = None if plan.price is None else 3600 * result["tokens_per_s"] / plan.price
    steps = [asdict(step) for step in report.steps]
    return {
        "results": results,
        "steps": steps,
        "skipped": {**skipped, **report.skipped},
        "price": plan.price,
        "lm_head_bits": plan.lm_head_bits,
    }
