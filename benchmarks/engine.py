# SPDX-License-Identifier: Apache-2.0
"""What the engine costs: imports, applying a mode, restoring it, by the number of modules.

Prints one table, or JSON. All figures are seconds of processor time of a child process (all its
threads), which is less disturbed by other programs than the clock; each is the median of several
children. Where the peer, nvidia-modelopt, can be imported, the same is measured of it in the same
run; ``--peer-python`` names the interpreter of another environment that has it.

    python benchmarks/engine.py [--peer-python PATH] [--repeat 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SIZES = (1_000, 2_500, 5_000, 10_000)
MODULES_IN_BLOCK = 100
SIDES = ("modewright", "peer")
IMPORTS = {
    "modewright": {
        "import": "import modewright",
        "import, apply_mode": "import modewright; modewright.apply_mode",
        "import torch": "import torch",
    },
    "peer": {
        "import": "import modelopt",
        "import, apply_mode": "import modelopt.torch.opt as mto; mto.apply_mode",
        "import torch": "import torch",
    },
}
_TIME_IMPORT = """
import sys, time
before, start = len(sys.modules), time.process_time()
{statement}
print([time.process_time() - start, len(sys.modules) - before])
"""

# What is measured, for the table; "(atomic=False)" is compared with the same figure of the peer.
CHANGES = {"nothing": "changes nothing", "swap": "swaps all modules"}
APPLY, RESTORE, BARE = "apply", "restore from the state", "swap all modules, no engine"
SAVE, LOAD = "save to a file", "restore from the file"
UNSAFE = " (atomic=False)"

Figures = dict[str, float]


@dataclass(frozen=True)
class Side:
    """The verbs of one engine; modes are named "nothing" and "swap"."""

    apply: Callable[[Any, str, bool], Any]
    state: Callable[[Any], Any]
    restore: Callable[[Any, Any], Any]
    save: Callable[[Any, str], Any]
    load: Callable[[Any, str], Any]


def modewright_side() -> Side:
    """Return modewright with the two modes."""
    import modewright

    def mode(mode_name: str, change: Callable[[Any], None]) -> type:
        class Mode(modewright.ModeDescriptor[modewright.ModeConfig]):
            name = mode_name
            config_class = modewright.ModeConfig
            writes_in_place = False

            def convert(self, model: Any, config: Any) -> Any:
                change(model)
                return model, {}

            def restore(self, model: Any, config: Any, metadata: Any) -> Any:
                change(model)
                return model

        return Mode

    registry = modewright.ModeRegistry([mode("nothing", lambda model: None), mode("swap", swap)])
    return Side(
        lambda model, name, atomic: modewright.apply_mode(
            model, name, registry=registry, atomic=atomic
        ),
        modewright.mode_state,
        lambda model, state: modewright.restore_from_mode_state(model, state, registry=registry),
        modewright.save,
        lambda model, path: modewright.restore(model, path, registry=registry),
    )


def peer_side() -> Side:
    """Return the peer with the two modes."""
    import modelopt.torch.opt as mto
    from modelopt.torch.opt.config import ModeloptBaseConfig
    from modelopt.torch.opt.mode import ModeDescriptor, _ModeRegistryCls

    def convert(change: Callable[[Any], None]) -> Callable[..., Any]:
        def entry_point(model: Any, config: Any) -> Any:
            change(model)
            return model, {}

        return entry_point

    def restore(change: Callable[[Any], None]) -> Callable[..., Any]:
        def entry_point(model: Any, config: Any, metadata: Any) -> Any:
            change(model)
            return model

        return entry_point

    def mode(mode_name: str, change: Callable[[Any], None]) -> type:
        members = {
            "name": mode_name,
            "config_class": ModeloptBaseConfig,
            "convert": convert(change),
            "restore": restore(change),
        }
        properties = {k: property(lambda self, v=v: v) for k, v in members.items()}
        return type(mode_name, (ModeDescriptor,), properties)

    registry = _ModeRegistryCls("bench")
    registry.register_mode(mode("nothing", lambda model: None))
    registry.register_mode(mode("swap", swap))
    return Side(
        lambda model, name, atomic: mto.apply_mode(model, name, registry=registry),
        mto.modelopt_state,
        mto.restore_from_modelopt_state,
        mto.save,
        mto.restore,
    )


def build(modules: int) -> Any:
    """Return a model of that many modules: blocks of linear layers."""
    from torch import nn

    layers = MODULES_IN_BLOCK - 1
    return nn.Sequential(
        *(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
            for _ in range(modules // MODULES_IN_BLOCK)
        )
    )


def swap(model: Any) -> None:
    """Put a new module in the place of every layer, with the parameters of the old one."""
    from torch import nn

    for block in model.children():
        for name, layer in block.named_children():
            new = nn.Module()
            new.weight, new.bias = layer.weight, layer.bias
            setattr(block, name, new)


def measure(side_name: str, folder: str) -> Figures:
    """Measure everything but imports once; runs in a child."""
    import gc
    import time

    import torch

    torch.set_num_threads(1)
    side = modewright_side() if side_name == "modewright" else peer_side()
    figures: Figures = {}

    def timed(what: str, modules: int, call: Callable[[], Any]) -> Any:
        gc.collect()
        start = time.process_time()
        result = call()
        figures[f"{what}/{modules}"] = time.process_time() - start
        return result

    def run(modules: int) -> None:
        for mode, change in CHANGES.items():
            model, again, fresh = build(modules), build(modules), build(modules)
            what = f"{APPLY}, {change}"
            timed(what, modules, partial(side.apply, model, mode, True))
            if side_name == "modewright":
                timed(what + UNSAFE, modules, partial(side.apply, again, mode, False))
            state = side.state(model)
            timed(f"{RESTORE}, {change}", modules, partial(side.restore, fresh, state))
        timed(BARE, modules, partial(swap, build(modules)))

    run(MODULES_IN_BLOCK)  # what is loaded and compiled at first use is not measured
    figures.clear()
    for modules in SIZES:
        run(modules)
    path = str(Path(folder) / ("model.safetensors" if side_name == "modewright" else "model.pt"))
    model = side.apply(build(SIZES[-1]), "nothing", True)
    timed(SAVE, SIZES[-1], lambda: side.save(model, path))
    fresh = build(SIZES[-1])
    timed(LOAD, SIZES[-1], lambda: side.load(fresh, path))
    return figures


def child(python: str, arguments: Sequence[str]) -> Any:
    """Run a child and return the JSON on the last line that it prints."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def figures_of(side: str, repeat: int) -> Figures:
    """Return the medians of all figures of one side, measured with this interpreter."""
    import tempfile

    samples: dict[str, list[float]] = {}
    for _ in range(repeat):
        for what, statement in IMPORTS[side].items():
            seconds, loaded = child(
                sys.executable, ["-c", _TIME_IMPORT.format(statement=statement)]
            )
            samples.setdefault(what, []).append(seconds)
            samples.setdefault(f"{what}: modules loaded", []).append(loaded)
        with tempfile.TemporaryDirectory() as folder:
            for what, seconds in child(
                sys.executable, [__file__, "--measure", side, folder]
            ).items():
                samples.setdefault(what, []).append(seconds)
    return {what: statistics.median(values) for what, values in samples.items()}


