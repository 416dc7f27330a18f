"""Where weights come from: one file, half precision, and whatever is missing or too much."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_checkpoints import CAPTIONS, folders, hub, make_vae, ours, theirs  # noqa: F401
from test_flow import make_pipeline as make_flow
from transformers import CLIPTokenizer

import memlib
from memlib.errors import ModelError
from memlib.hub import names, weights
from memlib.hub.files import sha256
from memlib.paths import CONFIGS

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def refused(pattern, *arguments, **options):
    with pytest.raises(ModelError, match=pattern) as error:
        memlib.load(*arguments, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600, str(error.value)


def change(file, edit):
    """Rewrite a file of tensors as `edit` leaves them."""
    save_file(edit(load_file(file)), file, {"format": "pt"})


@pytest.fixture
def copy(folders, tmp_path):  # noqa: F811
    """A function that copies a family's folder."""

    def make(family="sd14"):
        return shutil.copytree(folders(family), tmp_path / f"copy-{family}")

    return make


# ------------------------------------------------------------ one file in the original layout

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip


def renamed(rest: str, names: dict[str, str]) -> str:
    for name, other in names.items():
        if rest.startswith(f"{name}."):
            return other + rest.removeprefix(name)
    return rest


def original_unet(key: str) -> str:
    """A U-Net's tensor as CompVis names it (Rombach et al. 2022, their code)."""
    where = key.split(".")
    if where[0] == "mid_block":
        number = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}
        rest = ".".join(where[3:])
        inner = renamed(rest, RESNET) if where[1] == "resnets" else rest
        return f"middle_block.{number[where[1], where[2]]}.{inner}"
    if where[0] not in ("down_blocks", "up_blocks"):
        return renamed(key, OUTER)
    down, i, kind, j, rest = where[0] == "down_blocks", int(where[1]), *where[2:4], where[4:]
    rest, n = ".".join(rest), 3 * i + int(j)
    if kind == "resnets":
        block = f"input_blocks.{n + 1}" if down else f"output_blocks.{n}"
        return f"{block}.0.{renamed(rest, RESNET)}"
    if kind == "attentions":
        return f"input_blocks.{n + 1}.1.{rest}" if down else f"output_blocks.{n}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    return f"output_blocks.{3 * i + 2}.{2 if i else 1}.{rest}"


def original_vae(key: str) -> str:
    where = key.split(".")
    if where[0] not in ("encoder", "decoder"):
        return key
    coder, rest = where[0], ".".join(where[1:])
    shortcut = {"conv_shortcut": "nin_shortcut"}
    if where[1] == "mid_block":
        inner = ".".join(where[4:])
        if where[2] == "attentions":
            return f"{coder}.mid.attn_1.{renamed(inner, ATTENTION)}"
        return f"{coder}.mid.block_{int(where[3]) + 1}.{renamed(inner, shortcut)}"
    if where[1] not in ("down_blocks", "up_blocks"):
        return f"{coder}.{renamed(rest, {'conv_norm_out': 'norm_out'})}"
    down = where[1] == "down_blocks"
    side, level = ("down", int(where[2])) if down else ("up", 3 - int(where[2]))
    if where[3] == "resnets":
        return f"{coder}.{side}.{level}.block.{where[4]}.{renamed('.'.join(where[5:]), shortcut)}"
    return f"{coder}.{side}.{level}.{side}sample.{'.'.join(where[5:])}"


def original_text(tensors: dict) -> dict:
    """SD v1: the names of `transformers`, with a table of positions that newer ones lack."""
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {f"cond_stage_model.transformer.{k}": v for k, v in (tensors | positions).items()}


