"""R2R: instructions for routes through buildings, and the graphs of viewpoints they lead through."""

import heapq
import math
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .records import Annotations, Skip, checked, need, need_all, optional, read_json


@dataclass(frozen=True)
class RouteInstruction:
    """One instruction.

    Attributes:
        instruction_id: "path-number", as result files want it.
        path_id: id of the route.
        scan: the building.
        path: viewpoints from start to goal; only the start in a test set.
        heading: of the agent at the start in radians, 0 = north, clockwise.
        distance: length of the route in metres, or None.
        instruction: the text.
    """

    instruction_id: str
    path_id: int | str
    scan: str
    path: tuple[str, ...]
    heading: float
    distance: float | None
    instruction: str


def read_r2r(path: str | os.PathLike, *, scans: Container | None = None) -> Annotations[RouteInstruction]:
    """Instructions of R2R (`R2R_train.json`, `R2R_val_seen.json`, ...), mostly three a route.

    Args:
        path: the file.
        scans: buildings there are features or graphs for; None takes all, routes in others are skipped and counted.

    Raises:
        FileNotFoundError, ValueError: see the package.

    Paper: Vision-and-Language Navigation (Anderson et al. 2018, arXiv:1711.07280).
    """
    path = Path(path)
    return Annotations(_instructions(path, checked(read_json(path), "list", str(path), "the file"), scans))


def _instructions(path: Path, records: list, scans: Container | None) -> Iterator[RouteInstruction | Skip]:
    for i, record in enumerate(records):
        where = f"{path}: route {i}"
        checked(record, "object", where, "the record")
        number = need(record, "path_id", "id", where)
        where = f"{where} (path_id {number})"
        scan = need(record, "scan", "text", where)
        route = need_all(record, "path", "text", where)
        heading = float(need(record, "heading", "number", where))
        distance = optional(record, "distance", "number", where)
        if not route:
            raise ValueError(f"{where}: field 'path' is empty, must hold the start at least")
        for k, text in enumerate(need_all(record, "instructions", "text", where)):
            if scans is not None and scan not in scans:
                yield Skip("scan without features", where, f"scan {scan}")
            elif not text.strip():
                yield Skip("empty instruction", f"{where}, instruction {k}")
            else:
                yield RouteInstruction(f"{number}_{k}", number, scan, route, heading, distance, text.strip())


@dataclass(frozen=True, eq=False)
class NavigationGraph:
    """The viewpoints of a building.

    Attributes:
        positions: viewpoint -> x, y, z in metres.
        neighbours: viewpoint -> viewpoints one can walk to.
    """

    positions: dict[str, tuple[float, float, float]]
    neighbours: dict[str, tuple[str, ...]]

    def distance(self, start: str, goal: str) -> float:
        """Length of the shortest walk in metres, infinite where there is none.

        Raises:
            KeyError: an unknown viewpoint.
        """
        for viewpoint in (start, goal):
            if viewpoint not in self.positions:
                raise KeyError(f"NavigationGraph: no viewpoint {viewpoint!r} among {len(self.positions)}")
        if start not in self._lengths:
            self._lengths[start] = self._from(start)
        return self._lengths[start].get(goal, math.inf)

    @cached_property
    def _lengths(self) -> dict[str, dict[str, float]]:
        return {}

    def _from(self, start: str) -> dict[str, float]:
        done: dict[str, float] = {}
        queue = [(0.0, start)]
        while queue:
            length, here = heapq.heappop(queue)
            if here in done:
                continue
            done[here] = length
            for there in self.neighbours[here]:
                if there not in done:
                    step = math.dist(self.positions[here], self.positions[there])
                    heapq.heappush(queue, (length + step, there))
        return done


def read_connectivity(path: str | os.PathLike) -> NavigationGraph:
    """The graph of a building from the Matterport3D simulator's `SCAN_connectivity.json`.

    Raises:
        FileNotFoundError, ValueError: see the package.
    """
    path = Path(path)
    records = checked(read_json(path), "list", str(path), "the file")
    names, positions, open_to = [], {}, []
    for i, record in enumerate(records):
        where = f"{path}: viewpoint {i}"
        checked(record, "object", where, "the record")
        pose = need_all(record, "pose", "number", where, 16)
        names.append(need(record, "image_id", "text", where))
        links = need(record, "unobstructed", "list", where)
        if len(links) != len(records):
            raise ValueError(f"{where}: field 'unobstructed' has {len(links)} items, must have {len(records)}")
        if "included" not in record:
            raise ValueError(f"{where}: field 'included' is missing")
        open_to.append(links if record["included"] else None)
        if record["included"]:
            positions[names[-1]] = (float(pose[3]), float(pose[7]), float(pose[11]))
    neighbours = {
        name: tuple(names[j] for j, free in enumerate(links) if free and open_to[j] is not None)
        for name, links in zip(names, open_to, strict=True)
        if links is not None
    }
    return NavigationGraph(positions, neighbours)
