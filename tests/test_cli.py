"""The command line: what it answers, what it answers without torch, what it refuses."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_lists import LAB
from test_sscd import sha256_of

import memlib
from memlib import cli
from memlib.cli.fetch import addresses
from memlib.cli.trace import default_pairs, write_table
from memlib.hub import lists, sscd
from memlib.hub.checkpoints import VAE_REVISION
from memlib.hub.lists import LISTS
from memlib.hub.names import CHECKPOINTS

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "matplotlib")
SCRIPT = f"""
import dataclasses, sys
from memlib import cli
from memlib.hub import lists
name = "webster-sd14"
lists.LISTS[name] = dataclasses.replace(lists.LISTS[name], md5=sys.argv[1])
try:
    status = cli.main(sys.argv[2:])
except SystemExit as end:
    status = end.code
print("status", status, "loaded", *{{*{HEAVY}}} & {{*sys.modules}})
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--help", "memlib trace | verify | fetch | book | doctor"),
        ("trace --help", "--ray-address"),
        ("verify", "no run in "),
        ("doctor --quick", "webster-sd14     1 prompts, 0 with an image"),
        ("fetch webster-sd14 --images .", "webster-sd14: 1 prompts, 0 with an image"),
        ("fetch sscd-large", "status 1"),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments, said, tmp_path):
    """In a process of its own."""
    file = tmp_path / "data/webster-sd14" / LISTS["webster-sd14"].file
    file.parent.mkdir(parents=True)
    row = {"index": [7], "caption": ["a boat"], "url": ["http://a/1"], "overfit_type": ["MV"]}
    pd.DataFrame(row).to_parquet(file)
    (tmp_path / "empty").mkdir()
    folders = {"MEMLIB_DATA": str(tmp_path / "data"), "MEMLIB_CACHE": str(tmp_path / "cache")}
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, md5, *arguments.split()], cwd=tmp_path / "empty",
        env=os.environ | folders, capture_output=True, text=True,
    )  # fmt: skip
    assert said in run.stdout, run.stderr
    status = 1 if said == "status 1" else 0
    assert run.stdout.splitlines()[-1] == f"status {status} loaded"


