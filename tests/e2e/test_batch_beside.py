"""Two thousand lines beside interactive traffic on real engines: each is answered once."""

from __future__ import annotations

import pytest

from benchmarks import batch_beside
from tests.campaigns import THOROUGH

pytestmark = pytest.mark.skipif(not THOROUGH, reason="two thousand requests on engines")


def test_a_batch_beside_interactive_traffic_is_answered_whole() -> None:
    report = batch_beside.run(quick=False)
    figures = {figure.name: figure for figure in report.figures}
    assert figures["lines with exactly one answer"].holds
    assert figures["interactive requests that failed"].holds
