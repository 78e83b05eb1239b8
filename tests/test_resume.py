"""A stage that was killed goes on to the same weights; checkpoints that it cannot go on from."""

import os
import resource
import shutil
import signal

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import common as tb
from conftest import assert_same_run, contents, earlier_checkpoints, run_and_kill
from test_common import load, run_stage


@pytest.mark.parametrize("stage, name, steps, flags, stands", [
    # the flags of the killed run, and the (epoch, step) of the checkpoint that it leaves
    ("dist", "dist", 9, "--save-every 3", (0, 6)),  # an epoch's last step
    ("ft", "dist_ft", 8, "--save-every 1", (1, 1)),
    ("labeled_only", "labeled_only", 3, "--save-every 2", (0, 2)),
    ("inv", "inv", 11, "--save-every 5 --workers 2", (1, 4)),
    ("student", "student", 4, "--save-every 3", (0, 3))])
def test_a_kill_between_steps(stage, name, steps, flags, stands, chain, toy, tmp_path):
    earlier_checkpoints(chain, tmp_path, stage)
    assert run_and_kill("step", steps, stage, toy, tmp_path, *flags.split()) == -signal.SIGKILL
    left = load(tmp_path, name)
    assert (left["epoch"], left["step"], left["finished"]) == (*stands, False)
    run_stage(stage, toy, tmp_path, "--workers", 1)
    assert_same_run(chain, tmp_path, name)


@pytest.mark.parametrize("stage, moment, count", [
    ("inv", "step", 3), ("student", "step", 3), ("inv", "write", None)])
def test_kills_again_and_again(stage, moment, count, chain, toy, tmp_path):
    """Each life has three steps, of which the last is lost. Or the first life ends in the first
    write of a file, the second one in the second write, and so on, also after the last epoch, when
    stage 1 has yet to measure similarities. At last there is none left to die in."""
    earlier_checkpoints(chain, tmp_path, stage)
    lives = 1
    while run_and_kill(moment, count or lives, stage, toy, tmp_path,
                       "--save-every", 2) == -signal.SIGKILL:
        lives += 1
        assert lives < 10
    assert lives > 3
    assert_same_run(chain, tmp_path, stage)


def test_a_finished_stage_takes_more_epochs(toy, tmp_path):
    for epochs in (2, 3):  # of two steps each: of so few none has frozen weights
        run_stage("labeled_only", toy, tmp_path, "--epochs", epochs)
    run_stage("labeled_only", toy, tmp_path / "new", "--epochs", 3)
    assert_same_run(tmp_path, tmp_path / "new", "labeled_only")


@pytest.mark.parametrize("stage, flags, words", [
    ("inv", "--size 32", "size 16 32"), ("inv", "--epochs 1", "epochs 2 1"),
    ("ft", "--percent 40", "percent 6 40"), ("student", "--omega 3", "omega 1.0 3.0")])
def test_other_arguments_are_refused_with_both_values(stage, flags, words, chain, toy, tmp_path,
                                                      complaint):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    error = complaint(run_stage, stage, toy, tmp_path, *flags.split())
    assert all(word in error.replace(str(tmp_path), "") for word in words.split()), error


@pytest.mark.parametrize("stage, name, begun", [
    ("ft", "inv", "inv_ft"), ("student", "inv_ft", "student"), ("student", "dist", "student")])