def openclip_text(tensors: dict) -> dict:
    """SD v2: OpenCLIP's names, queries, keys and values in one tensor."""
    tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    out = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "text_projection": torch.eye(64), "logit_scale": torch.tensor(4.6),
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
    }  # fmt: skip
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj",
    }  # fmt: skip
    layers = {k.split(".")[2] for k in tensors if k.startswith("encoder.layers.")}
    for n in layers:
        for end in ("weight", "bias"):
            layer, block = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
            for theirs_, ours_ in names.items():
                out[f"{block}.{theirs_}.{end}"] = tensors[f"{layer}.{ours_}.{end}"]
            packed = [tensors[f"{layer}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            out[f"{block}.attn.in_proj_{end}"] = torch.cat(packed)
    return {f"cond_stage_model.model.{k}": v for k, v in out.items()}


def one_file(folder, family: str) -> dict:
    """A diffusers folder's tensors in the original layout."""
    out = {
        f"model.diffusion_model.{original_unet(k)}": v for k, v in load_file(folder / UNET).items()
    }
    for key, value in load_file(folder / VAE).items():
        name = original_vae(key)
        if ".attn_1." in name and name.endswith("weight") and value.ndim == 2:
            value = value[..., None, None]
        out[f"first_stage_model.{name}"] = value
    text = load_file(folder / TEXT)
    out |= original_text(text) if family == "sd14" else openclip_text(text)
    return {k: v.contiguous() for k, v in out.items()} | {"global_step": torch.tensor(1)}


@pytest.fixture(scope="session")
def single(folders, tmp_path_factory):  # noqa: F811
    """A function that writes a family's pipeline as one file."""
    made = {}

    def write(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("single") / f"{family}.safetensors"
            save_file(one_file(folders(family), family), made[family])
        return made[family]

    return write


@pytest.mark.parametrize("family", ["sd14", "sd21", "sd21-base"])
def test_one_file_is_the_folder(folders, single, family):  # noqa: F811
    """Latents, texts and pictures, through diffusers' reader and through its folder format."""
    folder = folders(family)
    model = memlib.load(single(family), config=folder)
    for sampler in ("ddim", "ddpm"):
        kept = ours(model, CAPTIONS, sampler, 7.5)
        assert torch.equal(kept["x_t"][-1], theirs(folder, CAPTIONS, sampler, 7.5))
    other = memlib.load(folder)
    assert model.prediction_type == other.prediction_type
    assert torch.equal(model.encode_text(CAPTIONS)[0], other.encode_text(CAPTIONS)[0])
    assert (model.decode(kept["x_t"][-1]) == other.decode(kept["x_t"][-1])).all()
    assert model.source == f"{family}.safetensors"
    assert model.fingerprint != other.fingerprint


def test_no_repository_is_asked(single, folders, monkeypatch):  # noqa: F811
    import huggingface_hub

    def no_network(*_, **__):
        raise AssertionError("the Hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, no_network)
    memlib.load(single("sd14"), config=folders("sd14"))


def shapes(path, text_width=768, channels=4, more=()):
    """A file that says what kind of model it would be."""
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight":
            torch.zeros(320, text_width),
    }  # fmt: skip
    save_file(tensors | dict.fromkeys(more, torch.zeros(1)), path)
    return path


def test_the_kind_of_a_file_is_told_by_its_shapes(tmp_path):
    file = shapes(tmp_path / "a.safetensors")
    assert weights.local(file).config == CONFIGS / "sd14"
    assert weights.local(file, "sd21-base").config == CONFIGS / "sd21-base"
    refused("or whether it predicts v or epsilon", shapes(tmp_path / "b.safetensors", 1024))
    refused("its kind is unknown", shapes(tmp_path / "c.safetensors", 64))
    refused("unknown config 'sd12'", file, config="sd12")
    refused("takes 9 channels, as for inpainting", shapes(tmp_path / "d.safetensors", channels=9))


@pytest.mark.parametrize("key", ["lora_up.weight", "model.diffusion_model.joint_blocks.0.x"])
def test_other_files_are_refused_by_what_they_have(tmp_path, key):
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(f"no whole model of SD v1 or v2, but .*: it has {key}", tmp_path / "x.safetensors")


def test_files_that_are_no_file_of_weights(tmp_path, folders):  # noqa: F811
    (tmp_path / "x.safetensors").write_bytes(b"<html>not found</html>" * 9)
    refused("cannot be loaded: Error while", tmp_path / "x.safetensors")
    refused("no such file or folder", tmp_path / "nothing.safetensors")
    refused("no such file or folder", "models/nothing.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"")
    refused("is no .safetensors: a pickle can run code", tmp_path / "x.ckpt")
    refused("config is for one .safetensors file", folders("sd14"), config="sd14")
    refused("a revision is for models of the Hub", folders("sd14"), revision="v1")


@pytest.mark.parametrize("family", ["sd14", "sd21"])
@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_"])
def test_one_file_lacks_a_weight(single, folders, tmp_path, part, family):  # noqa: F811
    tensors = load_file(single(family))
    key = next(k for k in tensors if k.startswith(part) and k.endswith("1.weight"))
    tensors.pop(key)
    save_file(tensors, tmp_path / "x.safetensors")
    pattern = "1 of its text_encoder's weights missing" if "cond" in part else "weights are missing"
    refused(pattern, tmp_path / "x.safetensors", config=folders(family))


def test_one_file_with_an_unmerged_lora(single, folders, tmp_path):  # noqa: F811
    tensors = {
        k.replace(".to_q.", ".to_q.base_layer."): v for k, v in load_file(single("sd14")).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    refused("under names that are not SD's", tmp_path / "x.safetensors", config=folders("sd14"))


def test_one_file_without_vae(single, folders, tmp_path):  # noqa: F811
    tensors = load_file(single("sd14"))
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("first_stage")},
        tmp_path / "x.safetensors",
    )
    refused("holds no vae: give one", tmp_path / "x.safetensors", config=folders("sd14"))
    model = memlib.load(
        tmp_path / "x.safetensors", config=folders("sd14"), vae=folders("sd14") / "vae"
    )
    x = torch.randn(1, *model.latent_shape)
    assert (model.decode(x) == memlib.load(folders("sd14")).decode(x)).all()


def test_one_file_holds_too_much(single, folders, tmp_path):  # noqa: F811
    tensors = load_file(single("sd14"))
    key = "model.diffusion_model.input_blocks.1.1.lora_up.weight"
    save_file(tensors | {key: torch.zeros(2)}, tmp_path / "x.safetensors")
    refused("1 of its unet's weights too many", tmp_path / "x.safetensors", config=folders("sd14"))


def test_the_shipped_configurations():
    """Parameters as published (860 and 866 million), and CLIP's words with their published sum."""
    counts = {"sd14": 859_520_964, "sd21": 865_910_724, "sd21-base": 865_910_724}
    for name, count in counts.items():
        folder = CONFIGS / name
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder / "unet")
            )
        assert sum(p.numel() for p in unet.parameters()) == count
    words = CONFIGS / "tokenizer"
    assert sha256(words / "merges.txt").startswith("9fd691f7c8039210e0fced15865466c6")
    assert sha256(words / "vocab.json").startswith("5047b556ce86ccaf6aa22b3ffccfc52d")
    tokenizer = CLIPTokenizer.from_pretrained(words)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


# ------------------------------------------------------------------ missing and too much weights


def without_one(tensors: dict) -> dict:
    tensors.pop(next(k for k in tensors if k.endswith("weight")))
    return tensors


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_weight_is_missing(copy, file):
    folder = copy()
    change(folder / file, without_one)
    refused(rf"{file.split('/')[0]}: its weights do not fit: 1 missing \(", folder)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_weight_too_much(copy, file):
    folder = copy()
    change(folder / file, lambda t: t | {"more.weight": torch.zeros(2)})
    refused(rf"{file.split('/')[0]}: its weights do not fit: 1 too many \(more.weight\)", folder)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_weight_of_another_shape(copy, file):
    folder = copy()
    key = max(k for k in load_file(folder / file) if k.endswith("weight"))
    change(folder / file, lambda t: t | {key: torch.zeros(2, 2)})
    refused(rf"do not fit: 1 of another shape \({key.removeprefix('text_model.')}\)", folder)


@pytest.mark.parametrize(("file", "name"), [(UNET, ".to_q."), (TEXT, ".q_proj.")])
def test_an_unmerged_lora(copy, file, name, capfd):
    folder = copy()
    change(
        folder / file,
        lambda t: {k.replace(name, f"{name}base_layer."): v for k, v in t.items()},
    )
    refused(r"missing \(.* too many \(.*base_layer", folder)
    assert capfd.readouterr().err == ""


def test_positions_of_old_files_are_no_weights(copy):
    """Text encoders written years ago hold a table of positions."""
    folder = copy()
    change(
        folder / TEXT,
        lambda t: {
            **{f"text_model.{k.removeprefix('text_model.')}": v for k, v in t.items()},
            "text_model.embeddings.position_ids": torch.arange(77)[None],
        },
    )
    assert memlib.load(folder).encode_text(["a dog"])[0].isfinite().all()


def test_old_names_of_attention(copy, folders):  # noqa: F811
    """SD v1.4's VAE on the Hub has the names of 2022."""
    folder = copy()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {
                k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                for k, v in tensors.items()
            }
        return tensors

    change(folder / VAE, rename)
    assert not any(".to_q." in k for k in load_file(folder / VAE))
    model, x = memlib.load(folder), torch.randn(1, 4, 16, 16)
    assert (model.decode(x) == memlib.load(folders("sd14")).decode(x)).all()


def test_only_pickles(copy):
    folder = copy()
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    refused("no file named diffusion_pytorch_model.safetensors found in .*unet", folder)


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ({"time_cond_proj_dim": 32}, "more than latents, .* \\(time_cond_proj_dim"),
        ({"class_embed_type": "timestep"}, "more than .* \\(class_embed_type"),
        ({"num_class_embeds": 10}, "more than .* \\(num_class_embeds"),
        ({"in_channels": 9}, "takes 9 channels and gives 4"),
        ({"cross_attention_dim": 32}, "takes text of width 32"),
        ({"sample_size": [16, 24]}, r"sample_size is \[16, 24\]"),
        ({"sample_size": None}, "sample_size is None"),
    ],
)
def test_a_unet_that_takes_more(copy, setting, pattern):
    folder = copy()
    config = UNet2DConditionModel.load_config(folder / "unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config | setting)
    unet.save_pretrained(folder / "unet")
    refused(pattern, folder)


def test_a_tokenizer_with_more_words(copy):
    """As textual inversion leaves it, where the text encoder was not resized."""
    folder = copy()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    refused(r"tokenizer has \d+ words and 77 places, its text encoder \d+ and 77", folder)


def test_a_pair_of_equal_sides(copy, folders):  # noqa: F811
    folder = copy()
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": [16, 16]}))
    model = memlib.load(folder)
    assert model.latent_shape == (4, 16, 16)
    assert model.image_size == 128
    kept = ours(model, CAPTIONS[:1], "ddim", 7.5)
    assert torch.equal(kept["x_t"][-1], theirs(folder, CAPTIONS[:1], "ddim", 7.5))


# ----------------------------------------------------------------------------- half-precision files


def test_a_folder_of_the_variant_fp16(copy, folders):  # noqa: F811
    folder = copy()
    StableDiffusionPipeline.from_pretrained(folder).to(torch.float16).save_pretrained(
        folder, variant="fp16"
    )
    both = memlib.load(folder)  # full precision stands beside it
    x = torch.randn(1, 4, 16, 16)
    args = (x, torch.tensor(500), both.encode_text(["a dog"])[0])
    whole = memlib.load(folders("sd14"))
    assert torch.equal(both.predict(*args), whole.predict(*args))
    rounded = memlib.load(folder, dtype="bfloat16")
    assert not torch.equal(rounded.encode_text(["a dog"])[0], args[2])  # of the rounded weights
    for file in (UNET, VAE, TEXT):
        (folder / file).unlink()
    half = memlib.load(folder)
    torch.testing.assert_close(half.predict(*args), whole.predict(*args), rtol=0.05, atol=0.02)
    assert not torch.equal(half.predict(*args), whole.predict(*args))


def test_another_scheduler(copy):
    """A pipeline saved with a DPM solver runs once the spacing is said, as diffusers runs it."""
    folder = copy()
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "timestep_spacing"}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    pipe.save_pretrained(folder)
    model = memlib.load(folder)
    kept = ours(model, CAPTIONS[:1], "ddpm", 7.5)  # variance_type None is diffusers' fixed_small
    assert torch.equal(kept["x_t"][-1], theirs(folder, CAPTIONS[:1], "ddpm", 7.5))
    with pytest.raises(ValueError, match=r"timestep_spacing='linspace'.*scheduler_config\.json"):
        ours(model, CAPTIONS[:1], "ddim", 7.5)
    model = memlib.load(folder, timestep_spacing="leading")
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "leading"}))
    kept = ours(model, CAPTIONS[:1], "ddim", 7.5)
    assert torch.equal(kept["x_t"][-1], theirs(folder, CAPTIONS[:1], "ddim", 7.5))
    refused("unknown timestep_spacing 'leeding': did you mean", folder, timestep_spacing="leeding")


