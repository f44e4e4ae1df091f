"""scipy's CSR matrices; one thread."""

import numpy as np
import scipy.sparse
from worker import serve


def build(case):
    weight = scipy.sparse.csr_matrix(np.load(case["weight"]))
    x = np.load(case["x"])
    if case["form"] == "planes":
        return lambda: weight @ x
    return lambda: (weight @ x.T).T


serve(build)
