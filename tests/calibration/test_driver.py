# SPDX-License-Identifier: Apache-2.0
"""The block driver against the network itself, run with hooks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modewright.calibration.block_progress import BlockProgress
from modewright.calibration.blocks import find_blocks
from modewright.calibration.driver import NOT_REACHED, Block, walk_blocks
from modewright.errors import DataError
from support.models import Block as Mlp

SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = {**SMALL, "num_hidden_layers": 3, "vocab_size": 20}


class Conversions:
    """Modules that were converted: what they put out is changed, unless they are as they were."""

    def __init__(self, *modules: nn.Module) -> None:
        self.converted: set[nn.Module] = set()
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        self.converted.add(module)
        module.register_forward_hook(self._change)

    @contextmanager
    def as_original(self, module: nn.Module) -> Iterator[None]:
        inside = self.converted & set(module.modules())
        self.converted -= inside
        try:
            yield
        finally:
            self.converted |= inside

    def _change(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module not in self.converted:
            return output
        if isinstance(output, tuple):
            return (output[0] * 1.5 + 0.25, *output[1:])
        return output * 1.5 + 0.25


class Recorder:
    """A visit that notes what a block brings, and converts it."""

    def __init__(self, *converted: nn.Module) -> None:
        self.conversions = Conversions(*converted)
        self.blocks: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.originals: dict[str, list[torch.Tensor]] = {}

    def __call__(self, block: Block) -> dict[str, Any]:
        now, before = ([_copy(c.hidden) for c in s] for s in (block.calls, block.original_calls))
        self.blocks[block.name] = now, before
        self.originals[block.name] = [o.clone() for o in block.original_outputs()]
        self.conversions.add(block.module)
        with torch.no_grad():
            self.outputs[block.name] = [block.run(call) for call in block.calls]
        return {"index": block.index}


def _copy(hidden: torch.Tensor | None) -> torch.Tensor:
    assert hidden is not None
    return hidden.clone()


def watched(model: nn.Module, names: Any, data: Any) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Run a model as it is; return inputs and outputs of its blocks."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {n: {"in": [], "out": []} for n in names}

    def before(name: str, args: Any, kwargs: Any) -> None:
        found[name]["in"].append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(name: str, output: Any) -> None:
        found[name]["out"].append((output[0] if isinstance(output, tuple) else output).clone())

    handles = []
    for n in names:
        module = model.get_submodule(n)
        pre, post = partial(before, n), partial(after, n)
        handles += [
            module.register_forward_pre_hook(lambda m, a, k, f=pre: f(a, k), with_kwargs=True),
            module.register_forward_hook(lambda m, a, o, f=post: f(o)),
        ]
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return found


def tokens(seed: int = 0, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 20, (2, length), generator=torch.Generator().manual_seed(seed))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def transformer(name: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = cls(cls.config_class(**config))
    return model.eval()


def llama() -> nn.Module:
    return transformer("LlamaForCausalLM", **TEXT, num_key_value_heads=1)


class Residual(nn.Module):
    """A residual block whose shape depends on the stage; it writes into its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x.relu_())
        return self.conv2(x.relu()) + x


