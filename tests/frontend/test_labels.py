"""Instances that come and go share the labels of vLLM's metrics."""

from __future__ import annotations

from llumsched.frontend.routing.engine_labels import EngineLabels


def test_a_label_is_free_again_when_its_instance_is_gone() -> None:
    labels = EngineLabels(2)
    for instance in (0, 1):
        labels.take(instance)
    labels.give_back(0)
    labels.take(5)
    assert [labels.of(i) for i in (0, 1, 5)] == [None, 1, 0]
    assert labels.instances == [1, 5]


def test_more_instances_than_labels_share_them() -> None:
    labels = EngineLabels(2)
    for instance in range(3):
        labels.take(instance)
    assert labels.all == [0, 1]
    assert {labels.of(i) for i in range(3)} == {0, 1}


def test_a_label_that_no_instance_has_had_is_hidden() -> None:
    labels = EngineLabels(3)
    labels.take(0)
    labels.take(1)
    labels.give_back(1)
    assert labels.hidden(gauges=True) == {"1", "2"}
    assert labels.hidden(gauges=False) == {"2"}, "what the instance counted has happened"


def test_a_frontend_that_comes_later_uses_the_labels_of_the_others() -> None:
    labels = EngineLabels(4)
    labels.were_used(2)
    labels.take(5, label=1)
    assert labels.by_instance == {5: 1}
    assert labels.hidden(gauges=True) == {"0", "2", "3"}
    assert labels.hidden(gauges=False) == {"2", "3"}, "what was counted under label 0 has happened"
