"""OpenVINO in float32 (its default on this kind of CPU is bfloat16): dense, whatever zeros the weights hold."""

import os

import openvino as ov
from worker import onnx_file, serve


def build(case):
    path, _, x = onnx_file(case)
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    model = core.read_model(path)
    model.reshape(list(x.shape))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def run():
        request.infer()
        return request.get_output_tensor().data

    return run


serve(build)