# ------------------------------------------------------------------------------------------- names


def test_a_folder_has_one_name(folders, monkeypatch):  # noqa: F811
    folder = folders("sd21-base")
    monkeypatch.chdir(folder.parent)
    names = [memlib.load(name).source for name in ("sd21-base", "./sd21-base", folder)]
    assert names == ["./sd21-base"] * 3  # a folder here comes first, and is not the named model


def test_aliases_and_names():
    assert names.checkpoint("realvis") is names.CHECKPOINTS["realvis14"]
    assert names.checkpoint("a/b@v1").revision == "v1"
    file = names.checkpoint("a/b/c/d.safetensors@v2")
    assert (file.repository, file.file, file.revision) == ("a/b", "c/d.safetensors", "v2")
    assert names.checkpoint("models/d.safetensors") is None
    for name, known in names.CHECKPOINTS.items():
        assert known.repository.count("/") == 1, name
        assert known.revision == "main" or len(known.revision) == 40, name


def test_no_lab(monkeypatch, tmp_path):
    monkeypatch.setitem(weights.SHIPPED, "lab", tmp_path / "lab")
    refused("the lab's weights are not here .* clone", "lab")
    refused("unknown model 'labb'", "labb")


def test_a_package_that_does_not_fit(tmp_path):
    """A torchvision that does not fit torch is not the lab's fault, and its reason is said."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.29.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.29.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.1\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-m", "memlib.cli", "trace", "--prompts=1", "--seeds=1",
         "--steps=1", "--similarity=ncc"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "MEMLIB_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last == "error: diffusers cannot be used here: operator torchvision::nms does not exist"


# -------------------------------------------------------------------------------- from the Hub


def test_one_file_from_the_hub(hub, single, folders):  # noqa: F811
    """As Realistic Vision lies there: folders of pickles, and one file in safetensors."""
    repository = hub.handler.folder / "some/pickled"
    shutil.copy(single("sd14"), repository / "whole.safetensors")
    change(
        shutil.copy(single("sd14"), repository / "whole-fp16.safetensors"),
        lambda t: {k: v.half() if v.is_floating_point() else v for k, v in t.items()},
    )
    config = folders("sd14").as_posix()
    script = f"""
