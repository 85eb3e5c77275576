# SPDX-License-Identifier: Apache-2.0
"""More calibration data than there is text: windows that a model writes, or of random tokens.

What is learned from little text fits that text best. A network's own outputs are known for any
input at all, so there can be as many inputs as time allows: a language model writes text itself,
and for another network tokens of the text are replaced by any of the vocabulary. Layers then see
inputs that the text never leads to, and what is learned holds for other text too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from modewright.calibration.forward import OnBatch
from modewright.calibration.self_text import generate_windows, ordinary_tokens, writes_text
from modewright.errors import ConfigError, DataError

_SHARE = 0.5  # of the tokens


def more_windows(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    *,
    count: int,
    special: Collection[int] = (),
    seed: int = 0,
    write: bool = True,
    on_batch: OnBatch | None = None,
) -> list[torch.Tensor]:
    """Return windows besides those that are there: written, or with tokens replaced.

    Args:
        model: The original network, which takes token ids.
        windows: Token ids, int64 ``[1, length]`` each.
        count: How many windows more.
        special: Ids that are left where they are when others are replaced.
        seed: Of all random choices.
        write: Let a language model write; otherwise tokens are replaced for it too.
        on_batch: Called with how many tokens are written, and how many there will be.

    Raises:
        ConfigError: A number is out of its range.
        DataError: There is no window, or the vocabulary is unknown.
    """
    if count and write and len(windows) and writes_text(model, windows[0]):
        length = windows[0].shape[-1]
        written = generate_windows(model, count=count, length=length, seed=seed, on_batch=on_batch)
        return list(torch.split(written, 1))
    vocabulary = ordinary_tokens(model) if count else torch.empty(0, dtype=torch.int64)
    return replace_tokens(windows, count=count, vocabulary=vocabulary, special=special, seed=seed)


def replace_tokens(
    windows: Sequence[torch.Tensor],
    *,
    count: int,
    vocabulary: torch.Tensor,
    special: Collection[int] = (),
    share: float = _SHARE,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return copies of windows in which tokens are replaced; the same arguments give the same.

    Args:
        windows: Token ids, int64, of any shape each.
        count: How many copies; the windows are taken one after another, and again from the first.
        vocabulary: Ids that are put in, int64 ``[n]``, each as likely as the others.
        special: Ids that are left where they are, such as those that begin and end a text.
        share: Which part of the tokens is replaced, on average.
        seed: Of all random choices; the global random generators are not used.

    Raises:
        ConfigError: A number is out of its range.
        DataError: There is no window, or no id to put in.
    """
    if count < 0:
        raise ConfigError(f"count: expected 0 or more, got {count}.")
    if not 0 <= share <= 1:
        raise ConfigError(f"share: expected a number from 0 to 1, got {share}.")
    kept = torch.tensor(sorted(special), dtype=torch.long)
    allowed = vocabulary[~torch.isin(vocabulary, kept)]
    if count and not (len(windows) and len(allowed)):
        raise DataError("There are no windows, or no tokens, to make other windows from.")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        given = windows[index % len(windows)]
        ids = given.to("cpu", copy=True)
        chosen = torch.rand(ids.shape, generator=generator) < share
        chosen &= ~torch.isin(ids, kept)
        drawn = torch.randint(len(allowed), (int(chosen.sum()),), generator=generator)
        ids[chosen] = allowed[drawn]
        made.append(ids.to(given.device))
    return made