def test_help_lists_every_model(capsys):
    for command in ("trace", "book", "fetch"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert ", ".join(CHECKPOINTS) in words
        assert "a Hub id" in words


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["trace", "--model", "sd"], "unknown model 'sd'"),
        (["trace", "--sampler", "dim", "--prompts", "1"], "did you mean 'ddim'"),
        (["trace", "--only-with-images", "--pairs", "list.csv"], "no prompt is left"),
        (["trace", "--pairs", "webster-sd21"], "memlib fetch webster-sd21"),
        (["trace", "--device", "cuda:7"], "torch finds no GPU here"),
        (["fetch", "webster-sd15"], "did you mean 'webster-sd"),
        (["fetch", "sscd-large"], "Meta publishes no checksum of sscd_disc_large"),
        (["fetch", "sscd-lrge"], "did you mean 'sscd-large'"),
        (["fetch", "sd21-bse"], "did you mean 'sd21-base'"),
        (["book", "--model", "sd14", "--profile", "smok"], "did you mean 'smoke'"),
    ],
)
def test_wrong_commands(arguments, pattern, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("caption\na\n")
    assert cli.main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert pattern in errors[0]


@pytest.mark.parametrize("option", ["--prompts", "--every", "--threads", "--workers", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_are_at_least_one(option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["trace", option, value])
    assert "no whole number of at least 1" in capsys.readouterr().err


def test_an_older_name_of_an_option(capsys):
    for name in ("--ray-address", "--address"):
        assert cli.parser().parse_args(["trace", name, "auto"]).ray_address == "auto"
    with pytest.raises(SystemExit):
        cli.main(["trace", "--help"])
    out = capsys.readouterr().out
    assert "--ray-address" in out
    assert " --address" not in out


def test_trace_from_the_command_line(webster, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))
    shutil.copy(LAB.image[0], webster / "images" / "40.png")
    command = ["trace", "--model", "lab", "--pairs", "webster-sd14", "--seeds", "2", "--steps", "3",
               "--out", str(tmp_path / "out.csv")]  # fmt: skip
    assert cli.main(command) == 0
    assert "5 prompts (1 with an image), 2 seeds, ddim, 3 steps, lab in float32 on cpu" in (
        capsys.readouterr().out
    )
    table = pd.read_csv(tmp_path / "out.csv", dtype={"prompt_id": str})
    assert list(table.prompt_id) == ["7", "12", "12-2", "40", "41"]
    assert list(table.D1.notna()) == [False, False, False, True, False]
    pairs = memlib.load_pairs("webster-sd14")
    trace = memlib.cached(memlib.reverse_trace, memlib.load("lab"), pairs, seeds=range(2), steps=3)
    np.testing.assert_allclose(table.D1[3], memlib.deviations(trace).D1[3])
    assert cli.main([*command[:5], "--seeds", "1", "--steps", "2", "--only-with-images"]) == 0
    assert "1 prompts (1 with an image)" in capsys.readouterr().out


def test_two_lists_are_recorded_with_equal_settings(tmp_path, monkeypatch, capsys):
    """Whether their ids are made up, or their own: then each has a run, and both are found."""
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))

    def trace(text):
        (tmp_path / "list.csv").write_text(text)
        code = cli.main(["trace", "--pairs", str(tmp_path / "list.csv"), "--seeds", "1",
                         "--steps", "2", "--severity", "ncc"])  # fmt: skip
        out = capsys.readouterr()
        assert code == 0, out.err
        return re.search(r"(\d+) pieces recorded, (\d+) were there", out.out).groups()

    assert trace("caption\na red boat\na green tree\n") == ("2", "0")
    assert trace("caption\ntwo blue cars\na red boat\n") == ("1", "1")
    assert trace("caption\na read boat\na green tree\n") == ("1", "1")  # a typo
    assert trace("caption,kind\na green tree,control\n") == ("1", "0")
    assert len(list((tmp_path / "cache").glob("run-*/plan.json"))) == 1
    assert trace("caption,prompt_id\na,1\nb,2\n") == ("2", "0")
    assert trace("caption,prompt_id\nc,1\nd,2\n") == ("2", "0")
    assert trace("caption,prompt_id\nd,2\ne,3\n") == ("1", "1")
    assert trace("caption,prompt_id\nb,2\n") == ("0", "1")
    assert len(list((tmp_path / "cache").glob("run-*/plan.json"))) == 2
    sampled = []
    monkeypatch.setattr("memlib.runs.tracing.sample", lambda *_: sampled.append(1))
    for text in ("caption,prompt_id\nc,1\n", "caption,prompt_id\na,1\n"):
        (tmp_path / "list.csv").write_text(text)
        pairs = memlib.load_pairs(tmp_path / "list.csv")
        lab = memlib.load("lab")
        memlib.cached(memlib.reverse_trace, lab, pairs, seeds=[0], steps=2, similarity="ncc")
    assert not sampled


def test_a_model_brings_its_list():
    names = {"sd14": "webster-sd14", "sd21-base": "webster-sd21", "realvis": "webster-realvis",
             "realvis20": "webster-realvis", "lab": "lab", "a/b": "lab"}  # fmt: skip
    assert {name: default_pairs(name) for name in names} == names


def test_a_table_without_a_place(tmp_path, capsys):
    arguments = ["trace", "--prompts", "1", "--out", str(tmp_path / "nowhere" / "out.csv")]
    assert cli.main(arguments) == 1
    assert "must name a file in a folder that is there" in capsys.readouterr().err


