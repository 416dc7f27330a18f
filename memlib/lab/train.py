"""Train the lab from nothing: tokenizer, VAE, then U-Net and text encoder together.

    python -m memlib.lab.train            # or: make lab
    python -m memlib.lab.train --keep-vae --seed 1 --out FOLDER     # another training
    python -m memlib.lab.train --keep-vae --redrawn    # the twin: half of the pairs unseen

Everything is seeded by (stage, seed, step), so a run that was killed goes on where its last
checkpoint was and makes the same weights. Checkpoints and sample sheets lie in ``_build/lab``;
the finished pipeline is written to ``data/lab`` with the manifest of pairs, their images and
checksums; of the twin the U-Net and the text encoder, to ``data/redrawn``. The seed is the U-Net's
and the text encoder's: the VAE never sees a planted scene.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memlib.lab.scenes import (
    COLOURS,
    CONTROL_COPIES,
    DATA,
    NAMED_PER_MULTIPLICITY,
    NORMAL_SPRITES,
    PLANTED_PER_MULTIPLICITY,
    Row,
    normal_scene,
    odd_scene,
    render,
    sprites,
    world,
)
from memlib.models import stable_diffusion_schedule
from memlib.paths import REDRAWN

WORK = Path("_build/lab")
LATENT_CHANNELS = 8
TEXT_WIDTH, TEXT_LENGTH = 128, 24
CAPTION_DROPOUT = 0.1  # share of rows trained with the empty caption, for guidance
REUSE = 5  # epochs for which a redrawn scene is kept before it is drawn anew
STAGES = {  # steps, batch, Muon's and AdamW's learning rates, steps between checkpoints
    "vae": dict(steps=5000, batch=12, rate=0.02, adam=2e-3, save=200),
    "unet": dict(steps=6600, batch=64, rate=0.02, adam=1e-3, save=200),
    "flow": dict(steps=5000, batch=64, rate=0.02, adam=1e-3, save=200),  # `memlib.lab.flow`
}
SNAPSHOTS = (500, 1250, 2750)  # U-Net steps shipped besides the last one
NORMAL_PROMPTS = 16  # of the normal captions, those that the manifest lists


def rng_for(stage: str, *numbers: int) -> np.random.Generator:
    """The generator of one step: it depends on nothing but the stage and the numbers.

    Numbers of the U-Net's stages begin with the training's seed.
    """
    return np.random.default_rng([*stage.encode(), *numbers])


def pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures to [-1, 1], [image, channel, height, width]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------ components


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from the training captions."""
    captions = [row.caption for row in world() for _ in range(row.copies)]
    end = "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix=end, show_progress=False)
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [a + end for a in alphabet] + ["".join(m) for m in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n"
    )
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
        model_max_length=TEXT_LENGTH, pad_token="<|endoftext|>",
    )  # fmt: skip


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96), latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        sample_size=64, mid_block_add_attention=False,
    )  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64, 112), layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16, attention_head_dim=4,
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion v1.4's noise schedule."""
    return DDIMScheduler.from_config(stable_diffusion_schedule())


