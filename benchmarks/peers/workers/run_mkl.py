"""MKL's inspector-executor sparse routines, through ctypes."""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
from worker import serve

os.environ.setdefault("MKL_THREADING_LAYER", "INTEL")
library = ctypes.CDLL(str(next(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))), mode=ctypes.RTLD_GLOBAL)
NON_TRANSPOSE, GENERAL, ROW_MAJOR, COLUMN_MAJOR = 10, 20, 101, 102


class Description(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int)]


def check(status):
    if status:
        raise RuntimeError(f"MKL status {status}")


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def build(case):
    weight, x = np.load(case["weight"]), np.load(case["x"])
    rows, columns = weight.shape
    crow = np.concatenate([[0], np.cumsum((weight != 0).sum(1))]).astype(np.int32)
    col, values = np.nonzero(weight)[1].astype(np.int32), weight[weight != 0]
    handle = ctypes.c_void_p()
    size = crow.itemsize
    check(
        library.mkl_sparse_s_create_csr(
            ctypes.byref(handle), 0, rows, columns, pointer(crow), ctypes.c_void_p(crow.ctypes.data + size),
            pointer(col), pointer(values),
        )
    )  # fmt: skip
    how = Description(GENERAL, 0, 0)
    planes = case["form"] == "planes"
    count = x.shape[1] if planes else x.shape[0]
    y = np.zeros((rows, count) if planes else (count, rows), np.float32)
    layout, ldx, ldy = (ROW_MAJOR, count, count) if planes else (COLUMN_MAJOR, columns, rows)
    one, nought = ctypes.c_float(1), ctypes.c_float(0)
    if count == 1:
        check(library.mkl_sparse_set_mv_hint(handle, NON_TRANSPOSE, how, 1000))
    else:
        check(library.mkl_sparse_set_mm_hint(handle, NON_TRANSPOSE, how, layout, count, 1000))
    check(library.mkl_sparse_optimize(handle))

    def run(keep=(crow, col, values)):
        if count == 1:
            library.mkl_sparse_s_mv(NON_TRANSPOSE, one, handle, how, pointer(x), nought, pointer(y))
        else:
            library.mkl_sparse_s_mm(
                NON_TRANSPOSE, one, handle, how, layout, pointer(x), count, ldx, nought, pointer(y), ldy
            )
        return y

    return run


serve(build)