def test_what_a_run_was_made_from_has_changed(stage, name, begun, chain, toy, tmp_path, complaint):
    """As after more --epochs of an earlier stage; or what was finished would stay as it is."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    saved = load(chain, name)
    saved["model"]["layer4.0.conv2.0.weight"] += 1
    torch.save(saved, tmp_path / f"{name}.pt")
    before = contents(tmp_path)
    line = f"{name}.pt has changed since {tmp_path}/{begun}.pt was begun: --restart"
    assert line in complaint(run_stage, stage, toy, tmp_path)
    assert contents(tmp_path) == before


def test_a_refused_command_changes_no_file(chain, toy, tmp_path, complaint):
    """Also where the second of two fine-tunings is refused, for other labelled videos."""
    for name in ("inv.pt", "dist.pt", "dist_ft.pt", "labeled.txt"):
        shutil.copy(chain / name, tmp_path)
    before = contents(tmp_path)
    assert "dist_ft.pt was made with percent" in complaint(
        run_stage, "ft", toy, tmp_path, "--percent", 40)
    assert contents(tmp_path) == before
    saved = load(chain, "dist")
    saved["model"]["stem.0.weight"] = torch.zeros(1)
    torch.save(saved, tmp_path / "dist.pt")
    before = contents(tmp_path)
    assert "dist.pt: 1 of" in complaint(run_stage, "ft", toy, tmp_path, "--restart")
    two = ["--init", f"{tmp_path}/inv.pt", f"{chain}/inv.pt"]
    assert "two of these would write" in complaint(run_stage, "ft", toy, tmp_path, *two)
    assert contents(tmp_path) == before


def test_other_videos_under_the_same_names_are_noticed_and_a_moved_set_is_not(
        chain, toy, tmp_path, complaint, capsys):
    """A finished stage changes nothing then."""
    shutil.copy(chain / "inv.pt", tmp_path)
    shutil.copytree(toy, tmp_path / "toy")
    run_stage("inv", tmp_path / "toy", tmp_path)
    assert "finished at epoch 2" in capsys.readouterr().out
    assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()
    saved = load(chain, "inv_ft")
    torch.save({**saved, "made_from": {**saved["made_from"], "the set of labelled videos": "0"}},
               tmp_path / "inv_ft.pt")
    assert "the set of labelled videos has changed since" in complaint(
        run_stage, "ft", toy, tmp_path, "--init", "inv.pt")
    with open(tb.read_videos("toy", tmp_path / "toy", True).path(7), "ab") as file:
        file.write(b"0")
    assert "the set of training videos has changed since" in complaint(
        run_stage, "inv", tmp_path / "toy", tmp_path)


def test_fewer_epochs_leave_room_for_the_steps_in_which_batch_norm_settles(
        chain, toy, tmp_path, complaint):
    saved = load(chain, "inv")  # two epochs of six steps, as if they were the first of 100
    torch.save({**saved, "finished": False, "args": {**saved["args"], "epochs": 100}},
               tmp_path / "inv.pt")
    error = complaint(run_stage, "inv", toy, tmp_path, "--epochs", 2)  # 12 steps, one is frozen
    assert f"--epochs 2: {tmp_path}/inv.pt has 2 epochs" in error and "give 7 or more" in error
    run_stage("inv", toy, tmp_path, "--epochs", 3)
    assert load(tmp_path, "inv")["finished"]


def test_two_runs_do_not_overwrite_each_other(chain, toy, tmp_path, complaint, request):
    def meanwhile(*_):
        shutil.copy(chain / "labeled_only.pt", tmp_path)

    request.addfinalizer(register_optimizer_step_post_hook(meanwhile).remove)
    error = complaint(run_stage, "labeled_only", toy, tmp_path)
    assert f"another run writes {tmp_path}/labeled_only.pt" in error
    kept = (tmp_path / "labeled_only.pt").read_bytes()
    assert kept == (chain / "labeled_only.pt").read_bytes()
    assert torch.load(tmp_path / "labeled_only.pt.other")["finished"]


def test_a_restarted_run_is_the_one_that_goes_on(chain, toy, tmp_path, complaint, request,
                                                 monkeypatch):
    """After Ctrl-C in its first step; torchrun's own restart repeats the flag."""
    def interrupt(*_):
        raise KeyboardInterrupt

    shutil.copy(chain / "inv.pt", tmp_path)
    hook = register_optimizer_step_post_hook(interrupt)
    request.addfinalizer(hook.remove)
    error = complaint(run_stage, "inv", toy, tmp_path, "--restart", "--lr", 0.01, status=1)
    assert "the same command, without --restart, goes on" in error
    assert load(tmp_path, "inv")["args"]["lr"] == 0.01 and not load(tmp_path, "inv")["finished"]
    hook.remove()
    run_stage("inv", toy, tmp_path, "--lr", 0.01)
    before = (tmp_path / "inv.pt").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_stage("inv", toy, tmp_path, "--restart", "--lr", 0.01)
    assert (tmp_path / "inv.pt").read_bytes() == before


class Malicious:
    """Makes a folder as soon as a checkpoint that holds it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("touched",)


@pytest.mark.parametrize("what, reason", [
    ("another stage's", "was made with stage student"), ("truncated", "damaged"),
    ("malicious", "damaged"), ("older code's", "made by another version of this code")])
def test_a_checkpoint_to_which_the_command_does_not_fit_is_refused(what, reason, chain, toy,
                                                                  tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inv.pt"
    saved = load(chain, "student" if what == "another stage's" else "inv")
    if what == "malicious":
        saved["extra"] = Malicious()
    elif what == "older code's":
        del saved["made_from"]
    torch.save(saved, path)
    if what == "truncated":
        os.truncate(path, 5000)
    before = path.read_bytes()
    error = complaint(run_stage, "inv", toy, tmp_path)
    assert error.startswith(f"pretrain_inv.py: {path}") and reason in error
    assert path.read_bytes() == before and not (tmp_path / "touched").exists()


def test_a_full_disk_leaves_the_last_checkpoint(chain, toy, tmp_path, complaint, request):
    shutil.copy(chain / "inv.pt", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    error = complaint(run_stage, "inv", toy, tmp_path, "--epochs", 3)
    assert "inv.pt cannot be written, the old file is unchanged" in error
    assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()
    assert not list(tmp_path.glob(".inv.pt*"))