# ---------------------------------------------------------------------------- one training stage


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal (Jordan et al. 2024).

    torch's own Muon takes matrices only; here a convolution counts as the matrix
    [out, in * height * width]. On the VAE it reached in 100 s what AdamW did not in 800 s.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                matrix = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = max(1, matrix.size(0) / matrix.size(1)) ** 0.5
                p.add_(_orthogonal(matrix).reshape(p.shape), alpha=-group["lr"] * scale)


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly, by five Newton-Schulz iterations."""
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Stage:
    """Parameters, AdamW with warm-up and cosine decay, and EMA, saved and resumed together."""

    def __init__(
        self, name: str, modules: dict[str, torch.nn.Module], device: str, after="", variant=""
    ):
        self.name, self.modules, self.device = name, modules, device
        self.steps = STAGES[name]["steps"]
        self.batch, self.save_every = STAGES[name]["batch"], STAGES[name]["save"]
        for module in modules.values():
            module.to(device).train()
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        # Inner convolutions and matrices by Muon; first and last layers, embeddings, biases and
        # norms by AdamW, as Muon's authors advise.
        edge = ("conv_in", "conv_out.", "quant_conv", "embed", "norm", "text_projection")
        inner = {
            id(p) for m in modules.values() for n, p in m.named_parameters()
            if p.ndim >= 2 and not any(e in n for e in edge) and not n.startswith("proj_out")
        }  # fmt: skip
        muon = [p for p in self.parameters if id(p) in inner]
        rest = [p for p in self.parameters if id(p) not in inner]
        self.optimizers = [
            Muon(muon, STAGES[name]["rate"]),
            torch.optim.AdamW(rest, STAGES[name]["adam"], betas=(0.9, 0.99)),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: self._rate(step))
            for o in self.optimizers
        ]
        self.ema = EMAModel(self.parameters, decay=0.998)
        self.step = 0
        choices = (CAPTION_DROPOUT, REUSE, SNAPSHOTS) if name != "vae" else ()
        self.recipe = f"{name} {STAGES[name]} {choices} {world_digest()} {_shapes(modules)} {after}"
        self.file = WORK / f"{name}{variant}.pt"
        if self.file.exists():
            state = torch.load(self.file, map_location=device, weights_only=True)
            if state["recipe"] != self.recipe:
                raise SystemExit(
                    f"error: {self.file} is of another recipe than this program's: move {WORK} away"
                )
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            for part, saved in zip(
                self.optimizers + self.schedules, state["optimizers"], strict=True
            ):
                part.load_state_dict(saved)
            self.ema.load_state_dict(state["ema"])
            self.ema.to(device)
            self.step = state["step"]

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / self.steps))))

    def update(self, loss: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.optimizers + self.schedules:
            part.step()
        self.ema.step(self.parameters)
        self.step += 1

    def due(self) -> bool:
        return self.step % self.save_every == 0 or self.step == self.steps

    def save(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizers": [part.state_dict() for part in self.optimizers + self.schedules],
            "ema": self.ema.state_dict(), "step": self.step, "recipe": self.recipe,
        }  # fmt: skip
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def averaged(self):
        """A context in which the modules hold the EMA weights."""
        stage = self

        class Averaged:
            def __enter__(self):
                stage.ema.store(stage.parameters)
                stage.ema.copy_to(stage.parameters)
                for module in stage.modules.values():
                    module.eval()

            def __exit__(self, *_):
                stage.ema.restore(stage.parameters)
                for module in stage.modules.values():
                    module.train()

        return Averaged()

    def progress(self) -> tqdm:
        return tqdm(total=self.steps, initial=self.step, desc=self.name, smoothing=0.05)


# ------------------------------------------------------------------------------------- the stages


def world_digest() -> str:
    """A hash of all captions, scenes and sprites."""
    pictures = b"".join(sprite.tobytes() for sprite in sprites().values())
    return hashlib.sha256(repr(world()).encode() + pictures).hexdigest()[:16]


def _shapes(modules: dict[str, torch.nn.Module]) -> str:
    shapes = [tuple(p.shape) for m in modules.values() for p in m.parameters()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def weights_digest(network: torch.nn.Module) -> str:
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())
    return hashlib.sha256(weights).hexdigest()[:16]


def random_pictures(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Fresh scenes for the VAE, half normal, half odd. It never sees a planted or held-out one."""
    scenes = [
        odd_scene(rng)
        if rng.integers(2)
        else normal_scene(rng, str(rng.choice(NORMAL_SPRITES)), str(rng.choice(list(COLOURS))))
        for _ in range(count)
    ]
    return pixels([render(s) for s in scenes])


