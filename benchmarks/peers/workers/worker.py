"""What every peer's worker shares: it sits in the peer's own environment and answers requests, one JSON object a line.

{"case": {...}}   build the case; answer {"ok": true}, or {"ok": false, "why": "..."} when the peer cannot run it
{"save": PATH}    run once and save the output as .npy
{"samples": n, "seconds": s}  answer {"seconds": [...]}: n samples, each a mean over enough runs to take s seconds

A case is {"op": "matmul", "weight": W.npy, "x": X.npy, "form": "planes"}: W [M, K] @ X [K, N], or with the form "linear"
X [N, K] @ W.T; or {"op": "network", "onnx": PATH, "x": X.npy}: the ONNX model at PATH on one input.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]


def onnx_file(case: dict) -> tuple[str, str, np.ndarray]:
    """Return an ONNX file for the case, the name of its input, and the input."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    x = np.load(case["x"])
    if case["op"] == "network":
        return case["onnx"], onnx.load(case["onnx"]).graph.input[0].name, x
    weight = np.load(case["weight"])
    if case["form"] == "planes":  # a 1 x 1 convolution over the plane
        x = x.reshape(1, *x.shape, 1)
        kernel, node = weight[:, :, None, None], helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1])
        out = [1, weight.shape[0], x.shape[2], 1]
    else:
        kernel, node = weight, helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        out = [x.shape[0], weight.shape[0]]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.ascontiguousarray(kernel), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    path = f"{case['x']}.{os.getpid()}.onnx"
    onnx.save(model, path)
    return path, "x", x


def sample(run: Run, seconds: float) -> float:
    """Return the mean seconds of one run, over as many runs as take `seconds`."""
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    times = max(1, int(seconds / max(once, 1e-7)))
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def serve(build: Callable[[dict], Run]) -> None:
    """Answer requests on standard input until it ends; whatever else prints, prints to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run: Run = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                run = build(request["case"])
                run()
                answer: dict = {"ok": True}
            elif "save" in request:
                np.save(request["save"], np.asarray(run(), dtype=np.float32))
                answer = {"ok": True}
            else:
                answer = {"seconds": [sample(run, request["seconds"]) for _ in range(request["samples"])]}
        except Exception as error:
            answer = {"ok": False, "why": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
