"""A judge of what an ordinary picture shows: which object, on which colour.

A small network, trained on drawn scenes alone, that knows nothing of diffusion; mitigation is
judged by it. ``python -m memlib.lab.judge`` trains it anew (a minute or two) and writes
``data/judge.safetensors``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from memlib.lab.scenes import COLOURS, NORMAL_SPRITES, normal_scene, render
from memlib.paths import JUDGE

OBJECTS, GROUNDS = tuple(NORMAL_SPRITES), tuple(COLOURS)
WIDTHS, PICTURES, EPOCHS, BATCH = (3, 16, 32, 64, 64), 12_000, 8, 64


class Judge(nn.Module):
    """Scores of each object and of each colour, from pictures in [-1, 1]."""

    def __init__(self):
        super().__init__()
        layers = []
        for n, (before, after) in enumerate(pairwise(WIDTHS)):
            conv = nn.Conv2d(before, after, 3, 2 if n < 3 else 1, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.object = nn.Linear(WIDTHS[-1], len(OBJECTS))
        self.ground = nn.Linear(WIDTHS[-1], len(GROUNDS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.body(x)
        return self.object(found.amax((2, 3))), self.ground(found.mean((2, 3)))


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [picture, y, x, rgb], and their places in `OBJECTS` and `GROUNDS`."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, [len(OBJECTS), len(GROUNDS)], (count, 2))
    scenes = [normal_scene(rng, OBJECTS[sprite], GROUNDS[ground]) for sprite, ground in shown]
    return np.stack([render(scene) for scene in scenes]), shown


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def seen(pictures: np.ndarray) -> np.ndarray:
    """What 64 x 64 pictures [picture, y, x, rgb] show: places in `OBJECTS` and `GROUNDS`."""
    judge = Judge()
    judge.load_state_dict({name: v.float() for name, v in load_file(JUDGE).items()})
    with torch.no_grad():
        found = judge.eval()(tensor(pictures))
    return np.stack([scores.argmax(1).numpy() for scores in found], 1)


def asked(captions) -> np.ndarray:
    """What ordinary captions ask for, as `seen` says it."""
    words = [caption.removesuffix(" background").split(" on ") for caption in captions]
    words = [[part.split(" ", 1)[1] for part in pair] for pair in words]
    return np.array([[OBJECTS.index(sprite), GROUNDS.index(ground)] for sprite, ground in words])


def train(seed: int = 0) -> Judge:
    """Train on drawn scenes, some blurred and noisy, as generated pictures may be."""
    torch.manual_seed(seed)
    rng, (pictures, shown) = np.random.default_rng(seed), drawn(PICTURES, seed)
    shown, judge = torch.from_numpy(shown), Judge()
    steps = EPOCHS * (PICTURES // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(steps), desc="judge", disable=None):
        chosen = rng.choice(PICTURES, BATCH, replace=False)
        x = tensor(pictures[chosen])
        x = x + 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(x)
        if rng.integers(2):
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        loss = sum(F.cross_entropy(s, y) for s, y in zip(judge(x), shown[chosen].T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge


if __name__ == "__main__":
    made = train().state_dict()
    save_file({name: v.half() if v.is_floating_point() else v for name, v in made.items()}, JUDGE)
    pictures, shown = drawn(2000, seed=1)
    print(f"of 2,000 new scenes right: {(seen(pictures) == shown).mean(0).round(4)}")
