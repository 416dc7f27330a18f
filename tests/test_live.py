"""The lab in the page: its scripts in node, against numbers of memlib."""

import base64
import gzip
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import memlib
from memlib.errors import ModelError
from memlib.paths import LAB, ROOT
from memlib.site import live

SOURCES = ROOT / "book/_live"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed")
CAPTIONS = [
    "a red apple on a blue background", "", "A Red   APPLE's, 12 éclairs & 3 naïve café-owners!",
    "don't we'll they're I'd 123 …", "日本語 кот 🦊", " ".join(["word"] * 40), "<|endoftext|> x",
]  # fmt: skip


def run(folder, script: str, **given):
    """What a script says as JSON, beside the page's modules; `given` is JSON that it reads."""
    for file in SOURCES.glob("*.js"):
        text = re.sub(r'(from "\./\w+)\.js', r"\1.mjs", file.read_text())
        (folder / f"{file.stem}.mjs").write_text(text)
    (folder / "given.json").write_text(json.dumps(given))
    head = "import fs from 'fs';const given = JSON.parse(fs.readFileSync('given.json'));"
    head += "const said = (value) => console.log(JSON.stringify(value));"
    (folder / "script.mjs").write_text(head + script)
    done = subprocess.run([NODE, "script.mjs"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shared(lab):
    halves, table = live.network(LAB)
    pairs = memlib.load_pairs("lab")
    return halves, live.shared(lab, pairs, len(halves) // 2, table)


@needs_node
def test_the_noise_is_torchs(tmp_path):
    script = "import {noise} from './noise.mjs'; said(given.seeds.map((s) => [...noise(2048, s)]));"
    seeds = [0, 1, 7, 123456789, 2**32 - 1]
    for seed, found in zip(seeds, run(tmp_path, script, seeds=seeds), strict=True):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randn(1, 8, 16, 16, generator=generator).flatten()
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)


@needs_node
def test_the_tokens_are_clips(tmp_path, lab, shared):
    script = (
        "import {tokenizer} from './tokenizer.mjs'; const read = tokenizer(given.words);"
        "said(given.captions.map(read));"
    )
    captions = [*CAPTIONS, *memlib.load_pairs("lab").caption]
    words = shared[1]["tokenizer"]
    found = run(tmp_path, script, words=words, captions=captions)
    tokenizer = lab.pipe.tokenizer
    expected = tokenizer(captions, padding="max_length", truncation=True).input_ids
    for caption, one, ids in zip(captions, found, expected, strict=True):
        assert one["ids"] == ids, caption
    assert [one["cut"] for one in found] == lab.tokens_cut(captions).tolist()


STEPS = """
import {networks} from './networks.mjs'; import {noise} from './noise.mjs';
import * as S from './sampler.mjs'; import {tokenizer} from './tokenizer.mjs';
const floats = (name) => new Float32Array(new Uint8Array(fs.readFileSync(name)).buffer);
const shared = JSON.parse(fs.readFileSync('shared.json'));
const {table, scaling} = shared;
const [binary, halves] = ['kernels.wasm', 'halves'].map((name) => fs.readFileSync(name));
const net = await networks(binary, halves, table, scaling);
const read = tokenizer(shared.tokenizer), B = given.seeds.length, D = 2048;
const text = net.embed([read('').ids, read(given.caption).ids]), half = text.length / 2;
const both = new Float32Array(B * text.length);
for (let i = 0; i < B; i++) {
  both.set(text.subarray(0, half), i * half);
  both.set(text.subarray(half), (B + i) * half);
}
const condition = net.condition(both), alphas = floats('alphas'), image = floats('image');
const {times, levels} = S.schedule(alphas, given.steps);
let x = new Float32Array(B * D);
given.seeds.forEach((seed, n) => x.set(noise(D, seed), n * D));
const start = x.slice(), found = {times, levels, k: [], w: [], perfect: S.oracle(levels)};
for (let i = 0; i < given.steps; i++) {
  const two = new Float32Array(2 * x.length);
  two.set(x); two.set(x, x.length);
  const said = net.predict(two, times[i], condition);
  const [u, c] = [said.subarray(0, x.length), said.subarray(x.length)];
  found.k.push(given.seeds.map((_, n) => S.factors(x, u, c, image, given.scale, levels[i], n * D)));
  found.w.push(given.seeds.map((_, n) => S.weights(x, start, image, n * D)));
  x = S.update(x, u, c, given.scale, levels[i], levels[i + 1]).state;
}
found.apart = S.distance(x, x, 0, D, D);
found.text = [...text]; found.last = [...x]; found.pixels = [...net.decode(x)];
said(found);
"""


@needs_node
def test_ten_updates_are_memlibs(tmp_path, lab, shared):
    """Embeddings, latents, factors, weights, distances and pixels of one caption and two seeds."""
    halves, data = shared
    pair = memlib.load_pairs("lab").query("multiplicity == 128").iloc[:1]
    decoder = base64.b64decode(data["decoder"])
    split = np.frombuffer(gzip.decompress(decoder), np.uint8).reshape(2, -1)
    (tmp_path / "halves").write_bytes(halves + split[::-1].T.tobytes())
    (tmp_path / "shared.json").write_text(json.dumps(data))
    shutil.copy(SOURCES / "kernels.wasm", tmp_path)
    (tmp_path / "alphas").write_bytes(base64.b64decode(data["alphas"]))
    image = lab.encode_images(pair.image)[0]
    image.numpy().tofile(tmp_path / "image")
    found = run(tmp_path, STEPS, caption=pair.caption.iloc[0], seeds=[0, 1], steps=10, scale=7.5)
    trace = memlib.reverse_trace(lab, pair, seeds=[0, 1], steps=10, similarity=None)
    went = memlib.trajectories(lab, [pair.caption.iloc[0]] * 2, [0, 1], 7.5, "ddim", 10)
    assert [*found["times"], -1] == trace.timestep.values.tolist()
    assert found["levels"] == pytest.approx(trace.alpha_bar.values, rel=1e-6)
    cond, uncond = lab.encode_text(list(pair.caption))
    text = torch.cat([uncond, cond]).flatten()
    torch.testing.assert_close(torch.tensor(found["text"]), text, rtol=1e-4, atol=1e-4)
    last = went["x_t"][-1].flatten()
    off = (torch.tensor(found["last"]) - last).norm() / last.norm()
    assert off < 1e-4
    for name, g in (("guided", None), ("conditional", 1.0), ("unconditional", 0.0)):
        k = memlib.overestimation(trace, g).values[0, :, :-1].T
        mine = [[one[name] for one in row] for row in found["k"]]
        assert np.array(mine) == pytest.approx(k, rel=2e-3, abs=2e-3)
    weights = memlib.weights(trace)
    for name, mine in (("w_0", "image"), ("w_T", "noise")):
        values = [[one[mine] for one in row] for row in found["w"]]
        assert np.array(values) == pytest.approx(weights[name].values[0, :, :-1].T, abs=1e-3)
        perfect = memlib.reference_weights(trace, "oracle")[name].values
        assert [one[mine] for one in found["perfect"]] == pytest.approx(perfect, abs=1e-6)
    assert found["apart"] == pytest.approx(float(trace.seed_distance[0, -1, 0, 1]), rel=1e-3)
    pixels = np.clip(np.round((np.array(found["pixels"]) / 2 + 0.5) * 255), 0, 255)
    assert np.abs(pixels.reshape(2, 64, 64, 3) - lab.decode(went["x_t"][-1])).max() <= 1


@needs_node
def test_the_last_level_is_diffusers(tmp_path):
    """Whatever the number of steps: the final level is that of the first timestep."""
    script = (
        "import {schedule} from './sampler.mjs';"
        "said(given.steps.map((s) => schedule(given.alphas, s)));"
    )
    alphas = memlib.schedule.make_scheduler(
        memlib.models.stable_diffusion_schedule(), "ddim", 1
    ).alphas_cumprod
    counts = [5, 10, 20, 25, 40, 45, 50]
    found = run(tmp_path, script, steps=counts, alphas=alphas.tolist())
    for steps, one in zip(counts, found, strict=True):
        scheduler = memlib.schedule.make_scheduler(
            memlib.models.stable_diffusion_schedule(), "ddim", steps
        )
        times, levels = memlib.schedule.state_levels(scheduler)
        assert [*one["times"], -1] == times.tolist()
        assert one["levels"] == pytest.approx(levels)


def test_another_architecture_is_refused(tmp_path):
    for part in ("text_encoder", "unet", "vae"):
        (tmp_path / part).mkdir()
        shutil.copy(LAB / part / "config.json", tmp_path / part)
    live.check(tmp_path)
    config = json.loads((LAB / "unet/config.json").read_text()) | {"layers_per_block": 2}
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the page knows layers_per_block=1, not 2"):
        live.check(tmp_path)


BUILD = re.search(r"// Build: (.*)", (SOURCES / "kernels.c").read_text())[1]


@pytest.mark.skipif(not shutil.which("wasm-ld"), reason="clang and lld are not installed")
def test_the_binary_is_of_its_source(tmp_path):
    """Byte for byte, with the version of clang that made it."""
    said = subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout
    if "version 14." not in said:
        pytest.skip("another version of clang")
    shutil.copy(SOURCES / "kernels.c", tmp_path)
    subprocess.run(BUILD, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "kernels.wasm").read_bytes() == (SOURCES / "kernels.wasm").read_bytes()
