"""Comparison of variants: order, ratios, intervals, and the door."""

import time

import pytest

from medarch.bench.timing import Comparison, compare


def busy(seconds):
    def work():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return work


def test_ratio_of_known_work():
    result = compare({"one": busy(0.002), "three": busy(0.006)}, baseline="one", rounds=7, block_seconds=0.006)
    median, low, high = result.ratio("three")
    assert 2.5 < median < 3.5
    assert low <= median <= high
    assert result.ratio("one") == (1.0, 1.0, 1.0)
    assert 0.0018 < result.quartiles("one")[1] < 0.003
    assert result.clock == "process"
    assert result.rounds == 7


def test_process_time_does_not_count_waiting():
    variants = {"wait": lambda: time.sleep(0.01), "nothing": lambda: None}
    process = compare(variants, baseline="nothing", rounds=3, block_seconds=0.001)
    assert process.quartiles("wait")[2] < 0.005
    wall = compare(variants, baseline="nothing", rounds=3, threads=2, block_seconds=0.001)
    assert wall.clock == "wall"
    assert wall.quartiles("wait")[0] >= 0.0099


def test_rounds_take_turns_in_rotating_order():
    order = []
    names = ["a", "b", "c"]
    variants = {name: lambda name=name: order.append(name) or busy(0.001)() for name in names}
    compare(variants, baseline="a", rounds=3, block_seconds=0.0001)
    assert "".join(order[:6]) == "aabbcc"  # one call to warm up and one to set the size of a block
    blocks = order[6:]
    measured = [name for previous, name in zip([None, *blocks], blocks, strict=False) if name != previous]
    assert "".join(measured) == "abcbcacab"


def test_numbers_of_a_comparison_by_hand():
    result = Comparison(
        {"x": [2.0, 4.0, 6.0, 8.0, 2.0, 2.0], "y": [4.0, 4.0, 3.0, 8.0, 8.0, 6.0]}, "x", 1, "process", "cpu"
    )
    assert result.ratio("y") == (
        1.5,
        0.5,
        4.0,
    )  # ratios 2, 1, 0.5, 1, 4, 3; with six rounds nothing may be cut off
    assert result.coverage == 1 - 2 * 0.5**6
    assert result.quartiles("x") == (2.0, 3.0, 5.5)
    exported = result.to_dict()
    assert exported["variants"]["y"]["ratio"] == {"median": 1.5, "low": 0.5, "high": 4.0}
    assert exported["variants"]["x"]["seconds"]["median"] == 3.0
    table = result.table().splitlines()
    assert table[0].split()[:2] == ["variant", "median"]
    assert "1.5" in table[3]
    assert "0.5 to 4" in table[3]
    assert "6 rounds, one thread" in table[-1]


@pytest.mark.parametrize(("rounds", "depth"), [(5, 0), (6, 0), (9, 1), (11, 1), (15, 3), (25, 7)])
def test_interval_agrees_with_the_sign_test(rounds, depth):
    """Published ranks of the 95 % interval for a median; for fifteen values the fourth and the twelfth."""
    seconds = {"x": [1.0] * rounds, "y": [float(value) for value in range(rounds)]}
    _, low, high = Comparison(seconds, "x", 1, "process", "cpu").ratio("y")
    assert (low, high) == (depth, rounds - 1 - depth)
    coverage = Comparison(seconds, "x", 1, "process", "cpu").coverage
    assert coverage >= 0.95 if rounds >= 6 else coverage < 0.95


def test_bad_arguments():
    with pytest.raises(ValueError, match="baseline 'z'"):
        compare({"a": busy(0)}, baseline="z")
    with pytest.raises(ValueError, match="rounds=1"):
        compare({"a": busy(0)}, baseline="a", rounds=1)
    with pytest.raises(ValueError, match="threads=0"):
        compare({"a": busy(0)}, baseline="a", threads=0)
    with pytest.raises(ValueError, match="tpu"):
        compare({"a": busy(0)}, baseline="a", device="tpu")