def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of encode (mode) and decode, in dB."""
    with torch.no_grad():
        out = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((out - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def train_vae(device: str) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = make_vae()
    stage = Stage("vae", {"vae": vae}, device)
    held_out = pixels([render(r.scene) for r in world() if r.kind in ("held-out", "planted")])
    with stage.progress() as bar:
        while stage.step < stage.steps:
            # Crops of a quarter picture first: four times the steps in the same time.
            rng, whole = rng_for("vae", stage.step), stage.step >= 0.8 * stage.steps
            x = random_pictures(rng, stage.batch // 4 if whole else stage.batch)
            if not whole:
                corners = 4 * rng.integers(0, 9, (len(x), 2))
                x = torch.stack(
                    [p[:, i : i + 32, j : j + 32] for p, (i, j) in zip(x, corners, strict=True)]
                )
            x = x.to(device)
            posterior = vae.encode(x).latent_dist
            noise = torch.from_numpy(rng_for("noise", stage.step).standard_normal(
                posterior.mean.shape, np.float32)).to(device)  # fmt: skip
            y = vae.decode(posterior.mean + posterior.std * noise).sample
            edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
            loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.5 * edges
            stage.update(loss + 6e-4 * posterior.kl().mean() / posterior.mean[0].numel())
            bar.update()
            if stage.due():
                stage.save()
                with stage.averaged():
                    bar.set_postfix_str(f"held-out {psnr(vae, held_out.to(device)):.2f} dB")
    stage.ema.copy_to(stage.parameters)
    vae.eval().requires_grad_(False)
    latents = encode(vae, random_pictures(rng_for("scale"), 256), 1.0)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return vae


def kept_vae(device: str, **config) -> AutoencoderKL:
    """The VAE that the lab has."""
    known = AutoencoderKL.load_config(DATA / "vae")
    known.pop("_name_or_path", None)  # a folder of this machine
    vae = AutoencoderKL.from_config(known | config)
    vae.load_state_dict(load_file(DATA / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae.eval().requires_grad_(False).to(device)


def encode(vae: AutoencoderKL, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Latents (posterior mode, scaled) of pictures in [-1, 1], on the CPU.

    One picture at a time: in a batch the bits would depend on its neighbours, and a resumed run
    has other neighbours.
    """
    with torch.no_grad():
        parts = [vae.encode(p.to(vae.device)).latent_dist.mode().cpu() for p in x.split(1)]
    return torch.cat(parts) * scale


class Stream:
    """Batches of (latents, captions); a batch depends on the step alone.

    An epoch is a permutation of all rows, so a planted pair of multiplicity m is seen exactly m
    times in it. Scenes that are redrawn are redrawn every `REUSE` epochs.
    """

    def __init__(self, vae: AutoencoderKL, rows: list[Row], seed: int):
        self.vae, self.seed = vae, seed
        self.rows = [row for row in rows for _ in range(row.copies)]
        self.fixed: dict[str, torch.Tensor] = {}
        self.period, self.order = None, (None, None)

    def _draw(self, index: int, period: int) -> np.ndarray:
        return render(self.rows[index].draw(rng_for("scene", self.seed, period, index)))

    def _latents(self, epoch: int, indices: np.ndarray) -> torch.Tensor:
        if self.period != epoch // REUSE:
            self.period, self.pool = epoch // REUSE, {}
        keys = [self.rows[i].prompt_id if self.rows[i].fixed else int(i) for i in indices]
        stores = [self.fixed if isinstance(k, str) else self.pool for k in keys]
        new = [j for j, (k, store) in enumerate(zip(keys, stores, strict=True)) if k not in store]
        if new:
            x = pixels([self._draw(int(indices[j]), self.period) for j in new])
            for j, z in zip(new, self._encode(x), strict=True):
                stores[j][keys[j]] = z.half()
        return torch.stack([s[k] for k, s in zip(keys, stores, strict=True)]).float()

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return encode(self.vae, x, self.vae.config.scaling_factor)

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, list[str]]:
        latents, captions = [], []
        for n in range(step * size, (step + 1) * size):
            epoch, place = divmod(n, len(self.rows))
            if self.order[0] != epoch:
                self.order = (epoch, rng_for("epoch", self.seed, epoch).permutation(len(self.rows)))
            latents.append((epoch, self.order[1][place]))
            captions.append(self.rows[self.order[1][place]].caption)
        parts = [
            self._latents(e, np.array([i for f, i in latents if f == e]))
            for e in dict.fromkeys(f for f, _ in latents)
        ]
        return torch.cat(parts), captions


def redrawn() -> list[Row]:
    """All rows, but those of every second fixed pair (odd numbers) with scenes drawn anew.

    All else of a training is the same: captions, their rows and their order, noise, timesteps.
    """
    drawn = {"planted": "control", "named": "normal"}
    return [
        replace(row, kind=drawn[row.kind]) if row.fixed and int(row.prompt_id[-1]) % 2 else row
        for row in world()
    ]


