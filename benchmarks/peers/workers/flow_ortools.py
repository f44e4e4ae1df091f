"""OR-Tools' min-cost flow on tiles, one by one: python flow_ortools.py tiles.npy masks.npy n.

Tiles are float64 [T, m, m]; masks come out as uint8 of that shape, and the seconds on standard output. Costs are whole numbers
there, so scores are scaled to 40 bits.
"""

import sys
import time

import numpy as np
from ortools.graph.python import min_cost_flow


def solve(tile: np.ndarray, n: int) -> np.ndarray:
    """Row i sends n units to the columns over edges of capacity one; edges that carry one are kept."""
    m = len(tile)
    flow = min_cost_flow.SimpleMinCostFlow()
    rows, columns = np.divmod(np.arange(m * m), m)
    costs = -np.rint(tile.ravel() / np.abs(tile).max() * 2.0**40).astype(np.int64)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(rows, columns + m, np.ones(m * m, np.int64), costs)
    flow.set_nodes_supplies(np.arange(2 * m), np.repeat([n, -n], m))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise RuntimeError(f"OR-Tools: status {status}")
    return flow.flows(arcs).reshape(m, m)


if __name__ == "__main__":
    tiles, n = np.load(sys.argv[1]), int(sys.argv[3])
    masks = np.empty(tiles.shape, np.uint8)
    start = time.perf_counter()
    for t, tile in enumerate(tiles):
        masks[t] = solve(tile, n)
    print(time.perf_counter() - start)
    np.save(sys.argv[2], masks)
