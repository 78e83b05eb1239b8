"""What the stages say of a run that will not go as its user hopes."""

import shlex
import shutil


import pytest
import torch

import common as tb
import pretrain_dist
import pretrain_inv
from test_common import TINY, load, moving_frames, read_log, run_stage, write_video


def test_a_warm_up_as_long_as_the_run_is_told_and_logged(toy, tmp_path, capsys):
    run_stage("inv", toy, tmp_path, "--warmup", 2)
    assert "--warmup 2 is not shorter than --epochs 2" in capsys.readouterr().err
    first_epoch = read_log(tmp_path, "inv")[1]
    assert any("--warmup 2" in line for line in first_epoch["warnings"])


def neighbours(capsys):
    """Per cent and number of videos, of the untrained network and at chance, by a teacher."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "nearest other" in line]
    return [[float(word) for word in line.split() if word[0].isdigit()] for line in lines]


def test_nearest_neighbours_stand_beside_an_untrained_network_and_chance(chain, toy, tmp_path,
                                                                         capsys):
    for name in ("inv", "dist"):
        shutil.copy(chain / f"{name}.pt", tmp_path)
    run_stage("ft", toy, tmp_path, "--percent", 100)
    found = neighbours(capsys)
    assert len(found) == 2
    for trained, videos, untrained, chance in found:
        assert videos == 24 and chance == round(100 * 2 / 23, 1)  # three videos a class
        assert 0 <= trained <= 100 and 0 <= untrained <= 100
        assert min(trained * 24 / 100 % 1, -(trained * 24 / 100) % 1) < 0.02  # of 24 videos
    run_stage("ft", toy, tmp_path, "--percent", 1, "--restart")  # one label a class
    assert neighbours(capsys) == []


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


def test_mostly_short_videos_are_told(tmp_path, capsys):
    for i in range(8):
        folder = tmp_path / f"train/c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{i}.avi", moving_frames(20 if i < 5 else 70, seed=i))
    argv = [*TINY, "--data", "folder", "--root", str(tmp_path), "--arch", "r3d_tiny", "--out",
            str(tmp_path / "out")]
    pretrain_inv.main([*argv, "--clips", "4"])
    assert "5 of 8 videos have fewer frames than the 32" in capsys.readouterr().err
    first, second = read_log(tmp_path / "out", "inv")[1:]
    assert first["short"] == second["short"] == 5
    pretrain_inv.main([*argv, "--clips", "2", "--restart"])
    assert "fewer frames" not in capsys.readouterr().err


def test_frames_that_l_d2_cannot_cut_name_the_ways_out(toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_stage("dist", toy, tmp_path, "--clips", 4)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert all(word in error for word in ("--frames 8", "2 time steps", "--clips", "slow_r50"))


@pytest.mark.parametrize("stage, program", [("inv", pretrain_inv), ("dist", pretrain_dist)])
def test_stage_1_starts_from_given_weights(stage, program, toy, tmp_path, capsys):
    torch.manual_seed(1)
    model = tb.build_model("r3d_tiny", 400)  # as public weights: other classes
    torch.save({"state_dict": {f"module.{k}": w for k, w in model.state_dict().items()}},
               tmp_path / "public.pth")
    public = str(tmp_path / "public.pth")
    run_stage(stage, toy, tmp_path, "--init", public, "--lr", 0)
    assert f"of {public}" in capsys.readouterr().out
    saved = load(tmp_path, stage)
    assert saved["args"]["init"] == public
    for name, weight in model.named_parameters():
        if not name.startswith("fc."):
            assert torch.equal(saved["model"][name], weight), name
    with pytest.raises(SystemExit):  # without them it is another run
        run_stage(stage, toy, tmp_path, "--lr", 0)
    assert "init" in capsys.readouterr().err
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(SystemExit) as end:
        run_stage(stage, toy, tmp_path, "--init", str(tmp_path / "empty.pth"), "--restart")
    assert end.value.code == 2 and "no weights" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"]])
def test_torchrun_s_variables_left_alone_are_told(names, toy, tmp_path, monkeypatch, capsys):
    for name in names:
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as end:
        run_stage("inv", toy, tmp_path)
    error = capsys.readouterr().err
    assert end.value.code == 2 and all(name in error for name in names) and "torchrun" in error


def test_max_restarts_over_several_nodes_are_refused(toy, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1,
                        "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        run_stage("inv", toy, tmp_path)
    assert end.value.code == 2 and "--max-restarts" in capsys.readouterr().err


def test_stages_2_and_3_log_the_accuracy_on_labelled_clips(chain):
    for name in ("inv_ft", "labeled_only", "student"):
        assert all(0 <= line["train_accuracy"] <= 1 for line in read_log(chain, name)[1:])


def test_settings_can_be_pasted_back(chain, toy, tmp_path, capsys):
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