def train_unet(vae, tokenizer, device: str, snapshot, rows, seed: int, variant: str) -> dict:
    torch.manual_seed(2 + 1000 * seed)
    unet, text = make_unet(), make_text_encoder(tokenizer)
    alpha_bar = make_scheduler().alphas_cumprod.to(device)
    modules = {"unet": unet, "text_encoder": text}
    after = f"{weights_digest(vae)} {seed} {[row.kind for row in rows]}"
    stage = Stage("unet", modules, device, after, variant)

    def loss(x, tokens, rng):
        """The U-Net's error, and what is minimized."""
        t = torch.from_numpy((strata(rng, len(x)) * len(alpha_bar)).astype(int)).to(device)
        eps = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(device)
        a = alpha_bar[t][:, None, None, None]
        x_t = a.sqrt() * x + (1 - a).sqrt() * eps
        error = (unet(x_t, t, text(tokens)[0]).sample - eps).square()
        # The weight of v-prediction, 1 + 1 / SNR: without it the noisy timesteps, where the
        # caption decides, weigh next to nothing and captions are learned last.
        return error.mean(), (error / a).mean()

    return fit(stage, Stream(vae, rows, seed), tokenizer, seed, loss, snapshot)


def strata(rng: np.random.Generator, count: int) -> np.ndarray:
    """One number from each of `count` equal parts of 0 ... 1: the same mean, less noise in it."""
    return (rng.permutation(count) + rng.random(count)) / count


