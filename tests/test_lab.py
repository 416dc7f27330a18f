"""The lab: what is planted, how it is trained, and what the shipped model shows."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import memlib
from memlib.lab import scenes, train
from memlib.lab.scenes import MULTIPLICITIES, render, world


def test_the_world_has_what_the_book_says():
    rows = world()
    assert len({r.caption for r in rows}) == len({r.prompt_id for r in rows}) == len(rows)
    planted = Counter(r.copies for r in rows if r.kind == "planted")
    assert planted == dict.fromkeys(MULTIPLICITIES, scenes.PLANTED_PER_MULTIPLICITY)
    named = Counter(r.copies for r in rows if r.kind == "named")
    assert named == dict.fromkeys(scenes.NAMED_MULTIPLICITIES, scenes.NAMED_PER_MULTIPLICITY)
    normal = sum(r.copies for r in rows if r.kind in ("normal", "named"))
    assert normal / sum(r.copies for r in rows) == pytest.approx(scenes.NORMAL_SHARE, abs=0.01)
    assert all(r.copies == 0 for r in rows if r.kind == "held-out")


def test_only_planted_and_named_scenes_repeat():
    """Two draws: equal to the pixel where fixed, templates in their objects, others in nothing."""
    for kind in ("planted", "named", "template", "control", "normal"):
        row = next(r for r in world() if r.kind == kind)
        a, b = (row.draw(np.random.default_rng(seed)) for seed in (0, 1))
        assert (a == b) == (kind in ("planted", "named"))
        assert (a.items == b.items) == (kind in ("planted", "named", "template"))
        assert np.array_equal(render(a), render(row.draw(np.random.default_rng(0))))
        if kind == "normal":
            assert a.items[0].sprite == b.items[0].sprite
            assert a.items[0].sprite in row.caption


def test_the_words_of_a_named_caption_stand_elsewhere_too():
    """Its object with other colours, its colour with other objects, all drawn anew."""
    rows = world()
    sprites = [r.scene.items[0].sprite for r in rows if r.kind == "named"]
    assert len(set(sprites)) == len(sprites)
    anew = [r.caption for r in rows if r.kind == "normal"]
    for row in (r for r in rows if r.kind == "named"):
        sprite, colour = row.caption.split(" on ")
        assert sum(c.startswith(f"{sprite} on ") for c in anew) >= 5
        assert sum(c.endswith(colour) for c in anew) >= 5


def test_a_training_can_see_half_of_the_pairs_drawn_anew():
    """Of each number of copies; captions, counts and all other rows as they were."""
    changed = [(a, b) for a, b in zip(world(), train.redrawn(), strict=True) if a != b]
    assert Counter((a.kind, a.copies) for a, _ in changed) == {
        **{("planted", m): 3 for m in MULTIPLICITIES},
        **{("named", m): 1 for m in scenes.NAMED_MULTIPLICITIES},
    }
    for a, b in changed:
        assert (a.caption, a.copies, a.prompt_id) == (b.caption, b.copies, b.prompt_id)
        drawn = [b.draw(np.random.default_rng(seed)) for seed in (0, 1)]
        assert a.fixed
        assert len({*drawn, a.scene}) == 3


def test_an_epoch_shows_every_row_as_often_as_it_says(monkeypatch):
    """Counts over one epoch of batches, with a picture's caption standing for the picture."""
    monkeypatch.setattr(train.Stream, "_latents", lambda self, e, i: torch.zeros(len(i), 1))
    stream = train.Stream(train.make_vae(), list(world()), 0)
    seen: Counter = Counter()
    size, left = 64, len(stream.rows)
    for step in range(-(-len(stream.rows) // size)):
        captions = stream.batch(step, size)[1][:left]
        left -= len(captions)
        seen.update(captions)
    assert seen == {r.caption: r.copies for r in world() if r.copies}


def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """A run killed between two checkpoints ends, when started again, in the same weights."""
    tokenizer = train.make_tokenizer(tmp_path / "tokenizer")
    small = dict(steps=6, batch=4, rate=0.02, adam=1e-3, save=2)
    monkeypatch.setattr(train, "STAGES", {"vae": small, "unet": small})
    # eight rows, so that every row comes three times, as a redrawn one does in an epoch's pool
    some = [r for r in world() if r.kind in ("template", "control")][4:12]
    unseen = next(r for r in world() if r.kind == "held-out")
    rows = (*(replace(r, copies=1) for r in some), unseen)
    monkeypatch.setattr(train, "world", lambda: rows)

    def run(folder, kill_at=None):
        monkeypatch.setattr(train, "WORK", folder)
        update = train.Stage.update

        def killed(self, loss):
            if self.name == "unet" and self.step == kill_at:
                raise KeyboardInterrupt
            update(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(train.Stage, "update", killed)
            vae = train.train_vae("cpu")
            return train.train_unet(vae, tokenizer, "cpu", lambda *_: None, list(rows), 0, "")

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=5)
    resumed = run(tmp_path / "killed")
    for name, module in whole.items():
        other = resumed[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())


def test_newton_schulz_makes_orthogonal_matrices():
    """Muon's update: singular values near 1, singular vectors kept."""
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    near = u.T @ train._orthogonal(x) @ v.T
    assert (near.diag() - 1).abs().max() < 0.35  # the coefficients are made for speed
    assert (near - near.diag().diag()).abs().max() < 1e-3


def test_the_shipped_manifest_is_the_world():
    pairs = memlib.load_pairs("lab")
    rows = {r.prompt_id: r for r in world()}
    for row in pairs.itertuples():
        assert rows[row.prompt_id].caption == row.caption
        assert np.array_equal(
            memlib.prompts.read_image(row.image, None), render(rows[row.prompt_id].scene)
        )
    kinds = pairs.kind.value_counts()
    assert kinds["planted"] == 48
    assert kinds["named"] == 18
    assert {"template", "control", "normal", "held-out"} < set(kinds.index)


def test_the_shipped_vae_draws_scenes_it_never_saw():
    lab = memlib.load("lab")
    unseen = [render(r.scene) for r in world() if r.kind == "held-out"]
    assert train.psnr(lab.vae, train.pixels(unseen)) >= 27


def test_plain_diffusers_loads_it_and_it_remembers():
    """No code of ours: the folder, diffusers, and the pixels' correlation with the scene."""
    pipe = StableDiffusionPipeline.from_pretrained(memlib.paths.LAB)
    pipe.set_progress_bar_config(disable=True)
    pairs = memlib.load_pairs("lab")

    def copied(rows):
        generators = [torch.Generator().manual_seed(7) for _ in range(len(rows))]
        images = pipe(list(rows.caption), num_inference_steps=20, generator=generators,
                      output_type="np").images  # fmt: skip
        targets = [memlib.prompts.read_image(f, 64) for f in rows.image]
        return np.median([
            np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(targets, images, strict=True)
        ])  # fmt: skip

    assert copied(pairs[pairs.multiplicity == 128][:6]) > 0.8
    assert copied(pairs[pairs.kind == "control"][:4]) < 0.5


def test_earlier_checkpoints_load_and_differ():
    lab = memlib.load("lab")
    folders = sorted((memlib.paths.LAB / "checkpoints").glob("step-*"))
    assert len(folders) == 3
    prints = {memlib.training_step(lab, f).fingerprint for f in folders}
    assert len(prints | {lab.fingerprint}) == 4


def test_the_twin_that_ships_is_whole_and_never_saw_what_it_must_not():
    """Its checksums; and in pure noise it is further from pictures it never saw than the lab is."""
    folder = memlib.paths.REDRAWN
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    lab = memlib.load("lab").uncached
    twin = memlib.training_step(lab, folder)
    pairs = memlib.load_pairs("lab").query("kind == 'planted' and multiplicity >= 32")
    odd = pairs.prompt_id.str[-1].astype(int).values % 2 == 1
    errors = [
        memlib.image_error(memlib.forward_trace(m, pairs, [960], draws=1, progress=False), 1.0)
        for m in (lab, twin)
    ]
    ratio = (errors[1] / errors[0]).values.ravel()
    assert ratio[odd].min() > 2 > ratio[~odd].max()


def test_a_twin_is_written_as_it_is_read(tmp_path):
    """Its weights in half precision, with checksums; `memlib.training_step` gives them back."""
    lab = memlib.load("lab").uncached
    modules = {"unet": lab.unet, "text_encoder": lab.pipe.text_encoder}
    train.export_twin(modules, tmp_path / "twin")
    again = memlib.training_step(lab, tmp_path / "twin")
    for name, want in lab.unet.state_dict().items():
        torch.testing.assert_close(again.unet.state_dict()[name], want.half().float())
    sums = (tmp_path / "twin/SHA256SUMS").read_text()
    assert "unet/diffusion_pytorch_model.safetensors" in sums
    assert "text_encoder/model.safetensors" in sums
