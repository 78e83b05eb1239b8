"""The engine: batches, learning rate, frozen weights, compilation, and what a run does with videos
that cannot be decoded."""

import argparse
import math
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import common as tb
import evaluate
import pretrain_inv
from conftest import assert_same_run, earlier_checkpoints, first_step
from test_common import EVALUATED, STAGES, load, read_log, read_results, run_stage, same


# ---- Batches -------------------------------------------------------------------------------------

def batches(toy, first=0, seed=0, workers=0):
    """The batch of each of the twelve steps of three epochs, or of those that are left, and the
    seed of its dropout: four of the videos 5 to 23, in a new order each epoch, and four of 0 to
    4."""
    pools = [tb.Pool(np.arange(5, 24), 4, False), tb.Pool(np.arange(5), 4, True)]
    source = tb.Batches(tb.read_videos("toy", toy, True), pools, 4, 4, seed,
                        argparse.Namespace(size=16, stride=2, workers=workers), torch.device("cpu"))
    return [(batch, torch.initial_seed()) for batch in source.stream(first, 12)]


@pytest.fixture(scope="module")
def three_epochs(toy):
    return batches(toy)


@pytest.mark.parametrize("first, workers", [(0, 2), (6, 1)])
def test_batches_are_the_same_with_workers_and_from_any_step(first, workers, toy, three_epochs):
    others = batches(toy, first, workers=workers)
    for (a, seed), (b, other_seed) in zip(three_epochs[first:], others, strict=True):
        assert (a.ids, a.keys, seed) == (b.ids, b.keys, other_seed)
        assert all(torch.equal(x, y) for x, y in zip(a.videos, b.videos, strict=True))


def test_a_clip_lies_anywhere_in_its_video(toy, three_epochs):
    """Four frames, two apart, scaled to 1.25 times the network's 16 pixels."""
    videos = tb.read_videos("toy", toy, True)
    positions = []
    for batch, _ in three_epochs[:4]:
        for i, clip in zip(batch.ids, batch.videos):
            frames = tb.decode_frames(videos.path(i), range, short_side=20)
            starts = range(len(frames) - 6)
            found = [start for start in starts if torch.equal(frames[start:start + 7:2], clip)]
            positions.append(found[0] / len(starts))
    assert min(positions) < 0.2 and max(positions) > 0.8


def test_to_choose_a_video_is_no_look_at_all_of_them():
    """Of 240,000 that took longer than the rest of a step."""
    class Ids:
        looks = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.looks += 1
            return range(1000)[i]

    ids = Ids()
    args = argparse.Namespace(size=16, stride=2, workers=0, batch=4)
    source = tb.Batches([], [tb.Pool(ids, 4, False)], 250, 4, 0, args, torch.device("cpu"))
    assert len(list(source.items(0, 3))) == 12 and ids.looks == 12 * 10


def test_no_video_is_twice_in_an_epoch_and_labelled_ones_cycle(three_epochs):
    """Eq. 1 would take a second clip of a video for a negative."""
    for epoch in range(3):
        steps = three_epochs[4 * epoch:4 * epoch + 4]
        passed = [i for batch, _ in steps for i in batch.ids[:4]]
        assert len(set(passed)) == 16 and min(passed) >= 5
    cycled = [i for batch, _ in three_epochs for i in batch.ids[4:]]
    assert all(sorted(cycled[i:i + 5]) == list(range(5)) for i in range(0, 45, 5))


def test_no_two_clips_share_their_draws(toy, three_epochs):
    keys = [key for batch, _ in three_epochs for key in batch.keys]
    assert len(set(keys)) == len(keys) == 96
    assert len({seed for _, seed in three_epochs}) == 12
    assert batches(toy, 11, seed=1)[0][0].ids != three_epochs[11][0].ids
    stages = ("pretrain_inv", "pretrain_dist", "finetune", "student")
    assert len({tb.seed_of(stage, seed) for stage in stages for seed in (0, 1)}) == 8


