# SPDX-License-Identifier: Apache-2.0
"""One linear layer in low precision, by other libraries: what ``runtime.py`` puts beside ours.

Each function returns calls that do the same with different copies of a weight, or ``None`` where
its library cannot be imported. Weights are random: only time is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Calls = list[Callable[[], object]]
GROUP = 64


def torchao_int8(x: torch.Tensor, outputs: int, count: int) -> Calls | None:
    """Int8 weights in torchao, eager: floats times weights that are cast."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    layers = []
    for _ in range(count):
        layer = torch.nn.Sequential(torch.nn.Linear(x.shape[1], outputs, bias=False))
        quantize_(layer, Int8WeightOnlyConfig())
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


def torchao_int8_dynamic(x: torch.Tensor, outputs: int, count: int) -> Calls | None:
    """Int8 weights and int8 activations in torchao, eager."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    layers = []
    for _ in range(count):
        layer = torch.nn.Sequential(torch.nn.Linear(x.shape[1], outputs, bias=False))
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


def onnxruntime_int4(x: torch.Tensor, outputs: int, count: int) -> Calls | None:
    """``MatMulNBits`` of ONNX Runtime with int8 arithmetic (accuracy level 4), on one thread."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    inputs = x.shape[1]
    groups = inputs // GROUP
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    random = np.random.default_rng(0)
    sessions = []
    for _ in range(count):
        codes = random.integers(0, 256, (outputs, groups, GROUP // 2), dtype=np.uint8)
        scales = np.full(outputs * groups, 0.01, dtype=np.float32)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            **{"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP, "accuracy_level": 4},
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, inputs])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, outputs])],
            [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
        )
        versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    feed = {"x": x.numpy()}
    return [lambda session=session: session.run(None, feed) for session in sessions]


PEERS: tuple[tuple[str, str, float, Callable[[torch.Tensor, int, int], Calls | None]], ...] = (
    # weights, library, bytes of a number, calls
    ("int4 g64", "ONNX Runtime", 0.5 + 4 / GROUP, onnxruntime_int4),
    ("int8", "torchao", 1, torchao_int8),
    ("int8, int8 activations", "torchao", 1, torchao_int8_dynamic),
)
