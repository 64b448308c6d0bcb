"""SparseGPT written a second time, slowly, from the paper's section 3 (arXiv:2301.00774): optimal brain surgery.

One column of one row at a time, no Cholesky: each step inverts the Hessian of the columns that are left, anew.
float64 numpy throughout. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sparsegpt(weight: Array, hessian: Array, *, sparsity: float, group: int, block_size: int, damp: float) -> Array:
    """The weight [R, C] with its zeros, those that stay changed to make up for them."""
    W, H, C = weight.copy(), hessian.copy(), weight.shape[1]
    dead = np.diag(H) <= 0
    mean = np.diag(H)[~dead].mean()
    H[dead, dead] = mean
    H += damp * mean * np.eye(C)
    zero = np.zeros(W.shape, dtype=bool)
    for i in range(C):
        if i % (group or block_size) == 0:
            columns = range(i, min(i + (group or block_size), C))
            cost = {j: 0.0 if dead[j] else 1 / np.linalg.inv(H[j:, j:])[0, 0] for j in columns}
            loss = [[(W[r, j] ** 2 * cost[j], r, j) for j in columns] for r in range(len(W))]
            for compared in loss if group else [[one for row in loss for one in row]]:
                for _, r, j in sorted(compared)[: round(sparsity * len(compared))]:
                    zero[r, j] = True
        Hinv = np.linalg.inv(H[i:, i:])
        for r in np.flatnonzero(zero[:, i]):
            W[r, i:] -= W[r, i] / Hinv[0, 0] * Hinv[0]
            W[r, i] = 0
    return W