def test_each_process_has_its_part_of_a_batch(toy, three_epochs, monkeypatch):
    monkeypatch.setattr(tb, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(tb, "rank", lambda: rank)
        parts.append(batches(toy))
    for (whole, _), (first, seed), (second, other_seed) in zip(three_epochs, *parts, strict=True):
        a, b = first.ids, second.ids
        assert whole.ids == a[:2] + b[:2] + a[2:] + b[2:] and seed != other_seed


@pytest.mark.parametrize("stage", ["inv", "dist", "labeled_only", "student"])
def test_each_clip_has_its_own_augmentation(stage, chain, toy, tmp_path, monkeypatch):
    """In all steps and epochs, weak behind stage 1, mirrored unless --no-flip says otherwise; in
    stage 1b the same clips have two, and so have the long ones."""
    earlier_checkpoints(chain, tmp_path, stage)
    draws = []

    def noted(clips, size, rngs, flip, **strength):
        assert (size, flip, strength) == (16, False, {} if stage in ("inv", "dist") else tb.WEAK)
        draws.extend(rng.bit_generator.state["state"]["state"] for rng in rngs)
        if stage == "dist":
            short, short_aug, long, long_aug = (torch.stack(part) for part in (
                clips[:8], clips[8:16], clips[16:20], clips[20:]))
            assert torch.equal(short, short_aug) and torch.equal(long, long_aug)
            assert torch.equal(long, short.unflatten(0, (4, 2)).flatten(1, 2)[:, ::2])
        return tb.augment_clips(clips, size, rngs, flip, **strength)

    monkeypatch.setattr(STAGES[stage][0], "augment_clips", noted)
    run_stage(stage, toy, tmp_path, "--no-flip")
    count = {"inv": 2 * 24 * 2, "dist": 2 * 24 * 6, "labeled_only": 2 * 8, "student": 2 * 32}[stage]
    assert len(draws) == len(set(draws)) == count


def break_videos(toy, folder, ids):
    """Copy the toy videos, but make some of the training videos unreadable -> their paths."""
    shutil.copytree(toy, folder)
    videos = tb.read_videos("toy", folder, True)
    for i in ids:
        Path(videos.path(i)).write_text("not a video")
    return [videos.path(i) for i in ids]


def test_a_broken_video_is_replaced_by_the_next_of_its_pool_with_its_key(toy, three_epochs,
                                                                         tmp_path):
    next_one = {7: 8, 23: 5, 4: 0}
    break_videos(toy, tmp_path / "toy", next_one)
    for (batch, _), (whole, _) in zip(batches(tmp_path / "toy"), three_epochs, strict=True):
        assert batch.ids == [next_one.get(i, i) for i in whole.ids]
        assert batch.keys == whole.keys
    assert next_one.keys() <= {i for whole, _ in three_epochs for i in whole.ids}


@pytest.mark.parametrize("stage", ["dist", "student"])
def test_checkpointing_changes_no_bit(stage, chain, toy, tmp_path):
    """Weights, moments of the optimiser and running statistics, which are not updated twice."""
    earlier_checkpoints(chain, tmp_path, stage)
    run_stage(stage, toy, tmp_path, "--checkpointing")
    assert_same_run(chain, tmp_path, stage)


def test_compile_changes_no_step(toy, tmp_path, monkeypatch, float64):
    """By a quick backend: a C++ compiler takes long. Each block is compiled once: on a GPU the
    backward pass runs in a thread that does not see how often torch may compile it."""
    compile = torch.compile
    compiled = []
    graphs = []

    def quickly(function, **settings):
        compiled.append(function)
        return compile(function, backend=lambda graph, _: graphs.append(graph) or graph, **settings)

    monkeypatch.setattr(torch, "compile", quickly)
    plain = first_step("labeled_only", toy, tmp_path)
    assert all(value.any() for value in plain.values())
    assert not compiled
    counts = []
    for flags in (["--compile"], ["--compile", "--checkpointing"]):
        other = first_step("labeled_only", toy, tmp_path, *flags)
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-9)
        counts.append(len(graphs))
    assert len(compiled) == 2 * 5 and counts[1] == 2 * counts[0] > 0


# ---- The run: losses, learning rate, frozen weights ----------------------------------------------

