"""Metrics of agents that follow instructions: success, SPL, navigation error, and fidelity to the path."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Distance = Callable[[Hashable, Hashable], float]


@dataclass(frozen=True)
class Trajectory:
    """What an agent did, and what it should have done.

    Attributes:
        path: places in order, the start first; it stopped at the last.
        goal: where it should have stopped.
        distance: length of the shortest way between two places, in metres (or steps), such as
            `NavigationGraph.distance`.
        reference: the path of the instruction; None leaves nDTW out.
    """

    path: Sequence[Hashable]
    goal: Hashable
    distance: Distance
    reference: Sequence[Hashable] | None = None


@dataclass(frozen=True)
class NavigationScores:
    """Means over trajectories.

    Attributes:
        success_rate: share that stopped nearer to the goal than the threshold (SR).
        oracle_success_rate: share that came that near at any time.
        spl: success weighted by path length.
        navigation_error: distance from the goal at the end.
        trajectory_length: length walked.
        ndtw, sdtw: fidelity to the reference, and the same counted for successes only; None without references.
        success_standard_error: of `success_rate`.
        count: trajectories.
    """

    success_rate: float
    oracle_success_rate: float
    spl: float
    navigation_error: float
    trajectory_length: float
    ndtw: float | None
    sdtw: float | None
    success_standard_error: float
    count: int


def navigation_scores(
    trajectories: Sequence[Trajectory], *, threshold: float = 3.0, inclusive: bool = False
) -> NavigationScores:
    r"""Success rate, SPL and navigation error.

    .. math:: \mathrm{SPL} = \frac{1}{N} \sum_i S_i \frac{\ell_i}{\max(p_i, \ell_i)}

    with S success, l the shortest way from start to goal and p the length walked; a start at the goal counts S where
    the agent stays.

    Args:
        trajectories: N >= 1.
        threshold: of success and the unit of nDTW, in the unit of `distance`; R2R takes 3 m. With 0 nDTW takes 1.
        inclusive: count a distance equal to the threshold as success, for grids: `threshold=0, inclusive=True`.

    Raises:
        ValueError: no trajectories, an empty path, or a goal out of reach of the start.

    Papers: On Evaluation of Embodied Navigation Agents (Anderson et al. 2018, arXiv:1807.06757); nDTW and SDTW in
    Ilharco et al. 2019, arXiv:1907.05446.
    """
    if not trajectories:
        raise ValueError("navigation_scores: there are no trajectories")

    def near(distance: float) -> bool:
        return distance <= threshold if inclusive else distance < threshold

    rows = []
    for i, trajectory in enumerate(trajectories):
        if not len(trajectory.path):
            raise ValueError(f"navigation_scores: trajectory {i} has an empty path, must hold the start")
        to_goal = [trajectory.distance(place, trajectory.goal) for place in trajectory.path]
        if not math.isfinite(to_goal[0]):
            raise ValueError(f"navigation_scores: the goal of trajectory {i} is out of reach of its start")
        walked = path_length(trajectory.path, trajectory.distance)
        success = near(to_goal[-1])
        longer = max(walked, to_goal[0])
        rows.append((success, any(map(near, to_goal)), success * (to_goal[0] / longer if longer else 1.0), to_goal[-1],
                     walked))  # fmt: skip
    success, oracle, spl, error, walked = np.array(rows, dtype=np.float64).T
    warped = None
    if all(t.reference is not None for t in trajectories):
        warped = np.array([ndtw(t.path, t.reference, t.distance, threshold or 1.0) for t in trajectories])
    return NavigationScores(
        float(success.mean()),
        float(oracle.mean()),
        float(spl.mean()),
        float(error.mean()),
        float(walked.mean()),
        None if warped is None else float(warped.mean()),
        None if warped is None else float((warped * success).mean()),
        float(np.sqrt(success.var() / len(success))),
        len(success),
    )


def path_length(path: Sequence[Hashable], distance: Distance) -> float:
    """Sum of the distances between neighbours on the path."""
    return float(sum(distance(a, b) for a, b in zip(path[:-1], path[1:], strict=True)))


def ndtw(path: Sequence[Hashable], reference: Sequence[Hashable], distance: Distance, threshold: float = 3.0) -> float:
    """exp(-DTW(path, reference) / (len(reference) * threshold)), 0 ... 1; 1 for the reference itself.

    Paper: Ilharco et al. 2019 (arXiv:1907.05446), eq. 5-7.

    Raises:
        ValueError: an empty path, or a threshold that is not positive.
    """
    if not len(path) or not len(reference) or not threshold > 0:
        raise ValueError(f"ndtw: path has {len(path)} places, reference {len(reference)}, threshold is {threshold}; "
                         "all must be positive")
    costs = np.full(len(reference) + 1, math.inf)
    costs[0] = 0.0
    for here in path:
        previous, costs = costs, np.full_like(costs, math.inf)
        for j, there in enumerate(reference, 1):
            costs[j] = distance(here, there) + min(previous[j], previous[j - 1], costs[j - 1])
    return float(math.exp(-costs[-1] / (len(reference) * threshold)))
