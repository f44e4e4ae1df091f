"""ONNX Runtime, CPU provider: dense, whatever zeros the weights hold."""

import os

from worker import onnx_file, serve


def build(case):
    import onnxruntime as ort

    path, name, x = onnx_file(case)
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {name: x})[0]


serve(build)