@pytest.mark.parametrize("stage, flags, line", [
    # ln 23: a clip of the 11 other videos, another of all 12
    ("inv", [], "loss at chance: 3.135\n"),
    ("dist", [], "loss at chance: 1.792 (l_d1 1.099, l_d2 0.693)\n"),
    ("dist", ["--invariant-weight", 1, "--name", "dist"],
     "loss at chance: 4.927 (l_d1 1.099, l_d2 0.693)\n")])
def test_a_loss_at_chance_is_told_once_and_is_no_plateau(stage, flags, line, toy, tmp_path, capsys):
    """At so high a temperature it is there, whatever the clips are: the learning rate stays."""
    run_stage(stage, toy, tmp_path, "--batch", 12, "--epochs", 5, "--patience", 0,
              "--temperature", 1000, *flags)
    before, after = capsys.readouterr().out.split("epoch 1, ")
    assert line in before and "at chance" not in after
    log = read_log(tmp_path, stage)[1:]
    assert log[0]["loss"] == pytest.approx(float(line.split()[3]), abs=0.01)
    assert {epoch["lr"] for epoch in log} == {3e-3}


@pytest.mark.parametrize("stage, flags", [
    ("inv", []), ("dist", []), ("dist", ["--invariant-weight", 2, "--name", "dist"]),
    ("labeled_only", []), ("student", ["--omega", 3]),
    ("student", ["--omega", 3, "--teacher-loss", "kl"])])
def test_the_first_step_is_the_paper_s(stage, flags, chain, toy, tmp_path, monkeypatch):
    """Loss terms and gradients, from the clips of the step and the initial weights; n = 2. That the
    losses of stage 1 are the paper's is in test_common.py. The clips come video by video."""
    earlier_checkpoints(chain, tmp_path, stage)
    step = {}
    stream = tb.Batches.stream

    def note_batch(*args):
        for batch in stream(*args):
            step.update(batch._asdict())
            yield batch

    def note_clips(clips, size, rngs, flip, **strength):
        videos = torch.cat(step["videos"])
        assert flip and torch.equal(torch.cat(clips)[:len(videos)], videos)
        step["clips"] = tb.augment_clips(clips, size, rngs, flip, **strength)
        return step["clips"]

    monkeypatch.setattr(tb.Batches, "stream", note_batch)
    monkeypatch.setattr(STAGES[stage][0], "augment_clips", note_clips)
    found = first_step(stage, toy, tmp_path, "--seed", 1, *flags)
    found |= read_log(tmp_path, stage)[-1]
    torch.manual_seed(tb.seed_of(load(tmp_path, stage)["stage"], 1))
    net = model = tb.build_model("r3d_tiny", 8)
    x = tb.to_input(step["clips"], model)
    if stage in ("inv", "dist"):
        net = tb.Embedder(model)
    else:
        if stage == "student":
            tb.start_from(model, "dist.pt", load(chain, "dist"))
        p = model(x).softmax(1)
        videos = tb.read_videos("toy", toy, True)
        log_p = p[range(len(p)), videos.labels[step["ids"]]].log()
    terms = {}
    if stage == "inv":
        loss = tb.invariant_loss(net(x).view(24, 2, 128))
    elif stage == "dist":
        z, z_aug, g, g_aug = net(x, num_long=48, slices=2).view(4, 24, 2, 128)
        terms["l_d1"] = tb.distinctive_loss(z, z_aug)
        terms["l_d2"] = sum(tb.unpooled_distinctive_loss(clips, slices)
                            for clips in (z, z_aug) for slices in (g, g_aug)) / 4
        loss = terms["l_d1"] + terms["l_d2"]
        if flags:
            terms["l_i"] = tb.invariant_loss(z)
            loss = loss + 2 * terms["l_i"]
    elif stage == "labeled_only":
        loss = -log_p.mean()
    else:
        saved = [load(chain, name) for name in ("inv_ft", "dist_ft")]
        names = [videos.names[i] for i in step["ids"]]
        assert set(names[16:]) == set(saved[0]["labeled"]) == set(videos.names) - set(names[:16])
        with torch.no_grad():
            p_inv, p_dist = (tb.load_classifier(each, x.device)(x).softmax(1) for each in saved)
        s = sum(each["similarity"][step["ids"], 0, 1] for each in saved) / 2
        s = s.clamp(0, 1)[:, None]
        q = s * p_inv + (1 - s) * p_dist
        distances = (q * (q / p).log()).sum(1) if "kl" in flags else (q - p).square().sum(1)
        right = p.argmax(1) == torch.tensor(videos.labels[step["ids"]])
        terms["l_sup"] = -log_p[16:].mean()
        terms["train_accuracy"] = right[16:].float().mean()
        terms["l_unsup"], terms["l_unsup_labeled"] = distances.view(2, 16).mean(1)
        terms["weight_inv"] = s[:16].mean()  # of the unlabelled ones
        terms["agreement"] = (p_inv.argmax(1) == p_dist.argmax(1))[:16].float().mean()
        loss = terms["l_sup"] + 3 * (terms["l_unsup"] + 0.5 * terms["l_unsup_labeled"])
    for name, value in {"loss": loss, **terms}.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    trained = [w for w in net.parameters() if w.requires_grad]
    for i, gradient in enumerate(torch.autograd.grad(loss, trained)):
        limit = 0.01 * float(gradient.abs().max())
        assert torch.allclose(10 * found[f"gradient {i}"], gradient, rtol=0.01, atol=limit), i