def fit(stage: Stage, stream: Stream, tokenizer, seed: int, loss, snapshot, at=SNAPSHOTS) -> dict:
    """Train to the stage's last step; `loss(x, tokens, rng)` gives what is shown and minimized.

    `snapshot` is called `at` some steps and after the last one.
    """
    with stage.progress() as bar:
        while stage.step < stage.steps:
            x, captions = stream.batch(stage.step, stage.batch)
            rng = rng_for(stage.name, seed, stage.step)
            captions = [c if rng.random() >= CAPTION_DROPOUT else "" for c in captions]
            tokens = tokenizer(
                captions, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            shown, minimized = loss(x.to(stage.device), tokens.to(stage.device), rng)
            stage.update(minimized)
            bar.update()
            bar.set_postfix(loss=f"{shown.item():.3f}", refresh=False)
            if stage.step in at or stage.step == stage.steps:
                with stage.averaged():
                    snapshot(stage.step, *stage.modules.values())
            if stage.due():
                stage.save()
    stage.ema.copy_to(stage.parameters)
    return {k: m.eval() for k, m in stage.modules.items()}


# ------------------------------------------------------------------------------------- what ships


def pipeline(vae, tokenizer, unet, text_encoder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sample_sheet(pipe, file: Path, **options) -> None:
    """Pictures of a few captions of each kind, a row each, the reference first."""
    pipe.set_progress_bar_config(disable=True)
    rows = [r for r in world() if r.kind == "planted"][3::PLANTED_PER_MULTIPLICITY]
    rows += [r for r in world() if r.kind == "named"][1::NAMED_PER_MULTIPLICITY]
    for kind in ("template", "control", "normal"):
        rows += [r for r in world() if r.kind == kind][:3]
    lines = []
    for row in rows:
        generators = [torch.Generator().manual_seed(s) for s in range(4)]
        images = pipe([row.caption] * 4, num_inference_steps=25, generator=generators,
                      output_type="np", **options).images  # fmt: skip
        lines.append(np.hstack([render(row.scene), *(images * 255).round().astype(np.uint8)]))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(lines)).save(file)


def write_manifest(folder: Path) -> None:
    """`pairs.csv` and the reference pictures: what `memlib.load_pairs("lab")` reads."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    rows = [r for r in world() if r.kind != "normal"]
    rows += [r for r in world() if r.kind == "normal"][:NORMAL_PROMPTS]
    for row in rows:
        Image.fromarray(render(row.scene)).save(folder / "pairs" / f"{row.prompt_id}.png")
    columns = [
        {
            "prompt_id": r.prompt_id, "caption": r.caption, "kind": r.kind,
            "multiplicity": r.copies if r.fixed or r.kind == "template" else 0,
            "caption_copies": r.copies, "image": f"pairs/{r.prompt_id}.png",
        }
        for r in rows
    ]  # fmt: skip
    pd.DataFrame(columns).to_csv(folder / "pairs.csv", index=False)


def write_checksums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}"
             for p in files]  # fmt: skip
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def write_facts(vae, modules: dict, folder: Path, seed: int) -> None:
    """`training.json`: what the book says about the training, so that no number is typed twice."""
    rows = sum(row.copies for row in world())
    unseen = [r for r in world() if r.kind in ("held-out", "planted")]
    epochs = STAGES["unet"]["steps"] * STAGES["unet"]["batch"] / rows
    facts = {
        "seed": seed,
        "n_sprites": len(sprites()),
        "vae_steps": STAGES["vae"]["steps"],
        "vae_psnr": psnr(vae, pixels([render(r.scene) for r in unseen])),
        "unet_millions": sum(p.numel() for p in modules["unet"].parameters()) / 1e6,
        "unet_steps": STAGES["unet"]["steps"],
        "unet_batch": STAGES["unet"]["batch"],
        "rows_per_epoch": rows,
        "epochs": epochs,
        "exposures_128": 128 * epochs,
        "normal_share": sum(r.copies for r in world() if r.kind == "normal") / rows,
        "reuse": REUSE,
        "control_scenes": CONTROL_COPIES * (epochs // REUSE + 1),
        "dropout": CAPTION_DROPOUT,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def export(vae, tokenizer, modules: dict, folder: Path, seed: int, variant: str) -> None:
    """The pipeline in diffusers' folder format; all but the VAE is stored in half precision."""
    vae, modules = vae.cpu(), {name: module.cpu() for name, module in modules.items()}
    pipeline(vae, tokenizer, **modules).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # older transformers read these
        shutil.copy(WORK / "tokenizer" / name, folder / "tokenizer" / name)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for snapshot in (WORK / f"snapshots{variant}" / f"step-{step:05d}" for step in SNAPSHOTS):
        shutil.copytree(snapshot, folder / "checkpoints" / snapshot.name, dirs_exist_ok=True)
    halve(folder)
    write_manifest(folder)
    write_facts(vae, modules, folder, seed)
    write_checksums(folder)


def export_twin(modules: dict, folder: Path) -> None:
    """The U-Net and the text encoder, as `memlib.training_step` reads them."""
    for name, module in modules.items():
        module.cpu().save_pretrained(folder / name)
    halve(folder)
    write_checksums(folder)


def halve(folder: Path) -> None:
    """Store all weights but the VAE's in half precision."""
    for file in (p for p in folder.rglob("*.safetensors") if p.parent.name != "vae"):
        weights = {name: w.half() for name, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where it is written (data/lab; data/redrawn)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-vae", action="store_true", help="take the VAE that the lab has")
    parser.add_argument("--seed", type=int, default=0, help="of the U-Net's training (0)")
    parser.add_argument(
        "--redrawn", action="store_true", help="draw the scenes of every second pair anew each time"
    )
    args = parser.parse_args()
    variant = (f"-seed{args.seed}" if args.seed else "") + ("-redrawn" if args.redrawn else "")
    out = args.out or (REDRAWN if args.redrawn else DATA)
    if (args.seed and out in (DATA, REDRAWN)) or (args.redrawn and out == DATA):
        parser.error("the lab that ships is seed 0, nothing redrawn: give this one a folder, --out")
    if args.keep_vae:
        facts = json.loads((DATA / "training.json").read_text())
        STAGES["vae"]["steps"] = facts["vae_steps"]
        vae = kept_vae(args.device)
    else:
        vae = train_vae(args.device)
    tokenizer = make_tokenizer(WORK / "tokenizer")

    def snapshot(step: int, unet, text_encoder) -> None:
        sheet = WORK / f"step-{step:05d}{variant}.png"
        sample_sheet(pipeline(vae, tokenizer, unet, text_encoder), sheet)
        if step in SNAPSHOTS:
            folder = WORK / f"snapshots{variant}" / f"step-{step:05d}"
            for name, module in (("unet", unet), ("text_encoder", text_encoder)):
                module.save_pretrained(folder / name)

    rows = redrawn() if args.redrawn else list(world())
    modules = train_unet(vae, tokenizer, args.device, snapshot, rows, args.seed, variant)
    if args.redrawn:
        export_twin(modules, out)
    else:
        export(vae, tokenizer, modules, out, args.seed, variant)


if __name__ == "__main__":
    main()
