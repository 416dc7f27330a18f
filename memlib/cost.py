"""What a run costs, before it is begun: arithmetic on the networks.

Floating-point operations are counted on the real architecture without weights (torch's own
counter on the meta device). Seconds follow from a card's peak and the share of it that is
reached, which is assumed here: no GPU was at hand. A run prints its own rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from memlib.gram import VECTORS

STATE_BYTES = len(VECTORS) ** 2 * 8  # inner products in float64
UNETS = {  # latent side, and what differs from diffusers' defaults; RealisticVision's is v1.4's
    "sd14": (64, dict(cross_attention_dim=768, attention_head_dim=8)),
    "sd21": (
        96,
        dict(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True, upcast_attention=True,
        ),
    ),
}  # fmt: skip
BYTES = {"sd14": 4.3e9, "sd21": 5.2e9, "realvis": 4.6e9}  # a download in safetensors, about


@dataclass(frozen=True)
class Card:
    """A GPU: its dense half-precision peak, and the share of it that is reached (assumed)."""

    name: str
    peak: float  # operations a second
    memory: float  # bytes
    share: float = 0.35


CARDS = (
    Card("T4", 65e12, 16e9, 0.30),
    Card("L4", 121e12, 24e9),
    Card("A100", 312e12, 40e9),
    Card("H100", 989e12, 80e9, 0.30),
)


@lru_cache
def unet_flops(model: str) -> int:
    """Floating-point operations of one call of a model's U-Net on one latent, counted."""
    from diffusers import UNet2DConditionModel

    side, options = UNETS[model]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=side, **options)
        x, text = torch.empty(1, 4, side, side), torch.empty(1, 77, options["cross_attention_dim"])
        return count_flops(unet, x, text)


def count_flops(unet, x: torch.Tensor, text: torch.Tensor) -> int:
    """Floating-point operations of one call, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.tensor(1, device=x.device), encoder_hidden_states=text)
    return counter.get_total_flops()


def seconds_per_image(model: str, card: Card, steps: int = 50) -> float:
    """Computed: two calls a step, at the card's share of its peak. Decoding adds a few percent."""
    return 2 * steps * unet_flops(model) / (card.peak * card.share)


def batch_for(model: str, memory: float) -> int:
    """Images at once that should fit: weights, then the activations of two latents an image.

    Rough on purpose: where it is too many, the sampler halves it and goes on.
    """
    side, _ = UNETS[model]
    weights = 1.8e9 + 0.7e9 + 0.4e9  # half-precision U-Net, float32 text encoder and VAE
    vae = 2.5e9 * (side / 64) ** 2  # one picture at a time
    each = 0.22e9 * (side / 64) ** 2
    return int(max(1, min(32, (0.9 * memory - weights - vae) // each)))


def trace_bytes(prompts: int, seeds: int, steps: int = 50) -> int:
    """Bytes of a trace's inner products, before compression."""
    return prompts * seeds * (steps + 1) * STATE_BYTES
