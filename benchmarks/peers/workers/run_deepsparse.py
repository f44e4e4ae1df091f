"""DeepSparse 1.8.0, the one engine that runs unstructured zeros faster; timed only, under its evaluation licence."""

import os

os.environ["NM_DISABLE_ANALYTICS"] = "True"
import deepsparse
from worker import onnx_file, serve


def build(case):
    path, _, x = onnx_file(case)
    engine = deepsparse.Engine(model=path, batch_size=x.shape[0], num_cores=int(os.environ["OMP_NUM_THREADS"]))
    return lambda: engine.run([x], val_inp=False)[0]


serve(build)
