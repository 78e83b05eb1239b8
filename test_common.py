"""Sanity checks, read in five minutes and run in one on two cores:

    python -m pytest -q test_common.py

Losses against loops, TSTR by hand, both networks against public keys and numbers, exact frames of
two kinds of files, the labelled subset, and a tiny chain of all stages with the label firewall. The
folder tests/ holds the other tests, which share the chain and the helpers below."""

import argparse
import functools
import json
import math
import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the tensors are small

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common as tb
import evaluate
import finetune
import pretrain_dist
import pretrain_inv
import train_student

HERE = Path(__file__).parent


# ---- The losses of stage 1, against loops transcribed from the paper -----------------------------

def h(u1, u2, tau):
    return math.exp(float(u1 @ u2) / (float(u1.norm()) * float(u2.norm()) * tau))


def loop_invariant(z, tau):  # Eq. 1
    B, n, _ = z.shape
    total = 0
    for i in range(B):
        for t1 in range(n):
            for t2 in range(n):
                if t2 == t1:
                    continue
                denominator = 0
                for j in range(B):
                    if j != i:
                        denominator += h(z[i, t1], z[j, t1], tau)
                    denominator += h(z[i, t1], z[j, t2], tau)
                total -= math.log(h(z[i, t1], z[i, t2], tau) / denominator)
    return total / (B * n * (n - 1))


def loop_distinctive(z, z_aug, tau):
    """Eq. 3, with the positive in the denominator, either view as anchor."""
    B, n, _ = z.shape
    total = 0
    for a, b in [(z, z_aug), (z_aug, z)]:
        for i in range(B):
            for t1 in range(n):
                positive = h(a[i, t1], b[i, t1], tau)
                denominator = positive
                for t2 in range(n):
                    if t2 != t1:
                        denominator += h(a[i, t1], a[i, t2], tau) + h(a[i, t1], b[i, t2], tau)
                total -= math.log(positive / denominator)
    return total / (2 * B * n)


def loop_unpooled(z_local, z_global, tau):
    """Fig. 7: aligned clip and slice agree, misaligned ones do not."""
    B, n, _ = z_local.shape
    total = 0
    for i in range(B):
        for t in range(n):
            aligned = h(z_local[i, t], z_global[i, t], tau)
            slices = sum(h(z_local[i, t], z_global[i, k], tau) for k in range(n))
            clips = sum(h(z_local[i, k], z_global[i, t], tau) for k in range(n))
            total -= math.log(aligned / slices) + math.log(aligned / clips)
    return total / (2 * B * n)