class Staged(nn.Module):
    """Stages of residual blocks, with something between them that is in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.down = nn.AvgPool2d(2)
        self.second = nn.Sequential(Residual(4, 6), Residual(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Stack(nn.Module):
    """Blocks, called in any order, with something done between the calls."""

    def __init__(
        self, order: tuple[int, ...] = (0, 1, 2), between: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.order, self.between = order, between
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(Mlp(4, 6) for _ in range(3))

    def forward(self, x: torch.Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
        for index in self.order if order is None else order:
            x = self.blocks[index](x)
            if self.between is not None:
                x = self.between(x)
        return x


def rows(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(5, 4, generator=generator) for _ in range(count)]


def walk(model: nn.Module, data: object, visit: Any = None, **options: Any) -> dict[str, Any]:
    visit = Recorder() if visit is None else visit
    if "as_original" not in options:
        options["as_original"] = visit.conversions.as_original
    return walk_blocks(model, data, visit, **options)


def image_model(cls: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return cls().eval()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[Any], str]] = {
    "llama": (llama, [tokens(0), tokens(1, 5)], "model.embed_tokens"),
    "mixtral": (
        lambda: transformer(
            "MixtralForCausalLM", **TEXT, num_key_value_heads=1, num_local_experts=3
        ),
        [tokens(0)],
        "model.embed_tokens",
    ),
    "gpt2": (
        lambda: transformer(
            "GPT2LMHeadModel",
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0,
        ),
        [tokens(0), tokens(1)],
        "transformer.wte",
    ),
    "bert": (
        lambda: transformer("BertModel", **TEXT),
        [{"input_ids": tokens(0), "attention_mask": (tokens(1) > 5).long()}],
        "embeddings",
    ),
    "t5": (
        lambda: transformer(
            "T5ForConditionalGeneration",
            d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20,
            decoder_start_token_id=0,
        ),
        [{"input_ids": tokens(s), "decoder_input_ids": tokens(s + 5, 3)} for s in range(2)],
        "shared",
    ),
    "vit": (
        lambda: transformer(
            "ViTModel", **SMALL, num_hidden_layers=2, image_size=8, patch_size=4
        ),
        [images(0), images(1)],
        "embeddings",
    ),
    "torch": (
        lambda: image_model(
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2
            )
        ),
        [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))],
        "",
    ),
    "cnn": (lambda: image_model(Staged), [images(0), images(1)], "stem"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_get_what_the_network_gives_them(family: str) -> None:
    build, data, stem = FAMILIES[family]
    model = build()
    recorder = Recorder(*([model.get_submodule(stem)] if stem else []))
    found = walk(model, data, recorder)

    names = find_blocks(model)
    assert list(found) == list(names)
    assert list(recorder.blocks) == list(names)
    now = watched(model, names, data)
    with recorder.conversions.as_original(model):
        original = watched(model, names, data)
    for name in names:
        pairs = [
            (recorder.blocks[name][0], now[name]["in"]),
            (recorder.blocks[name][1], original[name]["in"]),
            (recorder.outputs[name], now[name]["out"]),
            (recorder.originals[name], original[name]["out"]),
        ]
        for got, expected in pairs:
            assert len(got) == len(expected) == len(data)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "order", [(0, 0, 0), (0, 1, 0, 1), (0, 1, 1, 2), (2, 0, 1), (0, 1, 0), (1, 1, 0, 2)]
)
def test_blocks_that_run_several_times_or_in_another_order(order: tuple[int, ...]) -> None:
    model, data, recorder = Stack(order), rows(), Recorder()
    found = walk(model, data, recorder)

    reached = list(dict.fromkeys(f"blocks.{i}" for i in order))
    assert list(recorder.blocks) == reached
    for index in {0, 1, 2} - set(order):
        assert found[f"blocks.{index}"] == {"": {"skipped": NOT_REACHED}}
    with recorder.conversions.as_original(model):
        original = watched(model, reached, data)
    for name in reached:
        got = recorder.blocks[name][1]
        assert len(got) == order.count(int(name[-1])) * len(data)
        for one, other in zip(got, original[name]["in"], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "between",
    [lambda x: x.mul_(2), lambda x: x * 2, lambda x: x],
    ids=["in place", "outside", "nothing"],
)
def test_what_happens_between_blocks_is_seen(between: Callable[..., Any]) -> None:
    model, data, recorder = Stack(between=between), rows(), Recorder()
    walk(model, data, recorder)
    now = watched(model, recorder.blocks, data)
    for name, (calls, _) in recorder.blocks.items():
        for one, other in zip(calls, now[name]["in"], strict=True):
            torch.testing.assert_close(one, other)


def test_a_chain_runs_the_network_a_fixed_number_of_times() -> None:
    model, runs = Stack(), []
    model.blocks[2].register_forward_hook(lambda *_: runs.append(1))
    walk(model, rows(1), lambda block: {}, as_original=Conversions().as_original)
    assert len(runs) == 1  # the survey; both recordings end before the last block runs


@pytest.mark.parametrize(
    "data",
    [
        rows(),
        iter(rows()),
        [(x,) for x in rows()],
        [[x] for x in rows()],
        [{"x": x} for x in rows()],
        lambda model: [model(x) for x in rows()],
        lambda model: [model.blocks[2](model.blocks[1](model.blocks[0](x))) for x in rows()],
    ],
    ids=["tensors", "iterator", "tuples", "lists", "dicts", "function", "function of parts"],
)
def test_every_form_of_data_gives_the_same_calls(data: object) -> None:
    expected, got = Recorder(), Recorder()
    walk(Stack(), rows(), expected)
    walk(Stack(), data, got)
    for name, (calls, original) in expected.blocks.items():
        assert all(map(torch.equal, calls, got.blocks[name][0]))
        assert all(map(torch.equal, original, got.blocks[name][1]))
        assert len(calls) == len(got.blocks[name][0]) == 3


def test_a_function_that_draws_data_is_called_once() -> None:
    calls = []

    def function(model: nn.Module) -> None:
        calls.append(1)
        for x in torch.randn(2, 5, 4):
            model(x)

    recorder = Recorder()
    walk(Stack(between=lambda x: x + 1), function, recorder)
    assert len(calls) == 1
    with torch.no_grad():
        for now, original in zip(*recorder.blocks["blocks.0"], strict=True):
            assert torch.equal(now, original)


@pytest.mark.parametrize(
    ("data", "message"), [([], "no batches"), (3, "iterable"), (["text"], "Batch 1")]
)
def test_unusable_data_is_an_error(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        walk(Stack(), data)


def test_inference_mode_in_a_function_does_not_hinder_learning() -> None:
    @torch.inference_mode()
    def function(model: nn.Module) -> None:
        model(rows(1)[0])

    def visit(block: Block) -> dict[str, Any]:
        block.run(block.calls[0]).sum().backward()
        return {}

    model = Stack()
    walk(model, function, visit, as_original=Conversions().as_original)
    assert all(p.grad is not None for p in model.parameters())


def test_no_graph_is_kept_where_a_function_records_one() -> None:
    def function(model: nn.Module) -> None:
        with torch.enable_grad():
            model(rows(1)[0])

    def visit(block: Block) -> dict[str, Any]:
        tensors = [c.hidden for c in (*block.calls, *block.original_calls)]
        assert not any(t.requires_grad for t in tensors if t is not None)
        assert not any(t.requires_grad for t in block.original_outputs())
        return {}

    walk(Stack(between=lambda x: x * 1), function, visit, as_original=Conversions().as_original)


def test_a_network_without_blocks_is_one_block_whose_calls_are_the_batches() -> None:
    model, data = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), rows()
    seen: list[Block] = []

    def visit(block: Block) -> dict[str, Any]:
        seen.append(block)
        return {"done": {}}

    found = walk(model, data, visit, as_original=Conversions().as_original)
    (block,) = seen
    assert found == {"": {"done": {}}}
    assert (block.name, block.index, block.total, block.module) == ("", 0, 1, model)
    assert [call.args[0] for call in block.calls] == data
    assert [call.args[0] for call in block.original_calls] == data
    assert all(map(torch.equal, block.original_outputs(), [model(x) for x in data]))


def test_without_the_original_network_there_is_one_stream() -> None:
    model, seen = Stack(), []

    def visit(block: Block) -> dict[str, Any]:
        seen.append(block.calls is block.original_calls)
        return {}

    walk(model, rows(), visit, as_original=Conversions().as_original, keep_original=False)
    assert seen == [True, True, True]


def test_arguments_that_all_calls_share_are_kept_once() -> None:
    seen: dict[str, set[int]] = {}

    def visit(block: Block) -> dict[str, Any]:
        for call in (*block.calls, *block.original_calls):
            for key, value in call.kwargs.items():
                for part in value if isinstance(value, tuple) else (value,):
                    if isinstance(part, torch.Tensor) and part is not call.hidden:
                        seen.setdefault(key, set()).add(part.data_ptr())
        return {}

    data = [tokens(s) for s in range(3)]
    walk(llama(), data, visit, as_original=Conversions().as_original)
    assert len(seen["position_embeddings"]) <= 2  # cosines and sines
    assert all(len(pointers) <= 2 for pointers in seen.values())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["visit", "forward"])
def test_the_model_is_left_as_it_was(error: type[BaseException] | None, where: str) -> None:
    model = llama()
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]

    def raise_it(*_: Any) -> dict[str, Any]:
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache is False
        if error is not None:
            raise error
        return {}

    data: Any = [tokens()]
    if where == "forward":
        data = lambda m: (m(tokens()), raise_it())  # noqa: E731
    visit = raise_it if where == "visit" else lambda block: {}
    if error is None:
        walk(model, data, visit, as_original=Conversions().as_original)
    else:
        with pytest.raises(error):
            walk(model, data, visit, as_original=Conversions().as_original)
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is True
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_are_repeated_without_a_cache_that_grows() -> None:
    model = llama()
    lengths = []

    def visit(block: Block) -> dict[str, Any]:
        outputs = [block.run(block.calls[0]) for _ in range(3)]
        assert torch.equal(outputs[0], outputs[2])
        lengths.append(block.calls[0].kwargs.get("past_key_values"))
        return {}

    data = [{"input_ids": tokens(), "use_cache": True}]
    with torch.no_grad():
        walk(model, data, visit, as_original=Conversions().as_original)
    assert lengths == [None] * 3


def test_a_replaced_forward_is_run() -> None:
    model, data = Stack(), rows()
    block = model.blocks[1]
    inner = block.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs) + 1

    block.forward = patched
    recorder = Recorder()
    walk(model, data, recorder)
    now = watched(model, recorder.blocks, data)
    for one, other in zip(recorder.blocks["blocks.2"][0], now["blocks.2"]["in"], strict=True):
        torch.testing.assert_close(one, other)


def test_weights_that_are_brought_in_for_a_call_do_not_draw_inputs_away() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = Stack(), Stack()
    for block in offloaded.blocks:
        accelerate.cpu_offload(block, execution_device=torch.device("cpu"))
    expected, got = Recorder(), Recorder()
    walk(plain, rows(), expected)
    walk(offloaded, lambda model: [model(x) for x in rows()], got)
    assert all(p.is_meta for p in offloaded.parameters())
    for name in expected.outputs:
        assert all(map(torch.equal, expected.outputs[name], got.outputs[name]))


def test_hidden_states_of_done_blocks_are_freed() -> None:
    seen: list[list[weakref.ref[torch.Tensor]]] = []
    alive: list[int] = []

    def visit(block: Block) -> dict[str, Any]:
        gc.collect()
        alive.append(sum(r() is not None for refs in seen[:-1] for r in refs))
        hidden = [c.hidden for c in (*block.calls, *block.original_calls)]
        tensors = [t for t in hidden if t is not None]
        seen.append([weakref.ref(t) for t in (*tensors, *block.original_outputs())])
        return {}

    model = Stack()
    walk(model, rows(), visit, as_original=Conversions().as_original)
    gc.collect()
    assert alive == [0, 0, 0]
    assert all(r() is None for refs in seen for r in refs)


def test_another_way_through_the_converted_network_is_an_error() -> None:
    class Choosing(Stack):
        def forward(self, x: torch.Tensor, order: Any = None) -> torch.Tensor:
            x = self.blocks[0](x) + 0
            return self.blocks[1](x) if x.mean() < 0.1 else x

    def visit(block: Block) -> dict[str, Any]:
        conversions.add(block.module)
        return {}

    model, conversions = Choosing(), Conversions()
    with pytest.raises(DataError, match="called 1 times by the original network, but 0"):
        walk(model, [torch.full((5, 4), -0.1)], visit, as_original=conversions.as_original)


def test_progress_is_told_block_by_block() -> None:
    told: list[tuple[int, int]] = []
    walk(Stack(), rows(), on_block=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


class Scales(Stack):
    """Blocks with a buffer that is not there before they are converted."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_buffer("shift", None)
            block.register_forward_hook(self._shifted)
        self.plain = False

    def _shifted(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if module.shift is None or self.plain else output + module.shift

    @contextmanager
    def as_original(self, module: nn.Module) -> Iterator[None]:
        before, self.plain = self.plain, True
        try:
            yield
        finally:
            self.plain = before


def converted(model: Scales, progress: BlockProgress | None, stop_at: int | None = None) -> Any:
    visited: list[str] = []

    def visit(block: Block) -> dict[str, Any]:
        if block.index == stop_at:
            raise KeyboardInterrupt
        visited.append(block.name)
        pairs = zip(block.calls, block.original_calls, strict=True)
        difference = [_copy(a.hidden) - _copy(b.hidden) for a, b in pairs]
        block.module.shift = torch.stack(difference).mean((0, 1)) + 0.1
        return {"fc1": {"error": float(block.module.shift.sum())}}

    try:
        found = walk(model, rows(), visit, as_original=model.as_original, progress=progress)
    except KeyboardInterrupt:
        found = {}
    return found, visited


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_killed_walk_goes_on_with_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    whole = Scales()
    expected, _ = converted(whole, None)
    converted(Scales(), BlockProgress(tmp_path, "same"), killed_at)

    model = Scales()
    found, visited = converted(model, BlockProgress(tmp_path, "same"))

    assert visited == [f"blocks.{i}" for i in range(killed_at, 3)]
    assert found == expected
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert converted(Scales(), BlockProgress(tmp_path, "same"))[1] == []
    assert len(converted(Scales(), BlockProgress(tmp_path, "other"))[1]) == 3
