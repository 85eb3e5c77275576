# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on a GGUF file, measured as ``runtime_model.py`` measures: decoding and prefill.

    pip install llama-cpp-python
    python benchmarks/peers/llamacpp_model.py FILE.gguf [--repeats 5]

One thread; seconds of the processor; the median, and the shortest. A prompt of 64 tokens is
continued by 8 tokens, and one of 512 is read. Built for AMX, llama-cpp-python 0.3.36 crashes on
weights that it rearranged: build it without (``CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON
-DGGML_AVX512_VNNI=ON ..."``), or give ``--as-in-the-file``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import llama_cpp  # type: ignore[import-not-found]

PROMPT, TOKENS, LENGTH = 64, 8, 512


def seconds(work: Callable[[], object]) -> float:
    """Return the processor's time for a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def as_in_the_file(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a maker of parameters that leaves weights in the order of the file."""

    def changed() -> Any:
        parameters = make()
        parameters.use_extra_bufts = False
        return parameters

    return changed


def main() -> None:
    """Read the command line and print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--as-in-the-file", action="store_true", help="do not rearrange weights")
    options = parser.parse_args()
    library = llama_cpp.llama_cpp
    if options.as_in_the_file:
        library.llama_model_default_params = as_in_the_file(library.llama_model_default_params)
    model = llama_cpp.Llama(
        options.file, n_ctx=1024, n_batch=LENGTH, n_threads=1, n_threads_batch=1, verbose=False
    )
    prompt = [1000 + n for n in range(LENGTH)]
    decode, prefill = [], []
    for turn in range(options.repeats + 1):
        model.reset()
        model.eval(prompt[:PROMPT])
        each = [seconds(lambda n=n: model.eval([n])) for n in prompt[:TOKENS]]
        model.reset()
        whole = seconds(lambda: model.eval(prompt))
        if turn:
            decode += each
            prefill.append(whole)
    for name, taken in (("decode", decode), ("prefill", prefill)):
        print(f"{name}: {statistics.median(taken) * 1e3:.1f} ms, best {min(taken) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