@pytest.mark.parametrize("stage, chance, steps, frozen", [
    ("inv", math.log(7), 6, 7), ("dist", math.log(3) + math.log(2), 6, 7),
    ("labeled_only", None, 2, 2), ("student", None, 4, 4)])
def test_learning_rate_rises_then_halves_and_the_last_steps_are_frozen(
        stage, chance, steps, frozen, chain, toy, tmp_path, request, monkeypatch):
    """The losses of stage 1 count a tenth, and so are below chance. No step, frozen or not, begins
    before autograd has let go of the step before: else memory would double."""
    saved = weakref.WeakSet()
    held = []

    def pack(tensor):
        tensor = tensor.detach()  # else it would hold the graph that holds it
        saved.add(box := lambda: tensor)
        return box

    def count_and_augment(*args, **strength):
        held.append(len(saved))
        return tb.augment_clips(*args, **strength)

    monkeypatch.setattr(STAGES[stage][0], "augment_clips", count_and_augment)

    def tenth(loss):
        return lambda *args: loss(*args) / 10

    for name in ("invariant_loss", "distinctive_loss", "unpooled_distinctive_loss"):
        monkeypatch.setattr(STAGES[stage][0], name, tenth(getattr(tb, name)), raising=False)
    earlier_checkpoints(chain, tmp_path, stage)
    taken = []
    request.addfinalizer(register_optimizer_step_post_hook(lambda *_: taken.append(1)).remove)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box()):
        run_stage(stage, toy, tmp_path, "--epochs", 12, "--warmup", 4, "--patience", 0, "--lr",
                  0.02)
    log = read_log(tmp_path, stage)[1:]
    assert [line["lr"] for line in log[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.02)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for before, line in zip(log[3:], log[4:]):
        if before["epoch"] > 4 and (not chance or before["loss"] < 0.95 * chance):
            scheduler.step(before["loss"])
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
    assert log[-1]["lr"] < 0.02  # the schedule did something
    assert len(taken) == 12 * steps - frozen
    assert held == [0] * 12 * steps


def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch):
    calls = []

    def exploding(z, temperature):
        calls.append(1)
        return tb.invariant_loss(z, temperature) * (math.nan if len(calls) == 10 else 1)

    monkeypatch.setattr(pretrain_inv, "invariant_loss", exploding)
    with pytest.raises(SystemExit) as end:
        run_stage("inv", toy, tmp_path, "--save-every", 2)
    assert "not finite in epoch 2" in end.value.code  # a text: exit status 1
    saved = load(tmp_path, "inv")
    assert (saved["epoch"], saved["step"]) == (1, 2)  # the tenth step is the fourth of epoch 2
    assert all(w.isfinite().all() for w in saved["model"].values())


