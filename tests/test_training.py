"""The engine: batches, numbers of a step, learning rate, frozen weights, compilation, and what a
run does with videos that cannot be decoded."""

import argparse
import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import common as tb
import evaluate
import finetune
import pretrain_inv
from conftest import assert_same_step, earlier_checkpoints, first_step, folder_flags
from test_common import (
    EVALUATED, STAGES, assert_same_checkpoints, load, moving_frames, read_log, read_results,
    run_stage, same, write_video)


# ---- Batches -------------------------------------------------------------------------------------

def batches(toy, epoch=0, step=0, **changes):
    """The batch of each step of three epochs, or of those that are left.

    A batch is four of the videos 5 to 23, in a new order each epoch, and two of 0 to 4."""
    settings = {"seed": 0, "size": 16, "stride": 2, "workers": 0, "epochs": 3, **changes}
    pools = [tb.Pool(np.arange(5, 24), 4, False), tb.Pool(np.arange(5), 4, True)]
    source = tb.Batches(tb.read_videos("toy", toy, True), pools, 4, settings["seed"],
                        argparse.Namespace(**settings), torch.device("cpu"))
    return [SimpleNamespace(videos=batch.videos, ids=batch.ids, keys=batch.keys,
                            dropout_seed=torch.initial_seed())
            for batch in source.stream(epoch * source.steps + step, 3 * source.steps)]


@pytest.fixture(scope="module")
def three_epochs(toy):
    return batches(toy)


@pytest.mark.parametrize("first, changes", [
    (0, {"workers": 2}), (6, {"epoch": 1, "step": 2, "workers": 1})])
def test_batches_are_the_same_with_workers_and_from_any_step(first, changes, toy, three_epochs):
    assert len(three_epochs) == 12
    for a, b in zip(three_epochs[first:], batches(toy, **changes), strict=True):
        assert (a.ids, a.keys, a.dropout_seed) == (b.ids, b.keys, b.dropout_seed)
        assert all(torch.equal(x, y) for x, y in zip(a.videos, b.videos, strict=True))


def test_no_video_is_twice_in_an_epoch_and_labelled_ones_cycle(three_epochs):
    """Eq. 1 would take a second clip of a video for a negative."""
    for epoch in range(3):
        passed = [i for batch in three_epochs[4 * epoch:4 * epoch + 4] for i in batch.ids[:4]]
        assert len(set(passed)) == 16 and min(passed) >= 5
    cycled = [i for batch in three_epochs for i in batch.ids[4:]]
    assert all(sorted(cycled[i:i + 5]) == list(range(5)) for i in range(0, 20, 5))


def test_no_two_clips_share_their_draws(toy, three_epochs):
    keys = [key for batch in three_epochs for key in batch.keys]
    assert len(set(keys)) == len(keys)
    assert len({batch.dropout_seed for batch in three_epochs}) == len(three_epochs)
    assert batches(toy, seed=1)[0].ids != three_epochs[0].ids


def test_a_substitute_is_not_in_the_batch_already(toy, tmp_path):
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    Path(tb.read_videos("toy", tmp_path, True).path(7)).write_text("broken")
    for seed in range(6):
        whole = batches(toy, seed=seed)
        for batch, other in zip(batches(tmp_path, seed=seed), whole, strict=True):
            assert 7 not in batch.ids and len(set(batch.ids[:4])) == 4
            assert batch.keys == other.keys  # it takes the draws of the broken one
            assert sum(a != b for a, b in zip(batch.ids, other.ids)) == (7 in other.ids)


@pytest.mark.parametrize("stage", ["dist", "student"])
def test_checkpointing_changes_no_bit(stage, chain, toy, tmp_path):
    """Weights, moments of the optimiser and running statistics, which are not updated twice."""
    earlier_checkpoints(chain, tmp_path, stage)
    run_stage(stage, toy, tmp_path, "--checkpointing")
    assert_same_checkpoints(chain, tmp_path, [stage])


@pytest.mark.parametrize("stage, flags", [
    ("dist", ["--compile"]), ("student", ["--compile", "--checkpointing"])])
