"""`--backend` of verify and eval: what is chosen where, and that it is said. The GPU is a pretence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qoq.kernels.loading import KernelModel
from qoq.kernels.runtime.scoring import RuntimeWindows
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq_cli import backends
from qoq_cli.backends import resolve_backend


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """--device auto is a GPU with kernels, called cpu so that tensors can be put there."""
    monkeypatch.setattr(backends, "kernel_problem", lambda device: None)
    monkeypatch.setattr(backends, "gpu_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(backends, "resolve_device", lambda device: "cpu")


def test_what_is_chosen_without_a_gpu(no_gpu: None) -> None:
    assert resolve_backend("auto", "auto") == ("reference", "cpu", "PyTorch sees no CUDA device")
    assert resolve_backend("auto", "cpu")[:2] == ("reference", "cpu")
    assert resolve_backend("reference", "auto") == ("reference", "cpu", "as asked")
    with pytest.raises(EnvironmentProblem, match="--backend kernels: PyTorch sees no CUDA device"):
        resolve_backend("kernels", "auto")
    with pytest.raises(EnvironmentProblem, match="--backend kernels"):
        resolve_backend("kernels", "cuda")
    with pytest.raises(InputError, match="--backend kernels: --device is cpu"):
        resolve_backend("kernels", "cpu")
    with pytest.raises(InputError, match="--backend fast: not known"):
        resolve_backend("fast", "auto")


def test_what_is_chosen_with_a_gpu(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto", "auto") == ("kernels", "cpu", "Pretended GPU")
    assert resolve_backend("kernels", "auto") == ("kernels", "cpu", "Pretended GPU")
    assert resolve_backend("reference", "auto") == ("reference", "cpu", "as asked")
    monkeypatch.setattr(backends, "kernel_problem", lambda device: "CuPy is not usable")
    assert resolve_backend("auto", "auto") == ("reference", "cpu", "CuPy is not usable")
    with pytest.raises(EnvironmentProblem, match="CuPy is not usable"):
        resolve_backend("kernels", "auto")


@pytest.mark.parametrize("command", ["verify", "eval"])
def test_kernels_without_a_gpu_is_an_environment_problem(
    command: str, fails: Any, tiny_checkpoint: Path, no_gpu: None
) -> None:
    message = fails(3, command, tiny_checkpoint, "--backend", "kernels")
    assert "--backend kernels: PyTorch sees no CUDA device" in message
    assert "qoq doctor" in message


def test_the_reference_is_said_to_be_used(qoq: Any, tiny_checkpoint: Path, no_gpu: None) -> None:
    outcome = qoq("verify", tiny_checkpoint, "--json")
    assert "backend: reference (PyTorch sees no CUDA device)" in outcome.stderr
    assert (outcome.json["backend"], outcome.json["kernels"]) == ("reference", None)


class FakeProof:
    """Stands for qoq.kernels.gpu_verification.KernelProof; one linear is wrong where asked."""

    wrong: str | None = None

    def __init__(self, device: str) -> None:
        self.linears, self.caches = 0, list[dict[str, Any]]()

    def check_linear(self, name: str, packed: Any, emulated: Tensor, *, in_features: int) -> tuple[str, ...]:
        assert emulated.shape == (packed["qweight"].shape[0], -(-in_features // 128) * 128)
        self.linears += 1
        return (f"{name}: int32, M = 1: sum [0, 3] is 8, expected 7",) if name == self.wrong else ()

    def check_cache(
        self, heads: int, kv_heads: int, head_dim: int, bits: int, *, key_rotation: str, window: int | None
    ) -> tuple[str, ...]:
        assert (heads % kv_heads, head_dim, bits, window) == (0, 64, 4, None)
        cache = {"bits": bits, "key_rotation": key_rotation, "dtype": "float16"}
        self.caches.append({**cache, "relative_error": 3e-4, "tolerance": 1e-3})
        return ()

    def summary(self) -> dict[str, Any]:
        return {"device": "GPU", "rows": [1], "linears": self.linears, "compared": 1234567, "caches": self.caches}


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch, pretended_gpu: None) -> type[FakeProof]:
    monkeypatch.setattr("qoq.kernels.gpu_verification.KernelProof", FakeProof)
    monkeypatch.setattr(FakeProof, "wrong", None)
    return FakeProof


def test_verify_runs_every_linear_through_the_kernels(qoq: Any, tiny_checkpoint: Path, proof: Any) -> None:
    outcome = qoq("verify", tiny_checkpoint)
    assert outcome.code == 0, outcome.stderr
    assert "backend: kernels (Pretended GPU)" in outcome.stderr
    assert "28 linears, M = 1: all 1,234,567 values agree with the oracle" in outcome.stdout
    assert "KV4 cache, float16: bytes equal" in outcome.stdout
    data = qoq("verify", tiny_checkpoint, "--backend", "kernels", "--json").json
    assert (data["backend"], data["kernels"]["linears"]) == ("kernels", 28)


def test_verify_tells_which_kernel_result_is_wrong(fails: Any, tiny_checkpoint: Path, proof: Any) -> None:
    proof.wrong = "model.layers.2.mlp.up_proj"
    message = fails(1, "verify", tiny_checkpoint)
    assert "model.layers.2.mlp.up_proj: int32, M = 1: sum [0, 3] is 8, expected 7" in message


def test_illegal_bytes_are_told_before_any_kernel(
    fails: Any, copied: Any, repair: Any, tiny_checkpoint: Path, proof: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_checkpoint)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.s2_scales"][0, 0] = 17
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    repair(folder)
    seen: list[str] = []
    original = FakeProof.check_linear
    monkeypatch.setattr(
        FakeProof,
        "check_linear",
        lambda self, name, *args, **kw: seen.append(name) or original(self, name, *args, **kw),
    )
    assert "model.layers.1.mlp.up_proj" in fails(1, "verify", folder)
    assert len(seen) == 27
    assert "model.layers.1.mlp.up_proj" not in seen


# ---- eval


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, pretended_gpu: None) -> list[dict[str, Any]]:
    """What the runtime is asked for; it runs on the CPU, on the reference arithmetic. KernelModel refuses to."""
    asked: list[dict[str, Any]] = []
    run = RuntimeWindows.logits

    def logits(self: RuntimeWindows, windows: Tensor) -> Iterator[Tensor]:
        asked.append({"kv_bits": self._options.kv_bits, "device": self._options.device})
        return run(self, windows)

    def refused(self: KernelModel, windows: Tensor) -> Iterator[Tensor]:
        raise InputError("transformers runs it", remedy="none")

    monkeypatch.setattr(RuntimeWindows, "logits", logits)
    monkeypatch.setattr(KernelModel, "logits", refused)
    return asked


_SHORT = ("--ppl", "builtin", "--limit", 2, "--seq-len", 64)


def test_eval_scores_checkpoints_on_kernels_and_the_rest_on_the_reference(
    qoq: Any, tiny_checkpoint: Path, runs: list[dict[str, Any]]
) -> None:
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", *_SHORT)
    outcome = qoq(*args, "--json")
    assert outcome.code == 0, outcome.stderr
    assert "backend of checkpoints: kernels (Pretended GPU)" in outcome.stderr
    models = outcome.json["texts"]["builtin"]["models"]
    assert {name: model["backend"] for name, model in models.items()} == {
        "tiny": "reference",
        str(tiny_checkpoint): "kernels",
    }
    assert runs == [{"kv_bits": 4, "device": "cpu"}]
    reference = qoq(*args, "--json", "--backend", "reference").json["texts"]["builtin"]["models"]
    assert {model["backend"] for model in reference.values()} == {"reference"}
    for name, model in models.items():
        assert model["perplexity"] == pytest.approx(reference[name]["perplexity"], rel=2e-3)
    shown = qoq(*args)
    assert "kernels" in shown.stdout
    assert "backend" not in qoq(*args, "--backend", "reference").stdout


def test_eval_options_reach_the_kernels(qoq: Any, tiny_checkpoint: Path, runs: list[dict[str, Any]]) -> None:
    outcome = qoq("eval", tiny_checkpoint, *_SHORT, "--kv-bits", 8, "--json")
    assert outcome.json["texts"]["builtin"]["models"][str(tiny_checkpoint)]["scheme"] == "w4a8kv8"
    assert runs == [{"kv_bits": 8, "device": "cpu"}]


def test_a_models_own_code_runs_through_transformers(
    fails: Any, tiny_checkpoint: Path, runs: list[dict[str, Any]]
) -> None:
    assert "transformers runs it" in fails(2, "eval", tiny_checkpoint, *_SHORT, "--trust-remote-code")
    assert runs == []


def test_sixteen_bit_activations_stay_on_the_reference(
    qoq: Any, fails: Any, tiny_checkpoint: Path, runs: list[dict[str, Any]]
) -> None:
    args = ("eval", tiny_checkpoint, *_SHORT, "--act-bits", 16)
    outcome = qoq(*args, "--json")
    assert outcome.json["texts"]["builtin"]["models"][str(tiny_checkpoint)]["backend"] == "reference"
    assert "the kernels take 8-bit activations only" in outcome.stderr
    assert "8-bit activations only" in fails(2, *args, "--backend", "kernels")
    assert runs == []


def test_kernels_for_a_16_bit_model_are_refused(fails: Any, runs: list[dict[str, Any]]) -> None:
    assert "none of the models is a checkpoint" in fails(2, "eval", "tiny", *_SHORT, "--backend", "kernels")