from memlib.hub import names
names.CHECKPOINTS["rv"] = names.Checkpoint(
    "RV", "some/pickled", file="whole.safetensors", half="whole-fp16.safetensors",
    vae="some/vae", config={config!r})
print(memlib.load("rv").fingerprint)
print(memlib.load("rv", dtype="bfloat16").fingerprint)
a = memlib.load("rv").encode_text(["a dog"])[0]
print(memlib.load("some/pickled/whole.safetensors", config={config!r}).source, float(a.sum()))
"""
    status, out, error = hub(script)
    assert status == 0, error
    full, half, last = out.strip().splitlines()
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert full.startswith(f"some/pickled@{commit} whole.safetensors config ")
    assert full.endswith(f"vae some/vae@{commit}")
    assert half.startswith(f"some/pickled@{commit} whole-fp16.safetensors config ")
    expected = float(memlib.load(folders("sd14")).encode_text(["a dog"])[0].sum())
    assert last.split()[0] == "some/pickled/whole.safetensors"
    assert float(last.split()[1]) == pytest.approx(expected, rel=1e-4)
    begun = [name for name, _ in hub.handler.begun]
    assert not any(name.endswith(".bin") for name in begun)
    status, _, error = hub("memlib.load('some/pickled/nothing.safetensors')")
    assert "has no file nothing.safetensors" in error[0]


def test_half_the_download(hub, folders):  # noqa: F811
    """Half precision takes the variant fp16 where all of it is there, and only that."""
    repository = hub.handler.folder / "some/both"
    shutil.copytree(folders("sd14"), repository)
    StableDiffusionPipeline.from_pretrained(repository).to(torch.float16).save_pretrained(
        repository, variant="fp16"
    )
    status, out, error = hub(
        'm = memlib.load("some/both", dtype="bfloat16"); print(m.fingerprint, m.precision)'
    )
    assert status == 0, error
    assert out.split()[1:] == ["fp16", "bfloat16"]
    begun = {name for name, _ in hub.handler.begun if name.endswith(".safetensors")}
    assert begun
    assert all(".fp16." in name for name in begun), begun
    status, out, error = hub('print(memlib.load("some/both").fingerprint)')
    assert status == 0, error
    assert "fp16" not in out


def test_a_repository_without_a_vae(hub, folders):  # noqa: F811
    """Its own is not missed where another is given."""
    repository = hub.handler.folder / "some/novae"
    shutil.copytree(folders("sd14"), repository, ignore=shutil.ignore_patterns("vae"))
    script = """
