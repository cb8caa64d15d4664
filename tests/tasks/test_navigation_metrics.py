"""Navigation metrics by hand, on a street and on a grid."""

import math

import pytest

from vlmfast.tasks.navigation_metrics import Trajectory, navigation_scores, ndtw, path_length


def street(a, b):
    return float(abs(a - b))


def grid(a, b):
    return float(abs(a[0] - b[0]) + abs(a[1] - b[1]))


def test_success_spl_and_error_by_hand():
    scores = navigation_scores(
        [
            Trajectory([0, 5, 10], 10, street),  # straight there
            Trajectory([0, -5, 9], 10, street),  # 19 walked for 10, stops 1 m short
            Trajectory([0, 10, 4], 10, street),  # passes the goal
            Trajectory([0, 7], 10, street),  # 3 m is not nearer than 3 m
        ]
    )
    assert scores.success_rate == 0.5 and scores.oracle_success_rate == 0.75 and scores.count == 4
    assert scores.spl == pytest.approx((1 + 10 / 19) / 4)
    assert scores.navigation_error == pytest.approx((0 + 1 + 6 + 3) / 4)
    assert scores.trajectory_length == pytest.approx((10 + 19 + 16 + 7) / 4)
    assert scores.success_standard_error == pytest.approx(0.25)
    assert scores.ndtw is None and scores.sdtw is None


def test_a_shorter_walk_than_the_way_counts_once():
    # stops inside the threshold before the goal: max(p, l) keeps SPL at 1
    assert navigation_scores([Trajectory([0, 8], 10, street)]).spl == 1.0


def test_starting_at_the_goal():
    assert navigation_scores([Trajectory([4], 4, street)]).spl == 1.0
    assert navigation_scores([Trajectory([4, 6, 4], 4, street)]).spl == 0.0


def test_grid_success_means_being_there():
    paths = [Trajectory([(0, 0), (0, 1), (1, 1)], (1, 1), grid), Trajectory([(0, 0), (0, 1)], (1, 1), grid)]
    assert navigation_scores(paths, threshold=0, inclusive=True).success_rate == 0.5
    assert navigation_scores(paths, threshold=0).success_rate == 0.0


def test_ndtw_by_hand():
    assert ndtw([0, 1, 2], [0, 1, 2], street) == 1.0
    # best alignment of 0, 2 with 0, 1, 2: the middle costs 1
    assert ndtw([0, 2], [0, 1, 2], street, threshold=3.0) == pytest.approx(math.exp(-1 / 9))
    assert ndtw([0, 0, 0, 2, 2], [0, 2], street) == 1.0  # waiting costs nothing
    assert ndtw([2, 0], [0, 2], street) == pytest.approx(math.exp(-4 / 6))
    scores = navigation_scores([Trajectory([0, 2], 2, street, [0, 1, 2]), Trajectory([0, 0], 9, street, [0, 9])])
    assert scores.ndtw == pytest.approx((math.exp(-1 / 9) + math.exp(-9 / 6)) / 2)
    assert scores.sdtw == pytest.approx(math.exp(-1 / 9) / 2)


def test_graph_distances_are_walks(tmp_path):
    from vlmfast.data.annotations import NavigationGraph

    square = {"a": (0.0, 0.0, 0.0), "b": (4.0, 0.0, 0.0), "c": (4.0, 3.0, 0.0)}
    graph = NavigationGraph(square, {"a": ("b",), "b": ("a", "c"), "c": ("b",)})
    scores = navigation_scores([Trajectory(["a", "b"], "c", graph.distance)])
    assert scores.navigation_error == 3.0 and scores.success_rate == 0.0
    assert path_length(["a", "b", "c"], graph.distance) == 7.0


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="no trajectories"):
        navigation_scores([])
    with pytest.raises(ValueError, match="trajectory 1 has an empty path"):
        navigation_scores([Trajectory([0], 0, street), Trajectory([], 0, street)])
    with pytest.raises(ValueError, match="goal of trajectory 0 is out of reach"):
        navigation_scores([Trajectory([0], 1, lambda a, b: math.inf)])
    with pytest.raises(ValueError, match="threshold is 0"):
        ndtw([0], [0], street, 0)
