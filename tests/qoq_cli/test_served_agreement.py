"""`from_pretrained` and `qoq eval` compute the same numbers from the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qoq.calib.served import open_served
from qoq.calib.streaming import StreamedModel
from qoq.kernels.loading import load_model
from qoq_cli.app import app
from qoq_cli.model_location import builtin_text


@pytest.fixture(scope="module", params=["--g128", "--per-channel"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("agreement") / "tiny"
    arguments = [
        "quantize",
        "tiny",
        request.param,
        "-o",
        str(output),
        "--samples",
        "2",
        "--seq-len",
        "64",
        "-q",
        "--json",
    ]
    app(arguments, standalone_mode=False)
    return output


def test_logits_of_from_pretrained_are_those_of_eval(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:4000]
    windows = torch.tensor(tokenizer(text)["input_ids"])[: 3 * 96].view(3, 96)
    served = open_served(checkpoint)
    streamed = StreamedModel(
        served.skeleton,
        served.checkpoint.source,
        device=torch.device("cpu"),
        checkpoint=served.checkpoint,
        act_bits=8,
        kv_bits=4,
    )
    expected = torch.stack(list(streamed.logits(windows)))
    model = load_model(checkpoint)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    # A float32 sum in another order may move one int8 or uint4 code, so a few positions differ more than the rest.
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
