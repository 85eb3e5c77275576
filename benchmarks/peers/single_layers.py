# SPDX-License-Identifier: Apache-2.0
"""One linear layer in low precision, by other libraries: what ``runtime.py`` puts beside ours.

Each function returns calls that do the same with different copies of a weight, or ``None`` where
its library cannot be imported. Weights are random: only time is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def openvino_layer(bits: int, x: torch.Tensor, outputs: int, count: int) -> Calls | None:
    """A product with weights of a few bits in OpenVINO, on one thread, as its exporters write it.

    Groups of 64 with four bits, channels with eight; activations are made int8 by groups on the
    way, which is what it does by itself where the processor has the instructions.
    """
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError:
        return None
    inputs, random = x.shape[1], np.random.default_rng(0)
    wide = GROUP if bits == 4 else inputs
    groups = inputs // wide
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core, requests = openvino.Core(), []
    for _ in range(count):
        codes = random.integers(0, 256, (outputs, groups, wide * bits // 8), dtype=np.uint8)
        kind = openvino.Type.i4 if bits == 4 else openvino.Type.i8
        tensor = openvino.Tensor(codes.view(np.int8), [outputs, groups, wide], kind)
        numbers = ops.convert(ops.constant(tensor, shared_memory=False), np.float16)
        scales = ops.constant(np.full((outputs, groups, 1), 0.01, dtype=np.float16))
        dense = ops.reshape(ops.multiply(numbers, scales), [outputs, inputs], special_zero=False)
        entry = ops.parameter([-1, inputs], np.float32)
        product = ops.matmul(entry, ops.convert(dense, np.float32), False, True)
        compiled = core.compile_model(openvino.Model([product], [entry]), "CPU", settings)
        requests.append(compiled.create_infer_request())
    feed = openvino.Tensor(np.ascontiguousarray(x.numpy()))
    for request in requests:
        request.set_input_tensor(feed)
    return [request.infer for request in requests]


PEERS: tuple[tuple[str, str, float, Callable[[torch.Tensor, int, int], Calls | None]], ...] = (
    # weights, library, bytes of a number, calls
    ("int4 g64", "ONNX Runtime", 0.5 + 4 / GROUP, onnxruntime_int4),
    ("int4 g64", "OpenVINO", 0.5 + 2 / GROUP, partial(openvino_layer, 4)),
    ("int8", "torchao", 1, torchao_int8),
    ("int8", "OpenVINO", 1, partial(openvino_layer, 8)),
    ("int8, int8 activations", "torchao", 1, torchao_int8_dynamic),
)