try:
    memlib.load("some/novae")
except ValueError as error:
    print(error)
print(memlib.load("some/novae", vae="some/vae").fingerprint)
"""
    status, out, error = hub(script)
    assert status == 0, error
    first, second = out.strip().splitlines()
    assert "no weights in safetensors format (vae/)" in first
    assert " vae some/vae@" in second


def test_a_flow_model_of_the_hub(hub):  # noqa: F811
    """T5 is downloaded by those who ask for it, and the two are two models."""
    make_flow(t5=True).save_pretrained(hub.handler.folder / "some/flow")
    script = """
from memlib.hub import names
names.CHECKPOINTS["with-t5"] = names.Checkpoint("X", "some/flow", t5=True)
for name in NAMES:
    model = memlib.load(name)
    print(model.source, model.pipe.text_encoder_3 is not None, model.fingerprint, sep="|")
"""
    status, out, error = hub(script.replace("NAMES", "['some/flow']"))
    assert status == 0, error
    assert out.startswith("some/flow|False|some/flow@")
    (snapshot,) = Path(hub.environment["HF_HOME"]).glob("hub/models--some--flow/snapshots/*")
    assert (snapshot / "text_encoder_2/model.safetensors").exists()
    assert not (snapshot / "text_encoder_3").exists()
    status, out, error = hub(script.replace("NAMES", "['with-t5', 'some/flow']"))
    assert status == 0, error
    with_t5, without = (line.split("|") for line in out.strip().splitlines())
    assert (with_t5[1], without[1]) == ("True", "False")  # though it lies beside the others now
    assert with_t5[2] == f"{without[2]} t5"


def test_a_pinned_sum(hub):  # noqa: F811
    script = """
