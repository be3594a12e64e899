"""The table of what is left out: each thing takes operations where it is undone, and only there."""

import pytest

from bench import pipelines, removals
from bench.pipelines import Asked


def test_each_removal_saves_operations_where_it_applies() -> None:
    guided, controlled = Asked(128, 2, cfg=4.0), Asked(128, 2, mode="controlnet")
    first, second = removals.counted(pipelines.miniature(), [guided, controlled])
    for table in (first, second):
        ours = table.pop("ours")
        for name, taken in table.items():
            more = {case: taken[case.title] / ours[case.title] - 1 for case in (guided, controlled)}
            assert more[guided] == pytest.approx(0, abs=1e-9) if "image" in name else more[guided] > 0
            assert more[controlled] == pytest.approx(0, abs=1e-9) if "guided" in name else more[controlled] > 0
    assert {*first} == {*removals.FIRST, "DiffSynth", "diffusers"}
    assert {*second} == {*removals.SECOND}
    assert "| ours |" in removals.markdown({"ours": {"a": 1e12}, "more": {"a": 2e12}})
    assert "+100.00%" in removals.markdown({"ours": {"a": 1e12}, "more": {"a": 2e12}})