def test_a_table_goes_where_it_is_told(tmp_path):
    """Into a pipe it is written, a link is followed, and nothing else in the folder is touched."""
    table = pd.DataFrame({"prompt_id": ["a"], "D1": [0.5]})
    real, link = tmp_path / "real.csv", tmp_path / "out.csv"
    real.write_text("old")
    (tmp_path / "out.partial").write_text("mine")
    link.symlink_to(real)
    write_table(table, link.resolve())
    assert real.read_text() == "prompt_id,D1\na,0.5\n"
    assert link.is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_table(table, tmp_path / "pipe")
    assert reader.communicate()[0] == real.read_text()
    assert not (tmp_path / "pipe").is_file()
    names = {"real.csv", "out.csv", "out.partial", "pipe"}
    assert {f.name for f in tmp_path.iterdir()} == names
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_fetching_from_a_folder(webster, tmp_path, capsys):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "00000").mkdir()
    shutil.copy(LAB.image[0], source / "00000/40.png")
    assert cli.main(["fetch", "webster-sd14", "--images", str(source)]) == 0
    assert "webster-sd14: 5 prompts, 1 with an image" in capsys.readouterr().out
    pack = tmp_path / "pack.zip"
    with zipfile.ZipFile(pack, "w") as archive:
        archive.write(LAB.image[1], "x/41.png")
    assert cli.main(["fetch", "webster-sd14", "--images", str(pack)]) == 0
    assert "5 prompts, 2 with an image" in capsys.readouterr().out
    table = addresses(lists.list_file("webster-sd14"))
    assert list(table.url) == [["http://a/1", "http://b/1"], ["http://a/2"], ["http://a/3"],
                               ["http://a/1", "http://b/4"], []]  # fmt: skip


@pytest.mark.parametrize("gpu", [False, True])
def test_weights_are_fetched_in_the_precision_they_will_be_used_in(gpu, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        "memlib.hub.checkpoints.download", lambda *a: asked.append(a) or ["somewhere"]
    )
    for arguments in (["realvis"], ["sd14", "--dtype", "float32"], ["a/b", "--dtype", "float16"]):
        assert cli.main(["fetch", *arguments]) == 0
    assert asked == [("realvis", None, gpu), ("sd14", None, False), ("a/b", None, True)]
    assert capsys.readouterr().out == 3 * "somewhere\n"


def test_the_doctor(webster, official, monkeypatch, capsys):
    """Each model by its exact repository and commit, each score by its file and checksum."""
    monkeypatch.setenv("MEMLIB_SSCD_LARGE_SHA256", "")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("Python", "GPU", "5 prompts, 0 with an image", "T4",
                  "not here: memlib fetch webster-sd21"):  # fmt: skip
        assert words in out
    for name, checkpoint in CHECKPOINTS.items():
        assert f"  {name:<16} {checkpoint}: not here: memlib fetch {name}\n" in out
        assert checkpoint.note in out
    assert out.count("VAE stabilityai/sd-vae-ft-mse@31f26fde") == 3
    assert out.count("\n  realvis ") == 1
    assert "  realvis          an older name of realvis14\n" in out
    large, mixup = (sscd.OFFICIAL[name].file for name in ("sscd-large", "sscd"))
    assert out.count(f"{mixup} (sha256 {sha256_of(official)[:12]}): here\n") == 2
    assert f"{large} (no published sha256): refused, see MEMLIB_SSCD_LARGE_SHA256" in out
    official.unlink()
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert f"{large} (no published sha256): not here: memlib fetch sscd-large --sha256 ..." in out
    assert out.count("): not here: memlib fetch sscd\n") == 2


def test_the_doctor_says_which_commit_is_here(official, tmp_path, monkeypatch, capsys):
    """In a cache as the Hub's library lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(repository, commit, file, ref=""):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        place = folder / "snapshots" / commit / file
        place.parent.mkdir(parents=True)
        place.touch()
        if ref:
            (folder / "refs").mkdir()
            (folder / "refs" / ref).write_text(commit)

    sd, realvis = CHECKPOINTS["sd14"], CHECKPOINTS["realvis20"]
    put(sd.repository, sd.revision, "model_index.json")
    put(realvis.repository, "a1b2c3d4" * 5, realvis.half, "main")
    for state in (", but not its VAE: memlib fetch brings it", ""):
        assert cli.main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"{sd}: here\n" in out
        assert f"{realvis}: here, at a1b2c3d4{state}\n" in out
        if state:
            put(realvis.vae, VAE_REVISION, "diffusion_pytorch_model.safetensors")


def test_the_quick_doctor_says_what_the_doctor_says(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_DATA", str(tmp_path))
    assert cli.main(["doctor", "--quick"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert cli.main(["doctor"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert [line for line in quick if line not in whole] == ["Folders"]
    more = [line.split()[0] for line in whole if line not in quick]
    assert more == ["Device", "GPU", "CPU", "Time", "sd14", "sd21", "the", "batch", "lab"]