from memlib.hub import names
names.CHECKPOINTS["x"] = names.Checkpoint("X", "some/model", sha256="0" * 64)
print(memlib.load("x", revision="main").source)  # another revision has another sum
memlib.load("x")
"""
    status, out, error = hub(script)
    assert status
    assert out.strip() == "x@main"
    assert "is not the published one (its sha256 differs)" in error[0]


def test_a_vae_in_one_file(folders, tmp_path):  # noqa: F811
    """As VAEs of the original layout are published."""
    width = CONFIGS / "sd14/vae/config.json"
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    vae = AutoencoderKL.from_config(json.loads(width.read_text()))
    tensors = {}
    for key, value in vae.state_dict().items():
        name = original_vae(key)
        attention = ".attn_1." in name and name.endswith("weight") and value.ndim == 2
        tensors[name] = (value[..., None, None] if attention else value).contiguous()
    save_file(tensors, tmp_path / "vae.safetensors")
    model = memlib.load(folders("sd14"), vae=tmp_path / "vae.safetensors")
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        out = vae.eval().decode(x / 0.18215).sample
    expected = ((out / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(model.decode(x), expected, atol=1)


# -------------------------------------------------------------------- what a hostile user found


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copy, file, value):
    folder = copy()

    def spoil(tensors):
        tensors[next(k for k in tensors if k.endswith("weight"))].view(-1)[0] = value
        return tensors

    change(folder / file, spoil)
    refused(f"its {file.split('/')[0]} has weights missing or not finite", folder)


@pytest.mark.parametrize(
    ("part", "setting", "pattern"),
    [
        ("vae", {"scaling_factor": None}, "scaling_factor is None"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("vae", {"shift_factor": 0.1}, "shifts latents"),
        ("unet", {"dual_cross_attention": True}, "too many|missing"),
        ("unet", {"sample_size": 0}, "sample_size is 0"),
        ("scheduler", {"_class_name": "EDMEulerScheduler"}, "states no noise schedule"),
        (
            "scheduler",
            {
                "_class_name": "UniPCMultistepScheduler",
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
            },
            "states no noise schedule",
        ),
    ],
)
def test_configurations_that_make_no_sense(copy, part, setting, pattern):
    folder = copy()
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    found = json.loads(file.read_text()) | setting
    if setting.get("_class_name") == "EDMEulerScheduler":
        found = setting
        index = folder / "model_index.json"
        known = json.loads(index.read_text())
        index.write_text(json.dumps(known | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    file.write_text(json.dumps(found))
    refused(pattern, folder)


def test_no_config(copy):
    folder = copy()
    (folder / "text_encoder/config.json").unlink()
    refused("text_encoder: .* missing .* of another shape", folder)  # than the default's
    (folder / "unet/config.json").unlink()
    refused("no file named config.json found in .*unet", folder)


def test_variants_that_are_not_read(copy):
    folder = copy()
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    refused("no file named diffusion_pytorch_model.safetensors found in .*unet", folder)


def test_a_vae_that_scales_otherwise(copy, folders):  # noqa: F811
    other = copy() / "vae"
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.13025}))
    refused("scaling_factor is 0.13025, the pipeline's own has 0.18215", folders("sd14"), vae=other)


def test_places_of_a_vae(folders, tmp_path):  # noqa: F811
    refused("the VAE .*/x cannot be loaded: ", folders("sd14"), vae=tmp_path / "x")
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    refused("names that are not SD's", folders("sd14"), vae=tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"lora_unet_x.lora_up.weight": torch.zeros(2)}, "1 weights beside the model"),
        ({"control_model.input_hint.weight": torch.zeros(2)}, "1 weights beside the model"),
        ({"v_pred": torch.zeros(0)}, "another prediction or noise schedule"),
        ({"alphas_cumprod": torch.linspace(1, 0.1, 1000)}, "another prediction or noise schedule"),
    ],
)
def test_what_else_one_file_says(single, folders, tmp_path, more, pattern):  # noqa: F811
    save_file(load_file(single("sd14")) | more, tmp_path / "x.safetensors")
    refused(pattern, tmp_path / "x.safetensors", config=folders("sd14"))


def test_what_one_file_may_hold(single, folders, tmp_path):  # noqa: F811
    """Its own schedule where it is the configuration's, averages, and parts that are not read."""
    schedule = StableDiffusionPipeline.from_pretrained(folders("sd14")).scheduler.alphas_cumprod
    more = {
        "alphas_cumprod": schedule.clone(), "model_ema.decay": torch.zeros(1),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(2),
        "cond_stage_model.logit_scale": torch.zeros(1),
    }  # fmt: skip
    save_file(load_file(single("sd14")) | more, tmp_path / "x.safetensors")
    model = memlib.load(tmp_path / "x.safetensors", config=folders("sd14"))
    expected = memlib.load(folders("sd14")).encode_text(CAPTIONS)[0]
    assert torch.equal(model.encode_text(CAPTIONS)[0], expected)