@pytest.mark.parametrize("limit, frozen", [(30, 2), (1, 1)])
def test_weights_are_frozen_in_the_last_steps(limit, frozen, toy, tmp_path, monkeypatch, request):
    """In a tenth of 20 steps, at most in `limit`; the running statistics go on."""
    weights = []

    def note(optimizer, *_):
        weights.append([w.detach().clone() for w in optimizer.param_groups[0]["params"]])

    request.addfinalizer(register_optimizer_step_post_hook(note).remove)
    monkeypatch.setattr(tb, "RECALIBRATION", limit)
    run_stage("labeled_only", toy, tmp_path, "--epochs", 10)
    assert len(weights) == 20 - frozen
    saved = load(tmp_path, "labeled_only")["model"]
    names = [name for name, _ in tb.build_model("r3d_tiny", 8).named_parameters()]
    assert all(torch.equal(saved[name], w) for name, w in zip(names, weights[-1], strict=True))
    assert saved["stem.1.num_batches_tracked"] == 20


def test_teachers_stay_as_they_are_in_stage_3(chain, toy, tmp_path, request):
    """Of the networks that stage 3 runs, those in eval mode are the teachers."""
    earlier_checkpoints(chain, tmp_path, "student")
    networks = set()
    hook = register_module_forward_pre_hook(lambda module, _: networks.add(module))
    request.addfinalizer(hook.remove)
    run_stage("student", toy, tmp_path)
    networks = [net for net in networks if isinstance(net, tb.R3D)]
    teachers = [net.state_dict() for net in networks if not net.training]
    assert len(teachers) == 2 and len(networks) == 3
    for name in ("inv_ft", "dist_ft"):
        assert any(same(dict(weights), load(chain, name)["model"]) for weights in teachers)


# ---- Videos that cannot be decoded, and real ones ------------------------------------------------

def test_unreadable_videos_are_named_once_replaced_and_counted(toy, tmp_path, capsys):
    bad = break_videos(toy, tmp_path / "toy", range(2, 24, 5))
    root = tmp_path / "toy/UCF-101"
    run_stage("inv", tmp_path / "toy", tmp_path)  # all videos, in each epoch
    text, errors = capsys.readouterr()
    replaced = [line for line in errors.splitlines() if "another video replaces it" in line]
    named = [line.split(": ")[1] for line in replaced]
    assert sorted(named) == sorted(bad)
    assert [line["unreadable"] for line in read_log(tmp_path, "inv")[1:]] == [5, 5]
    assert f"5 videos cannot be decoded, such as {os.path.relpath(bad[0], root)}: they" in text
    saved = load(tmp_path, "inv")
    names = tb.read_videos("toy", toy, True).names
    assert saved["similarity_names"] == [n for i, n in enumerate(names) if i not in range(2, 24, 5)]
    assert len(saved["similarity"]) == 19


def test_ten_unreadable_videos_in_a_row_stop_the_run(toy, tmp_path, capsys):
    bad = break_videos(toy, tmp_path / "toy", range(8, 18))
    with pytest.raises(SystemExit, match="2"):
        run_stage("inv", tmp_path / "toy", tmp_path)
    assert f"{bad[0]} and the next 9 cannot be decoded" in capsys.readouterr().err
    shutil.copy(tb.read_videos("toy", toy, True).path(17), bad[9])
    run_stage("inv", tmp_path / "toy", tmp_path, "--epochs", 1)


def test_all_stages_on_real_clips(real_clips, tmp_path):
    """HMDB51's and UCF101's AVI files, Kinetics' MP4 files, in folders of one's own."""
    folders = ["unlabeled/deep/er"]
    for c in ("baking cookies", "it's (2)", "c"):
        folders += [f"train/{c}"] * 3 + [f"test/{c}"]
    for i, folder in enumerate(folders):
        clip = real_clips[i % len(real_clips)]
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / folder / f"-x{i}{clip.suffix}")
    out = tmp_path / "out"
    for stage in STAGES:
        few = ["--per-class", 1] if stage in ("ft", "labeled_only") else []
        run_stage(stage, tmp_path, out, "--data", "folder", "--arch", "r3d_tiny", "--epochs", 1,
                  *few)
    evaluate.main([str(out), "--clips", "2", "--workers", "0"])
    results = read_results(out)
    assert [r["checkpoint"] for r in results] == EVALUATED
    for r in results:
        assert (r["videos"], r["unreadable"], r["labeled_count"]) == (3, 0, 3)
    assert len(load(out, "inv")["similarity"]) == 10
