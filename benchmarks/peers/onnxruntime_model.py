# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's int4 model, measured as ``runtime_model.py`` measures: decoding and prefill.

    pip install onnxruntime-genai onnx onnx-ir transformers
    python -m onnxruntime_genai.models.builder -i WORKSPACE/model -o FOLDER -p int4 -e cpu \
        -c CACHE --extra_options int4_accuracy_level=4 int4_is_symmetric=true
    python benchmarks/peers/onnxruntime_model.py FOLDER [--repeats 5]

The builder writes ``MatMulNBits`` with int8 arithmetic, grouped attention, and one int4 table for
embedding and head, the fastest that ONNX Runtime has for a CPU. One thread; seconds of the
processor; the median, and the shortest. A prompt of 64 tokens is continued by 8, and one of 512 is
read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import onnxruntime_genai  # type: ignore[import-not-found]

PROMPT, TOKENS, LENGTH = 64, 8, 512


def seconds(work: Callable[[], object]) -> float:
    """Return the processor's time for a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    """Read the command line and print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = onnxruntime_genai.Config(options.folder)
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    model = onnxruntime_genai.Model(config)
    prompt = [1000 + n for n in range(LENGTH)]
    decode, prefill = [], []
    for turn in range(options.repeats + 1):
        generator = begin(model)
        generator.append_tokens(prompt[:PROMPT])
        each = [seconds(lambda g=generator, n=n: g.append_tokens([n])) for n in prompt[:TOKENS]]
        generator = begin(model)
        whole = seconds(lambda g=generator: g.append_tokens(prompt))
        if turn:
            decode += each
            prefill.append(whole)
    for name, taken in (("decode", decode), ("prefill", prefill)):
        print(f"{name}: {statistics.median(taken) * 1e3:.1f} ms, best {min(taken) * 1e3:.1f} ms")


def begin(model: onnxruntime_genai.Model) -> onnxruntime_genai.Generator:
    """Return a generator with an empty cache."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=1024)
    return onnxruntime_genai.Generator(model, parameters)


if __name__ == "__main__":
    main()
