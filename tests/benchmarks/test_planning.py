"""The table of predictions beside measurements."""

import pytest
from benchmarks.planning import errors, markdown

FOUND = [
    {"model": "a", "method": "lora", "precision": "bfloat16", "length": 64, "tokens": 512, "layers": "none"}
    | {
        "predicted_bytes": 110 * 2**20,
        "measured_bytes": 100 * 2**20,
        "probe_bytes": 102 * 2**20,
        "predicted_seconds": 0.5,
        "measured_seconds": 1.0,
        "probe_seconds": 0.95,
    },
    {"model": "b", "method": "full", "precision": "float32", "length": 64, "tokens": 512, "layers": "all"}
    | {"predicted_bytes": 80 * 2**20, "measured_bytes": 100 * 2**20, "probe_bytes": 96 * 2**20}
    | {"predicted_seconds": 1.2, "measured_seconds": 1.0, "probe_seconds": 1.09},
    {
        "model": "c",
        "method": "full",
        "precision": "float32",
        "length": 64,
        "tokens": 512,
        "layers": "all",
        "error": "x",
    },
]


def test_errors_are_shares_of_what_was_measured():
    assert errors(FOUND[:2], "predicted_bytes", "measured_bytes") == pytest.approx([0.1, 0.2])


def test_the_table_tells_medians_and_worst_and_keeps_what_failed():
    page = markdown(FOUND)
    case = "| a | lora | bfloat16 | 64 | 512 | none "
    assert f"{case}| 100 | 110 | +10.0% | 102 | +2.0% | 1.00 | 0.50 | -50% | 0.95 | -5% |" in page
    assert "| failed |" in page
    assert "Memory by formula, 2 cases: median error 15.0%, worst 20.0%." in page
    assert "Memory after a probe, 2 cases: median error 3.0%, worst 4.0%." in page
    assert "Step after a probe, 2 cases: median error 7.0%, worst 9.0%." in page
