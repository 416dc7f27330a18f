"""What a run costs, before it is begun: arithmetic on the networks, and a trial on the GPU.

Floating-point operations are counted on the real architecture without weights. Seconds follow from
a GPU's peak and the share of it that is reached (`GPU.basis`). How many images a GPU samples at
once, and whether compiling pays, a few calls tell when a run begins (`trial`, `decide`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from memlib.gram import VECTORS
from memlib.hub.accelerated import DECODED_HALF

STATE_BYTES = len(VECTORS) ** 2 * 8  # inner products in float64
UNETS = {  # latent side, and what differs from diffusers' defaults; RealisticVision's is v1.4's
    "sd14": (64, dict(cross_attention_dim=768, attention_head_dim=8)),
    "sd21": (96, dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                      use_linear_projection=True, upcast_attention=True)),
}  # fmt: skip
TRANSFORMERS = {  # SD 3.5 Medium, its text without T5's places filled
    "sd35": (128, dict(in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
                       attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536,
                       pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
                       dual_attention_layers=tuple(range(13)))),
}  # fmt: skip

# Measured on an H200: SD v1.4's U-Net at full width, half precision, 40 latents, torch 2.11.
EAGER, COMPILED = 268e12, 376e12  # operations a second; a call takes 119 and 85.5 ms
COMPILING = 70.0  # seconds to compile for one number of latents: 50 for the first, 70 for others

BATCH = {"reverse": 20, "forward": 64}  # at once, on a CPU
# Numbers in the latents of a batch, above which an H200 gains little; with two latents an image
# SD stays below 64, from where on diffusers' upsampling copies channels-last tensors.
LEVEL = 30 * 4 * 64**2
MOST = 256  # images in a batch, whatever their size
MARGIN = 0.85  # of the free memory is planned with: the rest is the allocator's cuttings


@dataclass(frozen=True)
class GPU:
    """A GPU: its dense half-precision peak, the share of it that is reached, and who says so."""

    name: str
    peak: float  # operations a second
    utilization: float = 0.35
    basis: str = "assumed"


GPUS = (
    GPU("T4", 65e12, 0.30),
    GPU("L4", 121e12),
    GPU("A100", 312e12),
    GPU("H100", 989e12, COMPILED / 989e12, "by the H200's measurement"),
    GPU("H200", 989e12, COMPILED / 989e12, "measured (the U-Net, compiled)"),
)


def gpu_of(name: str) -> GPU | None:
    """The card that torch names so: "NVIDIA H100 80GB HBM3" is an H100, an L40S is no L4."""
    return next((gpu for gpu in GPUS if gpu.name in name.replace("-", " ").split()), None)


@lru_cache
def unet_flops(model: str) -> int:
    """Floating-point operations of one call of a model's network on one latent, counted."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        if model in TRANSFORMERS:
            side, options = TRANSFORMERS[model]
            network = SD3Transformer2DModel(sample_size=side, **options)
            x, text = torch.empty(1, 16, side, side), torch.empty(1, 77 + 256, 4096)
            return count_flops(network, x, text, pooled_projections=torch.empty(1, 2048))
        side, options = UNETS[model]
        network = UNet2DConditionModel(sample_size=side, **options)
        x, text = torch.empty(1, 4, side, side), torch.empty(1, 77, options["cross_attention_dim"])
        return count_flops(network, x, text)


def count_flops(network, x: torch.Tensor, text: torch.Tensor, **more: torch.Tensor) -> int:
    """Floating-point operations of one call, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        times = torch.ones(len(x), device=x.device)
        network(x, timestep=times, encoder_hidden_states=text, **more)
    return counter.get_total_flops()


def seconds_per_image(model: str, card: GPU, steps: int = 50) -> float:
    """Computed: two calls a step, at the card's share of its peak. Decoding adds a few percent."""
    return 2 * steps * unet_flops(model) / (card.peak * card.utilization)


@dataclass(frozen=True)
class Trial:
    """What a few calls on a GPU have shown of a model."""

    batch: int  # images that fit, and make it faster
    together: int  # pictures to decode at once, beside them
    seconds: float  # of one update of one image, without compiling