def test_compile_changes_no_step(stage, flags, chain, toy, tmp_path, monkeypatch, float64):
    """By a quick backend: a C++ compiler takes long."""
    compile = torch.compile
    compiled = []

    def quickly(function, **settings):
        compiled.append(function)
        return compile(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", quickly)
    torch.compiler.reset()
    earlier_checkpoints(chain, tmp_path, stage)
    plain = first_step(stage, toy, tmp_path)
    assert len(plain) > 60 and not compiled
    other = first_step(stage, toy, tmp_path, *flags)
    assert len(compiled) == 5
    assert_same_step(plain, other)


# ---- The run: numbers, learning rate, frozen weights ---------------------------------------------

@pytest.mark.parametrize("stage, videos", [("dist", 4), ("student", 8)])
def test_benchmark_prints_numbers_and_writes_nothing(stage, videos, chain, toy, tmp_path, capsys):
    earlier_checkpoints(chain, tmp_path, stage)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    run_stage(stage, toy, tmp_path, "--benchmark", 3, "--restart")
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == before
    numbers = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert numbers["videos_per_s"] == pytest.approx(1000 * videos / numbers["ms_per_step"], rel=.01)
    assert 0 <= numbers["waiting_share"] < 1 and 0.1 < numbers["memory_gib"] < 20


@pytest.mark.parametrize("name, levels", [
    ("inv", {"loss": 7}),  # the same clip of the 3 other videos, the other one of all 4
    ("dist", {"l_d1": 3, "l_d2": 2})])
def test_logs_tell_the_level_of_chance(name, levels, chain):
    for line in read_log(chain, name)[1:]:
        chance = {key: value for key, value in line.items() if key.endswith("_chance")}
        assert chance == {f"{key}_chance": pytest.approx(math.log(candidates), abs=1e-6)
                          for key, candidates in levels.items()}


def test_stages_2_and_3_log_accuracy_and_loss_terms(chain):
    terms = {"l_sup", "l_unsup", "l_unsup_labeled", "weight_inv", "clamped", "agreement"}
    assert terms <= read_log(chain, "student")[-1].keys()
    for name in ("inv_ft", "labeled_only", "student"):
        assert all(0 <= line["train_accuracy"] <= 1 for line in read_log(chain, name)[1:])


def test_learning_rate_warms_up_linearly_and_halves_on_a_plateau(toy, tmp_path):
    run_stage("inv", toy, tmp_path, "--epochs", 12, "--warmup", 4, "--patience", 0, "--lr", 0.02)
    log = read_log(tmp_path, "inv")[1:]
    assert [line["lr"] for line in log[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.02)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for before, line in zip(log[3:], log[4:]):
        if before["epoch"] > 4:
            scheduler.step(before["loss"])
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
    assert log[-1]["lr"] < 0.02  # the schedule did something


@pytest.mark.parametrize("temperature, warned", [(100, True), (0.5, False)])
def test_a_stage_1_that_has_learnt_nothing_says_so(temperature, warned, toy, tmp_path, capsys):
    """At so high a temperature the loss is at chance, whatever the clips are; it is said once, at
    the end, and logged."""
    run_stage("inv", toy, tmp_path, "--epochs", 6, "--lr", 0.01, "--temperature", temperature)
    assert capsys.readouterr().err.count("still at chance (1.946) after 36 steps") == warned
    assert ("warnings" in read_log(tmp_path, "inv")[-1]) == warned


def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch, complaint):
    calls = []

    def exploding(z, temperature):
        calls.append(1)
        return tb.invariant_loss(z, temperature) * (math.nan if len(calls) == 10 else 1)

    monkeypatch.setattr(pretrain_inv, "invariant_loss", exploding)
    error = complaint(lambda: run_stage("inv", toy, tmp_path, "--save-every", 2), status=1)
    assert "not finite" in error and "epoch 2" in error
    saved = load(tmp_path, "inv")
    assert (saved["epoch"], saved["step"]) == (1, 2)  # the tenth step is the fourth of epoch 2
    assert all(w.isfinite().all() for w in saved["model"].values())


@pytest.mark.parametrize("epochs, frozen", [(10, 1), (80, 7)])
def test_weights_are_frozen_in_the_last_steps(epochs, frozen, toy, tmp_path, monkeypatch):
    """In a tenth of them, at most in 30, of four an epoch; the running statistics go on."""
    save = torch.save
    states = []

    def noted(content, file):
        if not content["finished"]:
            states.append(copy.deepcopy(content["model"]))
        save(content, file)

    monkeypatch.setattr(torch, "save", noted)
    run_stage("labeled_only", toy, tmp_path, "--epochs", epochs, "--batch", 2, "--frames", 4)
    assert len(states) == epochs
    changed = {"weight": [], "running_mean": []}
    for before, after in zip(states, states[1:]):
        for key, each in changed.items():
            each.append(not torch.equal(before[f"stem.1.{key}"], after[f"stem.1.{key}"]))
    assert all(changed["running_mean"])
    still = epochs - 1 - frozen
    assert changed["weight"] == [True] * still + [False] * frozen
    names = [k for k in states[-1] if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(states[still][name], states[-1][name]) for name in names)


def test_statistics_of_dark_videos_do_not_lag(tmp_path):
    """The mean that eval mode subtracts in the stem, against that of the videos, in standard
    deviations: without frozen weights it is off by more than a tenth."""
    for k in range(8):
        frames = np.zeros((8, 20, 20, 3), np.uint8)
        frames[:, 4 + k:6 + k, 8:12] = 255
        folder = tmp_path / "train" / f"{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{k}.avi", frames)
    finetune.main([*folder_flags(tmp_path), "--init", "none", "--percent", "100", "--epochs", "75",
                   "--lr", "3e-3", "--patience", "75"])
    model = tb.build_model("r3d_tiny", 2).eval()
    model.load_state_dict(load(tmp_path / "out", "labeled_only")["model"])
    videos = tb.read_videos("folder", tmp_path, True)
    clips = [tb.decode_frames(videos.path(i), range(8)) for i in range(8)]
    rngs = [tb.draw(0, i) for i in range(8)]
    x = tb.to_input(tb.augment_clips(clips, 16, rngs, **tb.WEAK), model)
    norm = model.stem[1]
    with torch.no_grad():
        shift = norm.running_mean - model.stem[0](x).mean((0, 2, 3, 4))
    assert (shift.abs() / norm.running_var.sqrt()).mean() < 0.06


