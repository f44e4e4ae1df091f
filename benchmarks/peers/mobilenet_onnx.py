"""MobileNetV1 as an ONNX file from the weights that benchmarks/program.py drew; runs in a peer's environment, which has onnx.

python mobilenet_onnx.py WEIGHTS.npz BATCH OUT.onnx
"""

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def main(weights: str, batch: int, out: str) -> None:
    w = np.load(weights)
    nodes, constants, x = [], [], "x"
    strides = {"stem": 2, **{f"dw{i}": int(s) for i, s in enumerate(w["strides"])}}
    for name in ["stem", *(f"{kind}{i}" for i in range(len(w["strides"])) for kind in ("dw", "pw"))]:
        kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        constants += [numpy_helper.from_array(kernel, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
        k, s = kernel.shape[2], strides.get(name, 1)
        groups = kernel.shape[0] if name.startswith("dw") else 1
        nodes.append(
            helper.make_node(
                "Conv",
                [x, f"{name}.weight", f"{name}.bias"],
                [f"{name}.sum"],
                kernel_shape=[k, k],
                strides=[s, s],
                pads=[k // 2] * 4,
                group=groups,
            )
        )
        nodes.append(helper.make_node("Relu", [f"{name}.sum"], [name]))
        x = name
    constants += [numpy_helper.from_array(w[f"fc.{part}"], f"fc.{part}") for part in ("weight", "bias")]
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pool"]))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], transB=1))
    graph = helper.make_graph(
        nodes,
        "mobilenet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 1000])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
