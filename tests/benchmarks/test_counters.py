"""What ncu prints is read, and no case loses its name."""

from __future__ import annotations

from tests.benchmarks.scripts import load_script

PRINTED = """==PROF== Connected to process 77 (/usr/bin/python3)
==PROF== Profiling "qoq_gemm_decode_sm90" - 0: 0%....50%....100% - 8 passes
==PROF== Disconnected from process 77
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0","77","python3","127.0.0.1","qoq_gemm_decode_sm90","1","7","(512, 1, 1)","(128, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","Duration","us","6.40","","",""
"0","77","python3","127.0.0.1","qoq_gemm_decode_sm90","1","7","(512, 1, 1)","(128, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","DRAM Throughput","%","61.52","","",""
"0","77","python3","127.0.0.1","qoq_gemm_decode_sm90","1","7","(512, 1, 1)","(128, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","","","","SOLBottleneck","OPT","Latency, issues"
"1","77","python3","127.0.0.1","qoq_decode_attention_sm90","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0",\
"Launch Statistics","Registers Per Thread","register/thread","168","","",""
"""


counters = load_script("counters")


def test_counters_are_read_by_launch() -> None:
    first, second = counters.parse(PRINTED.splitlines())
    assert first["kernel"] == "qoq_gemm_decode_sm90"
    assert first["counters"] == {
        "GPU Speed Of Light Throughput: Duration": "6.40 us",
        "GPU Speed Of Light Throughput: DRAM Throughput": "61.52 %",
    }
    assert second == {
        "kernel": "qoq_decode_attention_sm90",
        "counters": {"Launch Statistics: Registers Per Thread": "168 register/thread"},
    }
    assert counters.parse(["==ERROR== no GPU"]) == []


def test_products_are_together_so_that_cases_and_launches_go_side_by_side() -> None:
    gemms = [gemm for gemm, _ in counters.GEMMS]
    assert gemms == [gemm for name in dict.fromkeys(gemms) for gemm in gemms if gemm == name]
    names = counters.case_names()
    assert len(names) == len(set(names)) == len(counters.GEMMS) + len(counters.ATTENTIONS) + len(counters.SMALL)