def test_one_file_with_the_names_of_newer_transformers(single, folders, tmp_path):  # noqa: F811
    tensors = {
        k.replace("transformer.text_model.", "transformer."): v
        for k, v in load_file(single("sd14")).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    refused("under names that are not SD's", tmp_path / "x.safetensors", config=folders("sd14"))


def test_options_that_say_nothing(folders, tmp_path):  # noqa: F811
    refused("the exact model has no timestep_spacing", "exact", timestep_spacing="trailing")
    refused("the exact model has no vae", "exact", vae="nonsense")
    refused("unknown config 'nonsense': give sd14, sd21, sd21-base or",
            shapes(tmp_path / "a.safetensors"), config="nonsense")  # fmt: skip
    refused("inner products need float64", folders("sd14"), device="mps")


def test_a_folder_called_like_a_file(folders, tmp_path):  # noqa: F811
    folder = shutil.copytree(folders("sd14"), tmp_path / "model.safetensors")
    assert memlib.load(folder).source == "model.safetensors"


def test_pictures_that_are_not_finite(folders, monkeypatch):  # noqa: F811
    model = memlib.load(folders("sd14"))
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"pictures of .* are not finite"):
        model.decode(torch.randn(1, *model.latent_shape))


def test_thresholding_is_refused(copy):
    folder = copy()
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"thresholding": True}))
    with pytest.raises(ValueError, match="dynamic thresholding"):
        ours(memlib.load(folder), CAPTIONS[:1], "ddim", 7.5)


def test_loading_is_silent():
    """In a process of its own: nothing is imported yet, and transformers gives advice then."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", "import memlib; memlib.load('lab')"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout + run.stderr == ""
