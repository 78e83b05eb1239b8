"""A stage that was killed goes on to the same weights; checkpoints that it cannot go on from."""

import os
import resource
import shutil
import signal

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import earlier_checkpoints
from test_common import assert_same_checkpoints, load, read_log, run_and_kill, run_stage


def assert_same_run(chain, out, name):
    """The same checkpoint, and the same numbers of each epoch in the log, none of them twice."""
    assert_same_checkpoints(chain, out, [name])
    timed = {"seconds", "clips_per_s", "waiting_share", "memory_gib"}
    logs = [[{k: v for k, v in line.items() if k not in timed} for line in read_log(folder, name)]
            for folder in (chain, out)]
    assert logs[0][1:] == logs[1][1:]  # the first line is the command


@pytest.mark.parametrize("stage, name, steps, flags, stands", [
    # the flags of the killed run, and the (epoch, step) of the checkpoint that it leaves
    ("dist", "dist", 9, "", (1, 0)),
    ("ft", "dist_ft", 7, "", (1, 0)),
    ("labeled_only", "labeled_only", 3, "", (1, 0)),
    ("inv", "inv", 11, "--save-every 3 --workers 2", (1, 3)),
    ("student", "student", 7, "--save-every 2", (1, 2))])
def test_a_kill_between_steps(stage, name, steps, flags, stands, chain, toy, tmp_path):
    earlier_checkpoints(chain, tmp_path, stage)
    assert run_and_kill("step", steps, stage, toy, tmp_path, *flags.split()) == -signal.SIGKILL
    left = load(tmp_path, name)
    assert (left["epoch"], left["step"], left["finished"]) == (*stands, False)
    run_stage(stage, toy, tmp_path, "--workers", 1)
    assert_same_run(chain, tmp_path, name)


@pytest.mark.parametrize("stage", ["inv", "student"])
def test_kills_again_and_again(stage, chain, toy, tmp_path):
    """Each life has three steps, of which the last is lost; at last none is left to die in."""
    earlier_checkpoints(chain, tmp_path, stage)
    flags = ["--save-every", 2]
    lives = 1
    while run_and_kill("step", 3, stage, toy, tmp_path, *flags) == -signal.SIGKILL:
        lives += 1
        assert lives < 10
    assert lives > 3
    assert_same_run(chain, tmp_path, stage)


@pytest.mark.parametrize("stage", ["inv", "labeled_only"])
def test_a_kill_during_each_write_of_a_file(stage, chain, toy, tmp_path):
    """Also after the last epoch, when stage 1 has yet to measure similarities."""
    lives = 1
    while run_and_kill("write", lives, stage, toy, tmp_path) == -signal.SIGKILL:
        lives += 1
        assert lives < 10
    assert lives > 2
    assert_same_run(chain, tmp_path, stage)


def test_ctrl_c_costs_one_line(chain, toy, tmp_path, complaint):
    def interrupt(*_):
        raise KeyboardInterrupt

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        error = complaint(run_stage, "labeled_only", toy, tmp_path, status=1)
    finally:
        hook.remove()
    assert "same command starts" in error
    run_stage("labeled_only", toy, tmp_path)
    assert_same_run(chain, tmp_path, "labeled_only")


def test_a_finished_stage_changes_nothing(chain, toy, tmp_path, capsys):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    run_stage("inv", toy, tmp_path)
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()


def test_a_finished_stage_takes_more_epochs(toy, tmp_path):
    for epochs in (2, 3):  # of two steps each: of so few none has frozen weights
        run_stage("inv", toy, tmp_path, "--batch", 12, "--epochs", epochs)
    run_stage("inv", toy, tmp_path / "new", "--batch", 12, "--epochs", 3)
    assert_same_checkpoints(tmp_path, tmp_path / "new", ["inv"])


@pytest.mark.parametrize("stage, flags, words", [
    ("inv", "--size 32", ("size", "16", "32")), ("inv", "--epochs 1", ("2 epochs", "1")),
    ("ft", "--percent 40", ("percent", "6", "40")),
    ("student", "--omega 3", ("omega", "1.0", "3.0"))])
def test_other_arguments_are_refused_with_both_values(stage, flags, words, chain, toy, tmp_path,
                                                      complaint):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    error = complaint(run_stage, stage, toy, tmp_path, *flags.split())
    assert all(word in error for word in words), error


class Malicious:
    """Makes a folder as soon as a checkpoint that holds it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", ["another stage's", "truncated", "malicious", "other videos'"])
def test_a_checkpoint_to_which_the_command_does_not_fit_is_refused(what, chain, toy, tmp_path,
                                                                  complaint):
    shutil.copytree(toy, tmp_path / "toy")
    path = tmp_path / "inv.pt"
    content = (chain / ("student.pt" if what == "another stage's" else "inv.pt")).read_bytes()
    path.write_bytes(content[:5000] if what == "truncated" else content)
    if what == "malicious":
        torch.save({**load(chain, "inv"), "extra": Malicious(tmp_path / "touched")}, path)
    if what == "other videos'":
        listed = tmp_path / "toy/ucfTrainTestlist/trainlist01.txt"
        listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:-1]))
    before = path.read_bytes()
    assert "inv.pt" in complaint(run_stage, "inv", tmp_path / "toy", tmp_path)
    assert path.read_bytes() == before and not (tmp_path / "touched").exists()


def test_a_full_disk_leaves_the_last_checkpoint(chain, toy, tmp_path, capsys):
    shutil.copy(chain / "inv.pt", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            run_stage("inv", toy, tmp_path, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "inv.pt cannot be written, the old file is unchanged" in error
    assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()
    assert not list(tmp_path.glob(".inv.pt*"))