def two_views(seed):
    """Two (B, n, d) of random vectors and a temperature, sizes and scales random, too."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(2, 7), rng.integers(2, 6), rng.integers(2, 40)
    tau = float(rng.uniform(0.07, 1))
    a = rng.normal(0, rng.uniform(0.1, 10), shape)
    b = rng.normal(0, rng.uniform(0.1, 10), shape)
    return torch.tensor(a), torch.tensor(b), tau


@pytest.mark.parametrize("seed", range(8))
def test_losses_equal_the_paper_s_loops(seed):
    a, b, tau = two_views(seed)
    for loss, loop in [
            (tb.invariant_loss(a, tau), loop_invariant(a, tau)),
            (tb.distinctive_loss(a, b, tau), loop_distinctive(a, b, tau)),
            (tb.unpooled_distinctive_loss(a, b, tau), loop_unpooled(a, b, tau))]:
        assert loss.item() == pytest.approx(loop, rel=1e-4)


# ---- Temporal similarity based teacher reweighting (TSTR), and distillation ----------------------

def test_equations_5_to_7_equal_loops():
    torch.manual_seed(0)
    z_inv = torch.randn(5, 4, 16) + 1
    z_dist = torch.randn(5, 4, 16) + 0.5
    s = tb.similarity_score(tb.temporal_similarity(z_inv), tb.temporal_similarity(z_dist))
    p_inv, p_dist = torch.rand(2, 5, 7).softmax(2)
    p = tb.combine_teachers(p_inv, p_dist, s)
    for i in range(5):
        total = 0
        for z in (z_inv, z_dist):
            for t1, t2 in np.ndindex(4, 4):
                if t1 != t2:  # the diagonal is left out
                    total += float(F.cosine_similarity(z[i, t1], z[i, t2], 0))
        assert s[i].item() == pytest.approx(total / (2 * 4 * 3), abs=1e-6)
        assert torch.allclose(p[i], s[i] * p_inv[i] + (1 - s[i]) * p_dist[i])


# ---- Networks, against public keys and numbers ---------------------------------------------------

def fill_by_formula(model):
    """Weights and statistics that anyone can compute, in eval mode."""
    for k, (name, w) in enumerate(model.state_dict().items()):
        steps = torch.arange(w.numel(), dtype=torch.float64)
        wave = torch.cos(steps * (1 + k / 10)).view(w.shape)
        if w.ndim == 5:
            w.copy_(wave * (2 / w[0].numel()) ** 0.5)
        elif w.dtype.is_floating_point:
            scale = "norm" in name or name.startswith(("stem.1", "layer"))
            if scale and name.endswith(("weight", "running_var")):
                w.copy_(1 + wave / 2)
            else:
                w.copy_(wave / 10)
    return model.eval()


class TestModels:
    def test_r3d_18_is_torchvision_s_but_for_time_in_layer4(self):
        """With one seed even its initial weights."""
        torch.manual_seed(0)
        model = tb.build_model("r3d_18", 7)
        torch.manual_seed(0)
        stock = torchvision.models.video.r3d_18(num_classes=7).eval()
        assert list(model.state_dict()) == list(stock.state_dict())
        assert same(model.state_dict(), stock.state_dict())
        public = torchvision.models.video.R3D_18_Weights.DEFAULT.transforms()
        assert model.mean.tolist() == pytest.approx(public.mean)
        assert model.std.tolist() == pytest.approx(public.std)
        stock.load_state_dict(fill_by_formula(model).state_dict())
        x = torch.randn(2, 3, 16, 48, 40)
        with torch.no_grad():
            logits = model(x)
            assert model.features(x).shape == (2, 512, 4)
            assert not torch.allclose(logits, stock(x), atol=1e-3)
            conv, shortcut = stock.layer4[0].conv1[0], stock.layer4[0].downsample[0]
            conv.stride, conv.dilation, conv.padding = (1, 2, 2), (2, 1, 1), (2, 1, 1)
            shortcut.stride = (1, 2, 2)
            assert torch.allclose(logits, stock(x), atol=1e-5)

    def test_slow_r50_is_pytorchvideo_s(self):
        """Its keys, and the logits of pytorchvideo.models.hub.slow_r50 0.1.5, float64, its pool
        made adaptive: they depend on the order and the shape of every tensor."""
        model = tb.build_model("slow_r50", 5)
        assert not model.blocks[4].res_blocks[2].branch2.norm_c.weight.any()
        assert (model.mean == 0.45).all() and (model.std == 0.225).all()
        keys = list(fill_by_formula(model).state_dict())
        assert keys[-2:] == ["blocks.5.proj.weight", "blocks.5.proj.bias"]
        assert {"blocks.1.res_blocks.0.branch1_norm.weight",
                "blocks.3.res_blocks.5.branch2.conv_a.weight",
                "blocks.4.res_blocks.2.branch2.norm_c.num_batches_tracked"} <= set(keys)
        x = torch.cos(torch.arange(3 * 8 * 64 * 64, dtype=torch.float64)).float()
        x = x.view(1, 3, 8, 64, 64)
        expected = [0.29953622, 0.08540572, -0.19857994, -0.23216664, -0.07341280]
        with torch.no_grad():
            assert torch.allclose(model(x), torch.tensor([expected]), atol=1e-5)
        assert model.blocks[5].dropout.p == 0.5


# ---- Exact frames of two kinds of files ----------------------------------------------------------

@pytest.mark.parametrize("name, codec, options", [
    ("xvid-like.avi", "mpeg4", {"g": "12"}), ("phone.mp4", "libx264", {"g": "30", "bf": "2"})])
def test_frames_are_those_of_a_full_decode(name, codec, options, tmp_path):
    path = str(tmp_path / name)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 56, 40, "yuv420p"
        for frame in tb.toy_clip(4, tb.rng(0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    with av.open(path) as container:
        expected = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    count = len(expected)
    for indices in ([0], range(50, 54), [count - 1, 0, 48, 0], range(count)):
        assert np.array_equal(tb.decode_frames(path, indices), expected[list(indices)]), indices
    assert tb.decode_frames(path, [3], short_side=20).shape == (1, 20, 28, 3)
    with pytest.raises(IndexError):
        tb.decode_frames(path, [count])


# ---- The labelled subset -------------------------------------------------------------------------

NAMES = [f"c{c}/v{i}.avi" for c, count in enumerate((3, 40, 101)) for i in range(count)]


def subset(percent=100, seed=0, per_class=None, order=slice(None)):
    """The names that labeled_subset chooses from NAMES."""
    names = NAMES[order]
    labels = np.array([int(name[1]) for name in names])
    return {names[i] for i in tb.labeled_subset(names, labels, percent, seed, per_class)}


@pytest.mark.parametrize("percent", [1, 5, 10, 50, 100])
def test_labelled_subset_has_its_share_of_each_class(percent):
    chosen = subset(percent)
    counts = [sum(name.startswith(f"c{c}/") for name in chosen) for c in range(3)]
    assert counts == [max(1, round(percent / 100 * n)) for n in (3, 40, 101)]
    assert chosen == subset(percent, order=slice(None, None, -1))


def test_labelled_subsets_are_nested_and_depend_on_the_seed():
    assert subset(1) < subset(5) < subset(10) < subset(50) < subset(100) == set(NAMES)
    assert subset(5) != subset(5, seed=1)
    few = sorted(subset(per_class=5))  # two classes have as many videos, the first only three
    assert [name[1] for name in few] == [*"0001111122222"] and set(few) < subset(per_class=9)
    assert tb.labeled_subset(["u/1.avi"], [-1], 100).tolist() == []  # no class


# ---- A tiny chain of all stages, with the label firewall -----------------------------------------

TINY = ("--size 16 --frames 8 --stride 2 --epochs 2 --batch 4 --precision fp32 --device cpu "
        "--workers 0 --warmup 1").split()
STAGES = {"inv": (pretrain_inv, ["--clips", "2"]), "dist": (pretrain_dist, ["--clips", "2"]),
          "ft": (finetune, []), "labeled_only": (finetune, ["--init", "none"]),
          "student": (train_student, [])}
CHECKPOINTS = ["inv", "dist", "inv_ft", "dist_ft", "labeled_only", "student"]
EVALUATE = "--clips 2 --device cpu --workers 0 --precision fp32".split()
EVALUATED = ["labeled_only.pt", "dist_ft.pt", "inv_ft.pt", "teachers, mean", "teachers, TSTR",
             "student.pt"]


def stage_argv(stage, root, out, *flags):
    return [*TINY, *STAGES[stage][1], "--root", str(root), "--out", str(out), *map(str, flags)]


def run_stage(stage, root, out, *flags):
    STAGES[stage][0].main(stage_argv(stage, root, out, *flags))


def run_chain(root, out, *finetune_flags, split=1):
    for stage in STAGES:
        flags = finetune_flags if STAGES[stage][0] is finetune else ()
        run_stage(stage, root, out, "--split", split, *flags)
    evaluate.main([str(out), *EVALUATE])


def load(out, name):
    return torch.load(Path(out) / f"{name}.pt", weights_only=True)


def read_log(out, name):
    """The lines of the log: where the weights come from, then one for each epoch."""
    return [json.loads(line) for line in (Path(out) / f"{name}.log").read_text().splitlines()]


def read_results(out):
    return json.loads((Path(out) / "results.json").read_text())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@functools.cache  # this file and tests/ share them
def train_once(folder):
    """A set of 24 + 8 toy videos, and the folder in which all stages have left their files."""
    tb.render_toy(folder / "toy", train=24, test=8)
    run_chain(folder / "toy", folder / "chain")
    return folder / "toy", folder / "chain"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return train_once(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    return train_once(tmp_path_factory.getbasetemp())[1]


class TestChain:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_each_stage_leaves_its_checkpoint_and_its_log(self, name, chain):
        saved = load(chain, name)
        assert saved["finished"] and saved["epoch"] == 2 and len(saved["classes"]) == 8
        assert {"optimizer", "scheduler"} <= saved.keys()
        tb.build_model("r3d_tiny", 8).load_state_dict(saved["model"])  # strict: the head is apart
        assert ("similarity" in saved) == (name.removesuffix("_ft") in ("inv", "dist"))
        _, *epochs = read_log(chain, name)
        assert [line["epoch"] for line in epochs] == [1, 2]
        assert all(math.isfinite(line["loss"]) for line in epochs)

    def test_every_classifier_is_evaluated(self, chain):
        results = read_results(chain)
        assert [r["checkpoint"] for r in results] == EVALUATED
        assert all(r["videos"] == r["labeled_count"] == 8 for r in results)

    def test_label_firewall(self, chain, toy, tmp_path):
        """Stages see the labels of the labelled videos alone. All other videos move to another
        class, in lists of split 2: the same weights come out, but not the same accuracies."""
        args = [argparse.Namespace(**{**load(chain, name)["args"], "out": tmp_path})
                for name in ("inv", "inv_ft")]
        assert (tb.training_videos(args[0]).labels == -1).all()
        ids, videos = tb.labeled_and_all_videos(args[1])
        assert (np.delete(videos.labels, ids) == -1).all() and (videos.labels[ids] >= 0).all()
        root = tmp_path / "toy"
        shutil.copytree(toy, root)
        rows = (chain / "labeled.txt").read_text().splitlines()
        labeled = [row.split()[0] for row in rows]
        classes = tb.read_videos("toy", toy, True).classes
        for part in ("train", "test"):
            file = root / f"ucfTrainTestlist/{part}list01.txt"
            names = []
            for row in file.read_text().splitlines():
                c, video = row.split()[0].split("/")
                other = classes[(classes.index(c) + 3) % 8]
                moved = c if f"{c}/{video}" in labeled else other
                (root / "UCF-101" / c / video).rename(root / "UCF-101" / moved / video)
                names.append(f"{moved}/{video}")
            file.rename(file.with_name(f"{part}list02.txt")).write_text("\n".join(names))
        run_chain(root, tmp_path / "out", "--labeled-list", chain / "labeled.txt", split=2)
        for name in CHECKPOINTS:
            assert same(load(chain, name)["model"], load(tmp_path / "out", name)["model"]), name
        before, after = ([r["per_class"] for r in read_results(out)]
                         for out in (chain, tmp_path / "out"))
        assert before != after