def peer_figures(python: str, repeat: int) -> Figures | None:
    """Return the figures of the peer as ``python`` sees it; ``None`` if it is not installed."""
    found = child(
        python,
        ["-c", "from importlib.util import find_spec as f; print('01'[f('modelopt') is not None])"],
    )
    if not found:
        return None
    figures: Figures = child(python, [__file__, "--peer-only", "--repeat", str(repeat)])
    return figures


def table(own: Figures, peer: Figures | None) -> str:
    """Return the figures for people."""
    head = f"{'':52}{'modewright':>12}{'peer':>14}{'ratio':>8}{'per module':>12}"
    lines = [head, "-" * len(head)]
    for what, value in own.items():
        name, _, modules = what.partition("/")
        theirs = (peer or {}).get(what.replace(UNSAFE, ""))
        counted = name.endswith("loaded")
        shown = [f"{v:.0f}" if counted else f"{v * 1e3:.1f} ms" for v in (value, theirs) if v]
        shown += ["not installed" if peer is None else "-"] * (2 - len(shown))
        ratio = f"{theirs / value:.1f}x" if theirs and value else ""
        each = f"{value / int(modules) * 1e6:.2f} us" if modules else ""
        label = f"{name}{f', {int(modules):,}' if modules else ''}"
        lines.append(f"{label:52}{shown[0]:>12}{shown[1]:>14}{ratio:>8}{each:>12}")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with the peer")
    parser.add_argument("--repeat", type=int, default=5, help="children for each figure")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--peer-only", action="store_true", help="print the peer's figures as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
    elif options.peer_only:
        print(json.dumps(figures_of("peer", options.repeat)))
    else:
        own = figures_of("modewright", options.repeat)
        peer = peer_figures(options.peer_python, options.repeat)
        report = {"modewright": own, "peer": peer}
        print(json.dumps(report, indent=2) if options.json else table(own, peer))


if __name__ == "__main__":
    main()
