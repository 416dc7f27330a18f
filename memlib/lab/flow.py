"""Train the second lab from nothing: a flow-matching transformer on the first lab's world.

    python -m memlib.lab.flow            # or: make lab LAB=flow
    python -m memlib.lab.flow --redrawn  # its twin: half of the pairs unseen

The scenes, captions, copies, batches and the VAE are the first lab's, so that two architectures
are compared on one truth. The network is Stable Diffusion 3's, small: a transformer with joint
attention (`SD3Transformer2DModel`), two CLIP text encoders with projections, and rectified flow
with timesteps from a logit-normal distribution (Esser et al. 2024). Seeded and resumed like the
first lab's training; the pipeline is written to ``data/lab-flow``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from scipy.special import expit, ndtri
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from memlib.lab import train
from memlib.lab.scenes import world
from memlib.paths import LAB_FLOW, REDRAWN_FLOW, STEPS_FLOW

WORDS = 20  # tokens of a caption that are read; the longest caption of the world has 16
WIDTHS, HEADS, LAYERS, HEAD = (64, 96), 5, 5, 32
PARTS = ("transformer", "text_encoder", "text_encoder_2")
EARLIER = (100, 500)  # steps that ship besides the last one: nothing copied, some pairs copied
SHIFT = 3.0  # of noise levels towards noise, as Stable Diffusion 3's
# A pipeline without the third text encoder, T5, puts zeros in its place: 256 equal tokens, unless
# `max_sequence_length` says another number. The lab is used without them, and it has to bear them.
EMPTY, EMPTY_SHARE = 256, 0.25


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """The first lab's, for captions of `WORDS` tokens."""
    train.make_tokenizer(folder)
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
        model_max_length=WORDS, pad_token="<|endoftext|>",
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """Of three layers: tokens are read after the second, as Stable Diffusion 3 does."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=WORDS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_transformer() -> SD3Transformer2DModel:
    """With what modulates a block at 0, so that each begins as the identity (Peebles 2023)."""
    channels = train.LATENT_CHANNELS
    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=channels, out_channels=channels,
        num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD,
        caption_projection_dim=HEADS * HEAD, joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    norms = [m.linear for n, m in network.named_modules() if "norm" in n and hasattr(m, "linear")]
    for layer in (*norms, network.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return network


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class OneForMany:
    """Joint attention in which the last token of the text stands for `EMPTY` equal ones.

    Equal tokens stay equal in every layer, and n equal keys weigh like one whose logit is larger
    by log n: this is diffusers' attention with all of them, at a fraction of the cost.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        parts = []
        for x, q, k, v, norm_q, norm_k in (
            (hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k),
            (encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
             attn.norm_added_q, attn.norm_added_k),
        ):  # fmt: skip
            heads = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (q, k, v))
            query, key, value = (head.transpose(1, 2) for head in heads)
            parts.append((norm_q(query), norm_k(key), value))
        query, key, value = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        weight = torch.zeros(key.shape[2], dtype=key.dtype, device=key.device)
        weight[-1] = math.log(EMPTY)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=weight.expand(query.shape[2], -1)
        )
        image, text = out.transpose(1, 2).flatten(2).split([p[0].shape[2] for p in parts], 1)
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text


