"""The catalog of schedules: names and the schedules that have them."""

from __future__ import annotations

import pytest

import dynarank as dr
from dynarank.schedules.base import FunctionSchedule, RankSchedule
from dynarank.schedules.catalog import SCHEDULES, get_preset, schedule_name

OPTIONS = {"rank": 4, "alpha": 8.0, "inflate": 0.3, "deflate": 0.7}


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "aligned"])
def test_a_schedule_of_the_catalog_knows_its_name(name):
    assert schedule_name(get_preset(name)(**OPTIONS)) == name


def test_other_schedules_are_named_by_their_class_or_function():
    class WarmStart(RankSchedule):
        pass

    def my_schedule(clock, readings):
        return {}

    assert schedule_name(WarmStart()) == "warm-start"
    assert schedule_name(FunctionSchedule(my_schedule)) == "my-schedule"
    assert schedule_name(dr.schedules.dynamic_rank(budget=0.5)) == "dynamic-rank"
