"""Laws of rate-distortion points: hulls, sums of hulls, what lies between two points."""

from __future__ import annotations

import math
import random
from itertools import pairwise, product

import pytest

from compot_deploy.planning.rate_points import between, height, lower_hull, sum_of_hulls


@pytest.mark.parametrize("seed", range(8))
def test_a_hull_is_below_every_point_and_made_of_them(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 100) for _ in range(60)]
    points = [(size, chance.uniform(1.0, 1.3) / size) for size in sizes]
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    assert all(height(hull, size) <= error + 1e-12 for size, error in points)
    assert hull == sorted(hull) and [error for _, error in hull] == sorted((e for _, e in hull), reverse=True)
    assert math.isinf(height(hull, hull[0][0] - 1)) and height(hull, 1000) == min(e for _, e in points)
    slopes = [(after - before) / (high - low) for (low, before), (high, after) in pairwise(hull)]
    assert slopes == sorted(slopes)
    for (low, before), (high, after) in pairwise(hull):
        assert height(hull, (low + high) / 2) == pytest.approx((before + after) / 2)


def test_a_sum_of_hulls_is_the_hull_of_all_sums() -> None:
    chance = random.Random(2)
    hulls = [lower_hull([(chance.randrange(50), chance.random()) for _ in range(12)]) for _ in range(3)]
    sums = [tuple(map(sum, zip(*points, strict=True))) for points in product(*hulls)]
    brute = lower_hull(sums)  # type: ignore[arg-type]
    made = sum_of_hulls(hulls)
    for size in range(int(brute[0][0]), int(brute[-1][0]) + 5):
        assert height(made, size) == pytest.approx(height(brute, size))


def test_errors_of_factorized_schemes_are_log_linear_in_bytes() -> None:
    points = [(10, math.exp(-1.0)), (20, math.exp(-2.0)), (40, math.exp(-2.5))]
    expected = {10: -1.0, 15: -1.5, 30: -2.25, 5: -0.5, 50: -2.75}
    for size, logarithm in expected.items():
        assert math.log(between(points, size)) == pytest.approx(logarithm)
    assert between(points[:1], 77) == pytest.approx(points[0][1])
    assert between([(10, 0.1), (20, 0.2)], 30) == pytest.approx(0.1)  # bytes never harm