def test_teachers_stay_as_they_are_in_stage_3(chain, toy, tmp_path):
    """Of the networks that stage 3 runs, those in eval mode are the teachers."""
    earlier_checkpoints(chain, tmp_path, "student")
    networks = {}

    def note(module, _):
        networks[id(module)] = module

    hook = register_module_forward_pre_hook(note)
    try:
        run_stage("student", toy, tmp_path)
    finally:
        hook.remove()
    networks = [net for net in networks.values() if isinstance(net, tb.R3D)]
    teachers = [net for net in networks if not net.training]
    assert len(teachers) == 2 and len(networks) == 3
    for teacher, name in zip(teachers, ("inv_ft", "dist_ft")):
        assert same(dict(teacher.state_dict()), load(chain, name)["model"])
        assert all(p.grad is None for p in teacher.parameters())
    start = load(chain, "dist")["model"]["stem.0.weight"]
    assert not torch.equal(start, load(tmp_path, "student")["model"]["stem.0.weight"])


# ---- Videos that cannot be decoded, and real ones ------------------------------------------------

@pytest.fixture
def break_files(toy, tmp_path):
    """A function that breaks some of 100 training videos, in five ways, and returns their paths."""
    source = tb.read_videos("toy", toy, True)
    paths = []
    for i in range(100):
        paths.append(tmp_path / "train" / source.name(i % 24).split("/")[0] / f"{i:03}.avi")
        paths[i].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.path(i % 24), paths[i])

    def break_files(numbers):
        for i in numbers:
            if i % 5 == 4:  # sound and its cover
                path = write_video(paths[i].with_suffix(".mp4"), moving_frames(1, 32, 32), "mjpeg",
                                   "yuvj420p", cover=True, extra=[("aac", None)])
                path.rename(paths[i])
            else:
                start = paths[i].read_bytes()[:300]
                paths[i].write_bytes([b"", start, b"not a video", bytes(5000)][i % 5])
        return [str(paths[i]) for i in numbers]

    return break_files


def test_unreadable_videos_are_named_replaced_and_counted(break_files, tmp_path, capsys):
    bad = break_files(range(10, 60, 11))  # five of them, one of each kind
    pretrain_inv.main([*folder_flags(tmp_path), "--batch", "10", "--clips", "2"])
    captured = capsys.readouterr()
    assert len(bad) == 5 and all(path in captured.err for path in bad)
    assert read_log(tmp_path / "out", "inv")[-1]["unreadable"] == 5
    listed = captured.out.split("cannot be decoded:")[-1]
    assert all(path.split("/train/")[1] in listed for path in bad)
    assert len(load(tmp_path / "out", "inv")["similarity"]) == 95


def test_more_than_a_tenth_of_them_stop_the_run(break_files, tmp_path, capsys):
    break_files(range(5, 100, 5))
    with pytest.raises(SystemExit) as end:
        pretrain_inv.main([*folder_flags(tmp_path), "--batch", "10", "--clips", "2"])
    assert end.value.code == 2 and "more than 10 %" in capsys.readouterr().err


def test_all_stages_on_real_clips(real_clips, tmp_path):
    """HMDB51's and UCF101's AVI files, Kinetics' MP4 files, in folders of one's own."""
    root = tmp_path / "my"
    folders = ["unlabeled/deep/er"]
    for c in ("baking cookies", "it's (2)", "c"):
        folders += [f"train/{c}"] * 3 + [f"test/{c}"]
    for i, folder in enumerate(folders):
        clip = real_clips[i % len(real_clips)]
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, root / folder / f"-x{i}{clip.suffix}")
    out = tmp_path / "out"
    for stage in STAGES:
        run_stage(stage, root, out, "--data", "folder", "--arch", "r3d_tiny", "--epochs", 1)
    evaluate.main([str(out), "--clips", "2", "--workers", "0"])
    results = read_results(out)
    assert [r["checkpoint"] for r in results] == EVALUATED
    for r in results:
        assert (r["videos"], r["unreadable"], r["labeled_count"]) == (3, 0, 3)
    assert len(load(out, "inv")["similarity"]) == 10