def trial(model, steps: int, seeds: int = 1, decoding: bool = True, beside: int = 0) -> Trial:
    """Measure by calls with few and with more images what the device holds of a model.

    It keeps a trajectory of `steps` for every image, and the states of `seeds` images wait for each
    other. Pictures are decoded beside the next batch; `beside` bytes are left to other processes.
    """
    device, few, many = model.device, 2, 8
    numbers = int(torch.Size(model.latent_shape).numel())
    latent, most = 4 * numbers, max(1, min(MOST, LEVEL // numbers))
    torch.cuda.empty_cache()
    room = MARGIN * (torch.cuda.mem_get_info(device)[0] - beside)
    try:
        together, pictures = _decoding(model, room / 4) if decoding else (1, 0)
        (small, _), (large, seconds) = (_measured(device, _update(model, n)) for n in (few, many))
    except torch.OutOfMemoryError:
        return Trial(few, 1, 0.0)  # the sampler halves it where it must
    # An image has its share of a call, its states, predictions and accumulated noise. Once there
    # are a float64 copy of one trajectory, and a prompt's states, twice while they are joined.
    each = (large - small) / (many - few) + latent * (4 * steps + 2)
    fixed = small - few * (large - small) / (many - few) + latent * (steps + 1) * (14 + 2 * seeds)
    batch = int(max(1, min(most, (room - pictures - fixed) // max(each, 1))))
    while batch > many:  # what convolutions take does not grow evenly: try it
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds, many = _measured(device, _update(model, batch))[1], batch
            break
        batch //= 2
    torch.cuda.empty_cache()  # for workers, which cannot have what this process keeps
    return Trial(batch, together, seconds / many)


def _decoding(model, room: float) -> tuple[int, int]:
    """Pictures to decode at once within `room` bytes, at least one, and the bytes of them."""
    count = 1 if model.decoder == "float16" else 8  # float32 is split by itself
    latents = torch.zeros(count, *model.latent_shape)
    model.decode(latents)  # makes the decoder's copy, which stays
    bytes_ = max(1, _measured(model.device, lambda: model.decode(latents))[0])
    if count > 1:
        return count, bytes_
    together = int(max(1, min(DECODED_HALF // model.image_size**2, room // bytes_)))
    return together, together * bytes_


def _update(model, images: int) -> Callable[[], None]:
    x = torch.zeros(images, *model.latent_shape, dtype=model.dtype, device=model.device)
    text = torch.cat(model.encode_text([""] * images))
    return lambda: model.predict(torch.cat([x, x]), torch.tensor(500), text)


def _measured(device, call: Callable) -> tuple[int, float]:
    """Bytes that a call takes at its peak, and seconds of its second time."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - start


def equal_batches(batch: int, seeds: int) -> int:
    """Images in a batch so that all of a run are equal: whole prompts, or equal parts of one."""
    return batch // seeds * seeds if seeds <= batch else -(-seeds // -(-seeds // batch))


def pays(images: int, steps: int, seconds: float, device: torch.device) -> bool:
    """Whether compiling saves more than it takes; `seconds` are of one update of an image."""
    old = torch.cuda.get_device_capability(device) < (8, 0)  # a T4, which its code is not made for
    slower = max(1, 8 / (os.cpu_count() or 1))  # the compiler works on the processor
    return not old and images * steps * seconds * (1 - EAGER / COMPILED) > COMPILING * slower


def decide(
    model, direction: str, batch_size: int | None, compile: bool | None, images: int,
    seeds: int, steps: int, decoding: bool = True, beside: int = 0,
) -> tuple[int, bool]:  # fmt: skip
    """Batch size and whether to compile, where they are not given: on a GPU by a trial."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if model.device.type != "cuda" or not images:
        return BATCH[direction] if batch_size is None else batch_size, bool(compile and images)
    if batch_size is not None and compile is not None:
        return batch_size, compile
    found = trial(model, steps, seeds, decoding, beside)
    model.fits = None
    model.together = found.together if decoding else model.together
    batch_size = batch_size or equal_batches(found.batch, seeds)
    if compile is None:
        compile = pays(images, steps, found.seconds, model.device)
    return batch_size, compile
