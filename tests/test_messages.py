"""What the stages say of a run that will not go as its user hopes."""

import re
import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F

import common as tb
import pretrain_inv
from conftest import folder_flags
from test_common import full_decode, load, moving_frames, read_log, run_stage, write_video


def test_nearest_neighbours_stand_beside_an_untrained_network_and_chance(chain, toy, tmp_path,
                                                                         capsys):
    """What finetune.py prints of them, against a loop over the features of stage 1."""
    run_stage("ft", toy, tmp_path, "--init", chain / "inv.pt", "--percent", 100, "--epochs", 1)
    line, = [line for line in capsys.readouterr().out.splitlines() if "nearest other" in line]
    trained, count, untrained, chance = map(float, re.findall(r" (\d[\d.]*)\b", line))
    names = [line.split()[0] for line in (tmp_path / "labeled.txt").read_text().splitlines()]
    backbone = tb.build_model("r3d_tiny", 8).eval()
    backbone.load_state_dict(load(chain, "inv")["model"])
    features = []
    for name in names:
        path = toy / "UCF-101" / name
        first = (len(full_decode(path)) - 7) // 2
        clip = tb.decode_frames(path, range(first, first + 8), 20)
        with torch.no_grad():
            x = tb.to_input([tb.centre_crop(clip, 16)], backbone)
            features.append(backbone.features(x)[0].mean(1))
    right = 0
    for i, name in enumerate(names):
        others = [j for j in range(len(names)) if j != i]
        nearest = max(others, key=lambda j: F.cosine_similarity(features[i], features[j], 0))
        right += names[nearest].split("/")[0] == name.split("/")[0]
    assert count == len(names) == 24 and 0 < right < 24 and 0 <= untrained <= 100
    assert trained == pytest.approx(100 * right / 24, abs=0.06)
    assert chance == round(100 * 2 / 23, 1)  # three videos a class


def test_videos_without_a_similarity_are_counted(chain, toy, tmp_path, capsys):
    """As if one had been added after stage 1."""
    for name in ("inv_ft", "dist_ft"):
        saved = load(chain, name)
        saved["similarity_names"] = saved["similarity_names"][1:]
        saved["similarity"] = saved["similarity"][1:]
        torch.save(saved, tmp_path / f"{name}.pt")
    shutil.copy(chain / "dist.pt", tmp_path)
    run_stage("student", toy, tmp_path)
    assert "1 of 24 videos have no similarity from stage 1 (added since" in capsys.readouterr().out


def test_short_videos_are_counted_and_told_if_they_are_many(tmp_path, capsys):
    for i in range(8):
        folder = tmp_path / f"train/c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{i}.avi", moving_frames(20 if i < 5 else 70, seed=i))
    pretrain_inv.main([*folder_flags(tmp_path), "--clips", "4"])
    assert "5 of 8 videos have fewer frames than the 32" in capsys.readouterr().err
    first, second = read_log(tmp_path / "out", "inv")[1:]
    assert first["short"] == second["short"] == 5
    pretrain_inv.main([*folder_flags(tmp_path), "--clips", "2", "--restart"])
    assert "fewer frames" not in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["inv", "dist"])
def test_stage_1_starts_from_given_weights(stage, toy, tmp_path, capsys, complaint):
    torch.manual_seed(1)
    model = tb.build_model("r3d_tiny", 400)  # as public weights: other classes
    torch.save({"state_dict": {f"module.{k}": w for k, w in model.state_dict().items()}},
               tmp_path / "public.pth")
    public = str(tmp_path / "public.pth")
    run_stage(stage, toy, tmp_path, "--init", public, "--lr", 0)
    assert f"from {public}" in capsys.readouterr().out
    saved = load(tmp_path, stage)["model"]
    for name, weight in model.named_parameters():
        assert name.startswith("fc.") or torch.equal(saved[name], weight), name
    # without them it is another run
    assert "init" in complaint(run_stage, stage, toy, tmp_path, "--lr", 0)


def test_settings_can_be_pasted_back(toy, tmp_path, capsys):
    """The printed flags, with another folder, make the same run."""
    run_stage("inv", toy, tmp_path / "a b", "--lr", 0.002)
    settings = capsys.readouterr().out.split("settings: ")[1].splitlines()[0]
    flags = shlex.split(settings)
    flags[flags.index("--out") + 1] = str(tmp_path / "again")
    pretrain_inv.main(flags)
    a = load(tmp_path / "a b", "inv")
    b = load(tmp_path / "again", "inv")
    assert {**a["args"], "out": None} == {**b["args"], "out": None}
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())


def test_a_warm_up_as_long_as_the_run_is_told_and_logged(toy, tmp_path, capsys):
    run_stage("inv", toy, tmp_path, "--warmup", 2)
    assert "--warmup 2 is not shorter than --epochs 2" in capsys.readouterr().err
    first_epoch = read_log(tmp_path, "inv")[1]
    assert any("--warmup 2" in line for line in first_epoch["warnings"])


def test_one_label_a_class_has_no_neighbours(chain, toy, tmp_path, capsys):
    run_stage("ft", toy, tmp_path, "--init", chain / "inv.pt", "--percent", 1)
    assert "nearest other" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [["RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"]])
def test_torchrun_s_variables_left_alone_are_told(names, toy, tmp_path, monkeypatch, complaint):
    for name in names:
        monkeypatch.setenv(name, "1")
    error = complaint(run_stage, "inv", toy, tmp_path)
    assert all(name in error for name in names) and "torchrun" in error


@pytest.mark.parametrize("flags, words", [
    ("--frames 8", "--frames 8 2 time steps"),
    ("--frames 4 --arch r3d_18", "--frames 4 1 time steps")])  # of one pixel each
def test_frames_that_l_d2_cannot_cut_name_the_ways_out(flags, words, toy, tmp_path, complaint):
    error = complaint(run_stage, "dist", toy, tmp_path, "--clips", 4, *flags.split())
    assert all(word in error for word in (*words.split(), "--clips", "slow_r50")), error
