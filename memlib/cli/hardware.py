"""``memlib doctor``: also on which device, and how long a run would take."""

from __future__ import annotations

import os

import torch

from memlib.cli import doctor as here
from memlib.cli.doctor import line
from memlib.runs import cost


def doctor(options) -> None:
    here.doctor(options, _device)
    print("Time for 100 prompts, 10 seeds, 50 steps (operations over a share of the card's peak)")
    card = cost.gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    shown = [card] if card else cost.GPUS
    for name in ("sd14", "sd21"):
        hours = [f"{c.name} {1000 * cost.seconds_per_image(name, c) / 3600:.1f} h" for c in shown]
        line(name, ", ".join(hours))
    line("the share", ", ".join(f"{c.name} {c.utilization:.0%} {c.basis}" for c in shown))
    images = cost.LEVEL // (4 * cost.UNETS["sd14"][0] ** 2)
    line("batch", f"on a GPU what a trial finds to fit, at most {images} images of SD v1.4")
    line("lab", "a few minutes on two cores")


def _device() -> None:
    print("Device")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        line("GPU", f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB")
    else:
        line("GPU", "none found by torch; the lab needs none, Stable Diffusion does")
    line("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
