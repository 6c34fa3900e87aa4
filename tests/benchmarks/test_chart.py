"""The chart of the README: made of the figures that are there."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from benchmarks.chart import RESULTS, chart
from tests.support.file_tree import ROOT

PICTURE = ROOT / "docs" / "pictures" / "benchmarks.svg"


def test_it_is_current() -> None:
    how = "make it anew: python -m benchmarks.chart docs/pictures/benchmarks.svg"
    assert PICTURE.read_text() == chart(json.loads(RESULTS.read_text())), how


def test_bars_are_the_medians_of_the_ratios() -> None:
    speed = {
        "mlp": {"rates": {"lockstep": [300.0, 200.0, 400.0], "ddp": [100.0, 100.0, 100.0],
                          "ddp_malloc": [50.0, 50.0, 50.0]}},
        "failed": {"rates": {"lockstep": [None], "ddp": [1.0]}},
    }  # fmt: skip
    machine = {"cores": 2, "processor": "P (avx2)", "torch": "2.13"}
    root = ElementTree.fromstring(chart({"speed": speed, "machine": machine}))
    texts = ["".join(each.itertext()) for each in root.findall(".//{*}text")]
    assert texts[-2:] == ["mlp", "3.00300/s"]
    assert not any("failed" in text for text in texts)