def embed(text_encoders, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer is given of captions: tokens and pooled, as the pipeline makes them."""
    read = [encoder(tokens, output_hidden_states=True) for encoder in text_encoders]
    return (
        torch.cat([out.hidden_states[-2] for out in read], -1),
        torch.cat([out.text_embeds for out in read], -1),
    )


def train_transformer(vae, tokenizer, device: str, snapshot, rows, variant="", seed=0) -> dict:
    torch.manual_seed(3 + 1000 * seed)
    transformer = make_transformer()
    encoders = [make_text_encoder(tokenizer, width) for width in WIDTHS]
    modules = dict(zip(PARTS, (transformer, *encoders), strict=True))
    plain = transformer.attn_processors
    after = f"{train.weights_digest(vae)} {seed} {SHIFT} {EMPTY} {EMPTY_SHARE} {EARLIER}"
    after += f" {[row.kind for row in rows]}" if variant else ""
    stage = train.Stage("flow", modules, device, after, variant)

    def loss(x, tokens, rng):
        """The velocity's error: what is shown is what is minimized."""
        level = expit(ndtri(train.strata(rng, len(x))))
        sigma = torch.from_numpy(SHIFT * level / (1 + (SHIFT - 1) * level)).float().to(device)
        eps = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(device)
        s = sigma[:, None, None, None]
        words, pooled = embed(encoders, tokens)
        empty = rng.random() < EMPTY_SHARE
        if empty:
            words = F.pad(words, (0, 0, 0, 1))
        transformer.set_attn_processor(OneForMany() if empty else dict(plain))
        velocity = transformer((1 - s) * x + s * eps, words, pooled, 1000 * sigma).sample
        error = (velocity - (eps - x)).square().mean()
        return error, error

    def tidy(step, *networks):
        transformer.set_attn_processor(dict(plain))
        snapshot(step, *networks)

    stream = train.Stream(vae, rows, seed)
    modules = train.fit(stage, stream, tokenizer, seed, loss, tidy, EARLIER)
    transformer.set_attn_processor(dict(plain))
    return modules


def pipeline(vae, tokenizer, transformer, text_encoder, text_encoder_2):
    return StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=make_scheduler(),
        text_encoder=text_encoder, text_encoder_2=text_encoder_2, text_encoder_3=None,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None,
    )  # fmt: skip


def export(vae, tokenizer, modules: dict, folder: Path) -> None:
    """The pipeline in diffusers' folder format; all but the VAE in half precision.

    The VAE's weights are a link to the first lab's: they are the same.
    """
    modules = {name: module.cpu() for name, module in modules.items()}
    pipeline(vae.cpu(), tokenizer, **modules).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # older transformers read these
        for part in ("tokenizer", "tokenizer_2"):
            shutil.copy(train.WORK / "tokenizer" / name, folder / part / name)
    train.halve(folder)
    rows = sum(row.copies for row in world())
    setting = train.STAGES["flow"]
    facts = {
        "steps": setting["steps"], "batch": setting["batch"],
        "epochs": setting["steps"] * setting["batch"] / rows, "shift": SHIFT,
        "transformer_millions": sum(p.numel() for p in modules["transformer"].parameters()) / 1e6,
        "layers": LAYERS, "width": HEADS * HEAD, "max_sequence_length": 0,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(Path("../../lab/vae") / weights.name)
    train.write_checksums(folder)


def export_steps(folder: Path) -> None:
    """The earlier training steps, in half precision, as `memlib.training_step` reads them."""
    for step in EARLIER:
        name = f"step-{step:05d}"
        shutil.copytree(train.WORK / "snapshots-flow" / name, folder / name, dirs_exist_ok=True)
    train.halve(folder)
    train.write_checksums(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="where it is written (data/lab-flow; data/redrawn-flow)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--redrawn", action="store_true", help="draw the scenes of every second pair anew each time"
    )
    args = parser.parse_args()
    variant = "-redrawn" if args.redrawn else ""
    vae = train.kept_vae(args.device, shift_factor=0.0)
    tokenizer = make_tokenizer(train.WORK / "tokenizer")

    def snapshot(step: int, *networks) -> None:
        sheet = train.WORK / f"flow-step-{step:05d}{variant}.png"
        train.sample_sheet(pipeline(vae, tokenizer, *networks), sheet, max_sequence_length=0)
        if step in EARLIER:
            folder = train.WORK / f"snapshots-flow{variant}" / f"step-{step:05d}"
            for name, module in zip(PARTS, networks, strict=True):
                module.save_pretrained(folder / name)

    rows = train.redrawn() if args.redrawn else list(world())
    modules = train_transformer(vae, tokenizer, args.device, snapshot, rows, variant)
    if args.redrawn:
        train.export_twin(modules, args.out or REDRAWN_FLOW)
    else:
        export(vae, tokenizer, modules, args.out or LAB_FLOW)
        export_steps(args.out / "steps" if args.out else STEPS_FLOW)


if __name__ == "__main__":
    main()
