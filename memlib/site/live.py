"""The lab in the page: weights, tokenizer and latents as a script that a reader's browser loads.

Made of ``data/lab`` when the site is built; nothing of it is in git. A page that is opened from a
folder may load scripts and pictures and nothing else, so the data are one script with base64.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from memlib.errors import ModelError
from memlib.hub.loading import load
from memlib.hub.manifests import load_pairs
from memlib.paths import LAB, ROOT

SOURCES, DATA = ROOT / "book/_live", "live-data.js"

PARTS = {  # what the kernels' networks are made of: the architecture that they know
    "text": ("text_encoder/model.safetensors", "text_encoder", dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        hidden_act="quick_gelu")),
    "unet": ("unet/diffusion_pytorch_model.safetensors", "unet", dict(
        block_out_channels=[64, 64, 112], layers_per_block=1, in_channels=8, sample_size=16,
        norm_num_groups=16, attention_head_dim=4, cross_attention_dim=128)),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "vae", dict(
        block_out_channels=[24, 48, 96], latent_channels=8, norm_num_groups=8,
        mid_block_add_attention=False)),
}  # fmt: skip


def check(folder: Path = LAB) -> None:
    """Refuse a lab of another architecture than the page's kernels know."""
    for _, part, known in PARTS.values():
        config = json.loads((folder / part / "config.json").read_text())
        for name, value in known.items():
            if (own := config.get(name)) != value:
                raise ModelError(
                    f"{folder / part}: the page knows {name}={value}, not {own}: change "
                    "book/_live/networks.js with it"
                )


def arranged(values: np.ndarray, matrix: bool) -> tuple[np.ndarray, list[int]]:
    """A tensor in the order of the kernels, and its shape [taps, inputs, outputs] if a matrix.

    A matrix or convolution is [outputs / 8][taps][inputs][8], outputs filled up with zeros: what
    eight sums need lies together.
    """
    if not matrix:
        return values.ravel(), []
    outputs, inputs = values.shape[:2]
    taps = int(np.prod(values.shape[2:]))
    values = np.pad(values.reshape(outputs, inputs, taps), ((0, -outputs % 8), (0, 0), (0, 0)))
    return values.reshape(-1, 8, inputs, taps).transpose(0, 3, 2, 1).ravel(), [
        taps,
        inputs,
        outputs,
    ]


def weights(files: dict[str, Path], start: int = 0) -> tuple[bytes, dict[str, list[int]]]:
    """Tensors of networks as float16 in the kernels' order, and where each lies and its shape."""
    parts, table = [], {}
    for prefix, file in files.items():
        tensors = load_file(file)
        for name in sorted(tensors):
            if prefix == "vae" and not name.startswith(("decoder.", "post_quant")):
                continue
            values = tensors[name].float().numpy()
            matrix = values.ndim > 1 and "_embedding.weight" not in name
            flat, shape = arranged(values, matrix)
            flat = np.pad(flat.astype(np.float16), (0, -len(flat) % 8))
            table[f"{prefix}.{name}"] = [start + sum(map(len, parts)), len(flat), *shape]
            parts.append(flat)
    return np.concatenate(parts).tobytes(), table


def packed(halves: bytes) -> str:
    """float16 as base64 of gzip, high bytes first: these are alike, the low ones are noise."""
    pairs = np.frombuffer(halves, np.uint8).reshape(-1, 2)
    return base64.b64encode(gzip.compress(pairs[:, ::-1].T.tobytes(), 9, mtime=0)).decode()


def network(folder: Path) -> tuple[bytes, dict]:
    """Text encoder and U-Net of one training step."""
    return weights({part: folder / PARTS[part][0] for part in ("text", "unet")})


def shared(model, pairs: pd.DataFrame, start: int, table: dict) -> dict:
    """What all training steps share: decoder, latents of the pairs, noise levels, tokenizer."""
    decoder, more = weights({"vae": LAB / PARTS["vae"][0]}, start)
    words, tokenizer = (
        json.loads((LAB / "tokenizer/tokenizer.json").read_text()),
        model.pipe.tokenizer,
    )
    alphas = model.pipe.scheduler.alphas_cumprod.numpy().astype(np.float32)
    return {
        "decoder": packed(decoder), "table": table | more,
        "scaling": model.vae.config.scaling_factor, "images": list(pairs.prompt_id),
        "latents": packed(model.encode_images(pairs.image).half().numpy().tobytes()),
        "alphas": base64.b64encode(alphas.tobytes()).decode(),
        "tokenizer": {
            **{name: words["model"][name] for name in ("vocab", "merges")},
            "begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id,
            "length": tokenizer.model_max_length,
        },
    }  # fmt: skip


def joined(*names: str) -> str:
    """JavaScript modules as one script, a scope of its own; their names do not collide."""
    texts = [(SOURCES / f"{name}.js").read_text() for name in names]
    plain = [re.sub(r"(?m)^import .*\n|^export ", "", text) for text in texts]
    return "(() => {\n" + "\n".join(plain) + "\n})();\n"


def group(row) -> str:
    """How the page calls a prompt."""
    if row.kind != "planted":
        return row.kind
    return "memorized" if row.multiplicity >= 32 else "between" if row.multiplicity >= 8 else "few"


def write(folder: Path) -> None:
    """The page's scripts and pictures, into a folder of the site."""
    check()
    model, pairs = load("lab", "cpu"), load_pairs("lab")
    steps = sorted((LAB / "checkpoints").glob("step-*"))
    files = {"live-final.js": (LAB, "to the end")}
    files |= {f"live-{p.name}.js": (p, f"{int(p.name[5:])} steps") for p in steps}
    snapshots = []
    for name, (place, label) in files.items():
        halves, table = network(place)
        text = f"LIVE_DATA[{json.dumps(name)}] = {json.dumps({'weights': packed(halves)})};\n"
        (folder / name).write_text(text)
        snapshots.append({"file": name, "label": label, "bytes": len(text)})
    data = json.dumps(shared(model, pairs, len(halves) // 2, table), separators=(",", ":"))
    text = f"globalThis.LIVE_DATA = {{ {json.dumps(DATA)}: {data} }};\n"
    (folder / DATA).write_text(text)
    for one in snapshots:
        one["megabytes"] = round((one.pop("bytes") + len(text)) / 1e6)
    (folder / "pictures").mkdir(exist_ok=True)
    for row in pairs.itertuples():
        shutil.copy(row.image, folder / "pictures")
    rows = [
        {
            "id": r.prompt_id,
            "caption": r.caption,
            "kind": r.kind,
            "copies": int(r.multiplicity),
            "group": group(r),
        }
        for r in pairs.sort_values("multiplicity", ascending=False, kind="stable").itertuples()
    ]
    words, other = ([r["caption"].split() for r in rows if r["group"] == "memorized"])[:2]
    changed = " ".join([*words[:2], other[2], *words[3:]])
    known = {
        "worker": joined("noise", "tokenizer", "networks", "sampler", "worker"), "pairs": rows,
        "binary": base64.b64encode((SOURCES / "kernels.wasm").read_bytes()).decode(),
        "snapshots": [*snapshots[1:], snapshots[0]], "folder": DATA, "changed": changed,
    }  # fmt: skip
    base = "LIVE.base = document.currentScript.src.replace(/[^/]*$/, '');\n"
    script = f"globalThis.LIVE = {json.dumps(known)};\n{base}{joined('sampler', 'plots', 'page')}"
    (folder / "live.js").write_text(script)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    write(Path(sys.argv[1]))
