"""All tests, some minutes on two cores:

    pytest test_common.py

Losses, TSTR and networks alone, in seconds:

    pytest test_common.py -k "Losses or TSTR or Models"

From the method to the plumbing, a class for each chapter; what it needs stands above it. Those that
read real UCF101, HMDB51 and Kinetics files look for them, and for the official lists, in the folder
named by TIMEBALANCE_TEST_DATA (videos/ and splits/), and are skipped where it is not set. Some run
a function of this file in other processes: python test_common.py NAME ARGUMENTS. One measures time,
so it runs on a quiet machine alone: TIMEBALANCE_QUIET=1 pytest test_common.py -k neighbour"""

import argparse
import contextlib
import copy
import errno
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
import zipfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

# Before torch is imported, here and in what the tests start: the tensors are small.
os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import common as tb
import evaluate
import finetune
import pretrain_dist
import pretrain_inv
import train_student

HERE = Path(tb.__file__).parent


# ---- The losses of stage 1, against loops transcribed from the paper ---------------------------

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


def change_down_the_gradient(loss, measure):
    """By how much a step down the gradient of loss(z, other) changes measure(z, other)."""
    torch.manual_seed(0)
    z = (torch.randn(6, 1, 16) + 0.5 * torch.randn(6, 4, 16)).requires_grad_()
    other = torch.randn(6, 4, 16)
    gradient, = torch.autograd.grad(loss(z, other), z)
    return (measure(z - 10 * gradient, other) - measure(z, other)).item()


def likeness(z, _):
    """How much the clips of a video resemble one another."""
    return tb.temporal_similarity(z)[:, ~torch.eye(4, dtype=torch.bool)].mean()


class TestLosses:
    @pytest.mark.parametrize("seed", range(8))
    def test_invariant_loss_equals_the_paper_s_loop(self, seed):
        a, _, tau = two_views(seed)
        assert tb.invariant_loss(a, tau).item() == pytest.approx(loop_invariant(a, tau), rel=1e-4)

    @pytest.mark.parametrize("seed", range(8))
    def test_distinctive_loss_equals_the_paper_s_loop(self, seed):
        a, b, tau = two_views(seed)
        expected = pytest.approx(loop_distinctive(a, b, tau), rel=1e-4)
        assert tb.distinctive_loss(a, b, tau).item() == expected

    @pytest.mark.parametrize("seed", range(8))
    def test_unpooled_distinctive_loss_equals_the_paper_s_loop(self, seed):
        a, b, tau = two_views(seed)
        expected = pytest.approx(loop_unpooled(a, b, tau), rel=1e-4)
        assert tb.unpooled_distinctive_loss(a, b, tau).item() == expected

    def test_of_equal_clips_only_the_number_of_terms_counts(self):
        B, n, tau = 5, 3, 0.5
        z = torch.ones(B, n, 8)  # every h is exp(1 / tau)
        assert tb.invariant_loss(z, tau).item() == pytest.approx(math.log(2 * B - 1))
        assert tb.distinctive_loss(z, z, tau).item() == pytest.approx(math.log(2 * n - 1))
        assert tb.unpooled_distinctive_loss(z, z, tau).item() == pytest.approx(math.log(n))

    def test_orthogonal_clips_by_hand(self):
        B, n, tau = 5, 3, 0.5
        other = math.exp(-1 / tau)  # a negative's share of the positive
        z = torch.eye(B)[:, None].expand(B, n, B)  # clips of one video equal, of two orthogonal
        assert tb.invariant_loss(z, tau).item() == pytest.approx(math.log(1 + 2 * (B - 1) * other))
        z = torch.eye(n).expand(B, n, n)  # clips of one video orthogonal, both augmentations equal
        expected = math.log(1 + 2 * (n - 1) * other)
        assert tb.distinctive_loss(z, z, tau).item() == pytest.approx(expected)
        expected = math.log(1 + (n - 1) * other)
        assert tb.unpooled_distinctive_loss(z, z, tau).item() == pytest.approx(expected)

    def test_invariant_loss_makes_clips_of_a_video_alike(self):
        assert change_down_the_gradient(lambda z, _: tb.invariant_loss(z), likeness) > 0.005

    def test_distinctive_loss_makes_clips_of_a_video_differ(self):
        def loss(z, _):
            return tb.distinctive_loss(z, z.detach())

        assert change_down_the_gradient(loss, likeness) < -0.005

    def test_unpooled_distinctive_loss_makes_aligned_clip_and_slice_alike(self):
        def agreement(z, other):
            return F.cosine_similarity(z, other, dim=2).mean()

        assert change_down_the_gradient(tb.unpooled_distinctive_loss, agreement) > 0.005

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("z", [
        torch.ones(2, 2, 4), torch.tensor([[[1.0], [-1]], [[-1], [1]]]), 1e4 * torch.randn(2, 2, 4),
        torch.zeros(2, 2, 4)], ids=["identical", "opposite", "huge", "zero"])
    def test_losses_and_gradients_are_finite_at_the_corners(self, z, dtype):
        for loss in (tb.invariant_loss, lambda z: tb.distinctive_loss(z, z),
                     lambda z: tb.unpooled_distinctive_loss(z, z)):
            leaf = z.to(dtype, copy=True).requires_grad_()
            value = loss(leaf)
            value.backward()
            assert value.dtype == torch.float32 and value.isfinite()
            assert leaf.grad.isfinite().all()

    def test_losses_are_float32_inside_autocast(self):
        torch.manual_seed(0)
        z = torch.randn(8, 4, 128)
        w = torch.randn(8, 4, 128)
        for loss in (lambda: tb.invariant_loss(z), lambda: tb.distinctive_loss(z, w),
                     lambda: tb.unpooled_distinctive_loss(z, w),
                     lambda: tb.temporal_similarity(z).sum()):
            with torch.autocast("cpu", torch.bfloat16):
                inside = loss()
            assert inside.dtype == torch.float32 and torch.equal(inside, loss())

    def test_losses_refuse_wrong_shapes(self):
        z = torch.randn(3, 4, 8)
        for wrong in (lambda: tb.invariant_loss(z[0]), lambda: tb.invariant_loss(z[:1]),
                      lambda: tb.invariant_loss(z[:, :1]), lambda: tb.distinctive_loss(z, z[:2]),
                      lambda: tb.unpooled_distinctive_loss(z, z[:, :2])):
            with pytest.raises(ValueError):
                wrong()


# ---- Teacher-student temporal similarity reweighting, and distillation -------------------------

class TestTSTR:
    def test_temporal_similarity_is_eq_5(self):
        torch.manual_seed(0)
        z = torch.randn(5, 4, 16) + 1
        c = tb.temporal_similarity(z)
        for i, t1, t2 in np.ndindex(5, 4, 4):
            expected = float(F.cosine_similarity(z[i, t1], z[i, t2], 0))
            assert c[i, t1, t2].item() == pytest.approx(expected, abs=1e-6)

    def test_similarity_score_is_eq_6(self):
        torch.manual_seed(0)
        c_inv = tb.temporal_similarity(torch.randn(5, 4, 16) + 1)
        c_dist = tb.temporal_similarity(torch.randn(5, 4, 16) + 0.5)
        s = tb.similarity_score(c_inv, c_dist)
        for i in range(5):
            total = 0
            for t1, t2 in np.ndindex(4, 4):
                if t1 != t2:
                    total += float(c_inv[i, t1, t2] + c_dist[i, t1, t2])
            assert s[i].item() == pytest.approx(total / (2 * 4 * 3), abs=1e-6)

    def test_teachers_are_combined_by_eq_7(self):
        torch.manual_seed(0)
        s = torch.rand(5)
        p_inv = torch.rand(5, 7).softmax(1)
        p_dist = torch.rand(5, 7).softmax(1)
        p = tb.combine_teachers(p_inv, p_dist, s)
        for i in range(5):
            assert torch.allclose(p[i], s[i] * p_inv[i] + (1 - s[i]) * p_dist[i])
        assert torch.allclose(p.sum(1), torch.ones(5))

    def test_similarity_score_is_clamped(self):
        ones = torch.ones(1, 3, 3)
        assert tb.similarity_score(ones, ones).item() == 1
        assert tb.similarity_score(-ones, ones - 1).item() == 0
        assert tb.similarity_score(1.5 * ones, ones).item() == 1

    def test_similarity_score_leaves_out_the_diagonal(self):
        diagonal = 99 * torch.eye(3)[None]
        c = torch.ones(1, 3, 3)
        s = tb.similarity_score(0.5 * c + diagonal, 0.25 * c + diagonal)
        assert s.item() == pytest.approx(0.375)

    def test_distillation_by_hand(self):
        p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
        q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
        l2 = 2 * 0.25 ** 2 + 0.5 ** 2
        kl = 2 * 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 1e-8)  # from the teacher
        js = (2 * 0.5 * math.log(0.5 / 0.375) + 2 * 0.25 * math.log(0.25 / 0.375)
              + 0.5 * math.log(0.5 / 0.25)) / 2
        for kind, value in {"l2": l2, "kl": kl, "js": js}.items():
            loss = tb.distillation_loss(p, q, kind).item()
            assert loss == pytest.approx(value / 2, rel=1e-5)  # the second row is equal

    def test_distillation_kl_is_torch_s(self):
        p = torch.tensor([[0.3, 0.3, 0.4], [0.2, 0.3, 0.5]])
        q = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
        expected = float(F.kl_div(p.log(), q, reduction="batchmean"))
        assert tb.distillation_loss(p, q, "kl").item() == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["l2", "kl", "js"])
    def test_distillation_of_one_hot_vectors_is_finite(self, kind, dtype):
        one_hot = torch.eye(3)[:2].to(dtype)
        for teacher in (one_hot, one_hot.flip(0)):
            leaf = one_hot.clone().requires_grad_()
            value = tb.distillation_loss(leaf, teacher, kind)
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all()

    def test_wrong_shapes_are_refused(self):
        z = torch.randn(3, 4, 8)
        for wrong in (lambda: tb.temporal_similarity(z[0]), lambda: tb.similarity_score(z, z[:2]),
                      lambda: tb.combine_teachers(z[0], z[0], z[0]),
                      lambda: tb.distillation_loss(z[0], z[1, :2]),
                      lambda: tb.distillation_loss(z[0], z[1], "l1")):
            with pytest.raises(ValueError):
                wrong()


# ---- Networks, and public weights for them -----------------------------------------------------

@functools.cache  # to draw the weights takes longer than all the rest
def network(arch):
    """A fresh network of seven classes, to look at; copy it to change it."""
    torch.manual_seed(0)
    return tb.build_model(arch, 7).eval()


def hollow(build, *args, **settings):
    """A network without weights."""
    with torch.device("meta"):
        return build(*args, **settings)


@pytest.fixture(scope="module")
def r3d_18():
    """Our network, with statistics and scales that are not 0 and 1, an input and its logits."""
    model = copy.deepcopy(network("r3d_18"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 16, 48, 40)
    with torch.no_grad():
        return model, x, model(x)


def stock_r3d_18(weights):
    model = hollow(torchvision.models.video.r3d_18, num_classes=7)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def fill_by_formula(model):
    """Weights and statistics that anyone can compute, in eval mode."""
    for k, (name, w) in enumerate(model.state_dict().items()):
        steps = torch.arange(w.numel(), dtype=torch.float64)
        wave = torch.cos(steps * (1 + k / 10)).view(w.shape)
        if w.ndim == 5:
            w.copy_(wave * (2 / w[0].numel()) ** 0.5)
        elif "norm" in name and name.endswith(("weight", "running_var")):
            w.copy_(1 + wave / 2)
        elif w.dtype.is_floating_point:
            w.copy_(wave / 10)
    return model.eval()


@pytest.fixture(scope="module")
def embedder():
    """An Embedder in eval mode, and six clips for it."""
    torch.manual_seed(0)
    return tb.Embedder(tb.build_model("r3d_tiny", 3)).eval(), torch.randn(6, 3, 16, 32, 32)


@functools.cache
def torchvision_weights():
    torch.manual_seed(1)
    return torchvision.models.video.r3d_18(num_classes=400).state_dict()


def public_checkpoint(form):
    """The network, its plain state dict and the content of a file as torchvision & co. publish."""
    if form == "pytorchvideo":
        torch.manual_seed(1)
        weights = tb.build_model("slow_r50", 400).state_dict()
        return "slow_r50", weights, {"model_state": weights}
    weights = torchvision_weights()
    if form == "torchvision":
        return "r3d_18", weights, weights
    tclr = {f"module.{1 if key.startswith('fc') else 0}.{key}": w for key, w in weights.items()}
    return "r3d_18", weights, {"state_dict": tclr, "epoch": 3}


class TestModels:
    def test_r3d_18_is_torchvision_s_but_for_time_in_layer4(self, r3d_18):
        """The stock network after the surgery that the README describes."""
        model, x, logits = r3d_18
        stock = stock_r3d_18(model.state_dict())
        conv = stock.layer4[0].conv1[0]
        conv.stride = (1, 2, 2)
        conv.dilation = (2, 1, 1)
        conv.padding = (2, 1, 1)
        stock.layer4[0].downsample[0].stride = (1, 2, 2)
        assert list(model.state_dict()) == list(stock.state_dict())
        with torch.no_grad():
            assert torch.allclose(logits, stock(x), atol=1e-5)

    def test_r3d_18_is_not_torchvision_s_as_it_is(self, r3d_18):
        model, x, logits = r3d_18
        plain = stock_r3d_18(model.state_dict())
        with torch.no_grad():
            assert model.features(x).shape == (2, 512, 4)
            assert not torch.allclose(logits, plain(x), atol=1e-3)

    def test_slow_r50_has_pytorchvideo_s_tensors(self):
        parameters = hollow(tb.build_model, "slow_r50", 400).parameters()
        assert sum(p.numel() for p in parameters) == 32_454_096
        tensors = hollow(tb.build_model, "slow_r50", 5).state_dict()
        keys = list(tensors)
        assert len(keys) == 320 and not any("res_blocks.1.branch1" in key for key in keys)
        assert keys[0] == "blocks.0.conv.weight"
        assert keys[-2:] == ["blocks.5.proj.weight", "blocks.5.proj.bias"]
        for key, shape in {
                "blocks.0.norm.running_mean": (64,),
                "blocks.1.res_blocks.0.branch1_norm.weight": (256,),
                "blocks.1.res_blocks.2.branch2.conv_a.weight": (64, 256, 1, 1, 1),
                "blocks.2.res_blocks.3.branch2.conv_b.weight": (128, 128, 1, 3, 3),
                "blocks.3.res_blocks.5.branch2.conv_a.weight": (256, 1024, 3, 1, 1),
                "blocks.4.res_blocks.0.branch1_conv.weight": (2048, 1024, 1, 1, 1),
                "blocks.4.res_blocks.2.branch2.norm_c.num_batches_tracked": ()}.items():
            assert tensors[key].shape == shape

    def test_slow_r50_computes_what_pytorchvideo_s_does(self):
        """The logits of pytorchvideo.models.hub.slow_r50 0.1.5, float64, its pool made adaptive."""
        model = fill_by_formula(tb.build_model("slow_r50", 5))
        x = torch.cos(torch.arange(3 * 8 * 64 * 64, dtype=torch.float64)).float()
        x = x.view(1, 3, 8, 64, 64)
        expected = [0.29953622, 0.08540572, -0.19857994, -0.23216664, -0.07341280]
        with torch.no_grad():
            assert torch.allclose(model(x), torch.tensor([expected]), atol=1e-5)
            assert model.features(x).shape == (1, 2048, 8)

    def test_slow_r50_starts_as_pytorchvideo_s_does(self):
        model = network("slow_r50")
        assert not model.blocks[4].res_blocks[2].branch2.norm_c.weight.any()
        assert model.blocks[5].dropout.p == 0.5

    @pytest.mark.parametrize("arch, dim, frames", [
        ("r3d_tiny", 96, 4), ("r3d_18", 512, 4), ("slow_r50", 2048, 16)])
    def test_features_are_pooled_over_space_only(self, arch, dim, frames):
        model = network(arch)
        x = torch.randn(1, 3, 16, 32, 48)
        with torch.no_grad():
            f = model.features(x)
            assert f.shape == (1, dim, frames)
            assert model(x).shape == (1, 7)

    def test_an_unknown_arch_is_refused_with_the_known_ones(self):
        with pytest.raises(ValueError, match="r3d_tiny"):
            tb.build_model("r3d_19", 3)

    def test_projection_head_is_the_paper_s(self):
        torch.manual_seed(0)
        head = tb.ProjectionHead(2048)
        kinds = [type(module).__name__ for module in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
        assert head[3].bias is None
        assert head(torch.randn(4, 2048)).norm(dim=1).allclose(torch.ones(4))

    def test_embedder_pools_short_clips_and_slices_long_ones(self, embedder):
        embedder, x = embedder
        z = embedder(x, num_long=2, slices=4)
        f = embedder.backbone.features(x)
        assert z.shape == (4 + 2 * 4, 128)
        assert torch.allclose(z[:4], embedder.head(f[:4].mean(2)), atol=1e-6)
        for long, t in np.ndindex(2, 4):  # slice t of long clip `long`
            expected = embedder.head(f[4 + long, :, t][None])[0]
            assert torch.allclose(z[4 + 4 * long + t], expected, atol=1e-6)

    def test_embedder_trains_all_but_the_classifier(self, embedder):
        for name, p in embedder[0].backbone.named_parameters():
            assert p.requires_grad != name.startswith("fc.")

    @pytest.mark.parametrize("form", ["torchvision", "pytorchvideo", "tclr"])
    def test_public_weights_are_taken_but_for_the_classifier(self, form, tmp_path, capsys):
        arch, public, content = public_checkpoint(form)
        path = tmp_path / "public.pth"
        torch.save(content, path)
        model = copy.deepcopy(network(arch))
        before = {key: w.clone() for key, w in model.state_dict().items()}
        tb.start_from(model, path, tb.read_checkpoint(path))
        after = model.state_dict()
        assert f"took {len(after) - 2} tensors of" in capsys.readouterr().out
        for key, w in after.items():
            if key.startswith(tb.CLASSIFIERS):
                assert torch.equal(w, before[key])
            elif form == "tclr" and key == "stem.0.weight":
                assert torch.equal(w, public[key].flip(1))  # TCLR read BGR frames
            else:
                assert torch.equal(w, public[key])

    def test_weights_that_do_not_fit_are_refused(self):
        r3d = torchvision_weights()
        for arch, saved in [("slow_r50", r3d), ("r3d_18", {"state_dict": {}}), ("r3d_tiny", r3d),
                            ("r3d_18", {"a": 1})]:
            with pytest.raises(tb.UserError, match="x.pth"):
                tb.start_from(hollow(tb.build_model, arch, 7), "x.pth", saved)


# ---- The decoder, on files of many kinds -------------------------------------------------------

def moving_frames(count, height=48, width=64, seed=0):
    """Frames of which no two are alike: a gradient that moves, and a number in binary."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for t in range(count):
        frames[t, ..., 0] = (x * 3 + 7 * t + seed) % 256
        frames[t, ..., 1] = (y * 4 + 5 * t) % 256
        frames[t, ..., 2] = (x + y + 11 * t) % 256
        for bit in range(8):
            frames[t, :12, bit * 8:bit * 8 + 6] = 255 * (t >> bit & 1)
    return frames


def write_video(path, frames, codec="mpeg4", pix_fmt="yuv420p", options=None, pts=None, rotation=0,
                cover=False, extra=(), before=()):
    """Encode RGB frames. before, extra: more streams, as (codec, frames), in front or behind."""
    flags = {"movflags": "+faststart"} if str(path).endswith("mp4") else {}
    with av.open(str(path), "w", options=flags) as container:
        def add(codec, frames):
            if codec in ("aac", "mp2", "libopus"):
                return container.add_stream(codec, rate=48000)
            stream = container.add_stream(codec, rate=25,
                                          options={"threads": "1", **(options or {})})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pix_fmt
            if cover:
                stream.disposition = av.stream.Disposition.attached_pic.value
            if rotation:
                stream.set_display_rotation(rotation)
            return stream

        contents = [*before, (codec, frames), *extra]
        streams = [add(*content) for content in contents]  # all of them before the first packet
        for stream, (_, content) in zip(streams, contents):
            if stream.type == "audio":
                for k in range(40):
                    silence = np.zeros((1, 1024), np.float32)
                    frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
                    frame.sample_rate = 48000
                    frame.pts = 1024 * k
                    container.mux(stream.encode(frame))
            else:
                for t, array in enumerate(content):
                    frame = av.VideoFrame.from_ndarray(array, "rgb24")
                    if pts is not None:
                        frame.pts = pts[t]
                        frame.time_base = Fraction(1, 25)
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def write_sound_with_cover(path):
    """A file whose only picture is the cover of its sound."""
    write_video(path, moving_frames(1, 32, 32), "mjpeg", "yuvj420p", cover=True,
                extra=[("aac", None)])


def full_decode(path, stream=0):
    """All frames, by PyAV's plainest means."""
    with av.open(str(path), **tb.OPEN) as container:
        frames = container.decode(video=stream)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def check_exact(path, expected):
    """decode_frames gives the frames that were asked for, whichever, and counts them right."""
    count = len(expected)
    rng = np.random.default_rng(0)
    ranges = []
    for start, length in zip(rng.integers(count, size=12), rng.integers(1, 40, size=12)):
        ranges.append([start, *range(start + 1, min(count, start + length))])
    for indices in [[0], [count - 1], [count - 1, 0, count // 2, 0], range(count), *ranges]:
        frames = tb.decode_frames(path, indices)
        assert frames.dtype == torch.uint8
        assert np.array_equal(frames.numpy(), expected[list(indices)]), indices
    with pytest.raises(IndexError):
        tb.decode_frames(path, [count])
    last, counted = last_frame(path)  # files can have more packets than frames
    assert np.array_equal(last[0].numpy(), expected[-1]) and counted == count


def last_frame(path):
    """The last frame, asked for by a function of the count, and the last count it was given."""
    asked = []
    frames = tb.decode_frames(path, lambda count: asked.append(count) or [count - 1])
    return frames, asked[-1]


X264 = {"g": "30", "bf": "2"}
X265 = {"x265-params": "log-level=none:pools=1"}
SVT_AV1 = {"g": "30", "svtav1-params": "lp=1"}
OPEN_GOP = {**X264, "x264-params": "open-gop=1:scenecut=0"}
BT709 = {**X264, "colorspace": "bt709", "color_range": "tv"}
LATE = [t + 1000 for t in range(96)]
STEPS = [t * 3 // 2 + t // 10 * 25 for t in range(96)]
SLOWING = [t * t // 8 + t for t in range(96)]
SECOND = [("libx264", moving_frames(20, 32, 32))]
KINDS = {
    "xvid-like.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.avi": {"codec": "libx264", "options": X264},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "long-gop.mp4": {"codec": "libx264", "options": {"g": "250", "bf": "3"}},
    "open-gop.mp4": {"codec": "libx264", "options": OPEN_GOP},
    "hevc.mp4": {"codec": "libx265", "options": {"g": "30", **X265}},
    "av1.mp4": {"codec": "libsvtav1", "options": SVT_AV1},
    "h264.mkv": {"codec": "libx264", "options": X264},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "30"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "30"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "h264.ts": {"codec": "libx264", "options": X264},
    "444.mp4": {"codec": "libx264", "pix_fmt": "yuv444p", "options": X264},
    "10-bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265},
    "12-bit.mkv": {"codec": "libx265", "pix_fmt": "yuv444p12le", "options": X265},
    "full-range.mp4": {"codec": "libx264", "pix_fmt": "yuvj420p", "options": X264},
    "bt709.mp4": {"codec": "libx264", "options": BT709},
    "late-start.mp4": {"codec": "libx264", "options": X264, "pts": LATE},
    "late-start.mkv": {"codec": "libx264", "options": X264, "pts": LATE},
    "variable-rate.mp4": {"codec": "libx264", "options": X264, "pts": STEPS},
    "variable-rate.mkv": {"codec": "libvpx-vp9", "options": {"g": "30"}, "pts": SLOWING},
    "audio-first.mp4": {"codec": "libx264", "options": X264, "before": [("aac", None)]},
    "two-videos.mp4": {"codec": "libx264", "options": X264, "extra": SECOND},
}


@pytest.fixture(scope="session")
def real_data():
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"])


def real_clips(real_data):
    return sorted(p for p in (real_data / "videos").iterdir() if p.suffix in tb.SUFFIXES)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with whole.avi and whole.mp4, of which the tests damage copies."""
    folder = tmp_path_factory.mktemp("intact")
    write_video(folder / "whole.avi", moving_frames(96), options={"g": "12"})
    write_video(folder / "whole.mp4", moving_frames(96), "libx264", options=X264)
    return folder


class TestDecoder:
    @pytest.mark.parametrize("name", KINDS)
    def test_frames_are_those_of_a_full_decode(self, name, tmp_path):
        path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
        expected = full_decode(path)
        assert len(expected) >= 95
        check_exact(path, expected)

    def test_frames_of_real_files_are_those_of_a_full_decode(self, real_data):
        paths = real_clips(real_data)
        assert {p.suffix for p in paths} == {".avi", ".mp4"}
        for path in paths:
            check_exact(path, full_decode(path))

    @pytest.mark.parametrize("name, most", [
        # from the keyframe before
        ("xvid-like.avi", 16), ("h264.mp4", 34), ("h264.mkv", 34), ("vp9.webm", 34),
        # counted from the start: no trial
        ("b-frames.avi", 64), ("h264.avi", 64), ("mpeg2.mpg", 64), ("mpeg2.ts", 64)])
    def test_no_more_is_decoded_than_must_be(self, name, most, tmp_path, monkeypatch):
        path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
        decode = tb.decode
        decoded = []

        def counted(*args):
            for frame in decode(*args):
                decoded.append(frame.pts)
                yield frame

        monkeypatch.setattr(tb, "decode", counted)
        frames = tb.decode_frames(path, range(60, 64))
        assert np.array_equal(frames.numpy(), full_decode(path)[60:64])
        assert len(decoded) == most if most == 64 else 4 <= len(decoded) <= most

    def test_short_side_scales_down_and_never_up(self, tmp_path):
        tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
        assert tb.decode_frames(tall, [3], short_side=32).shape == (1, 48, 32, 3)
        assert tb.decode_frames(tall, [3], short_side=200).shape == (1, 96, 64, 3)

    def test_pictures_are_scaled_not_cropped(self, tmp_path):
        tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
        small = tb.decode_frames(tall, range(20), short_side=32)
        full = tb.decode_frames(tall, range(20)).permute(0, 3, 1, 2)
        resized = torchvision.transforms.v2.functional.resize(full, [48, 32], antialias=True)
        assert (small.float() - resized.permute(0, 2, 3, 1).float()).abs().mean() < 4

    @pytest.mark.parametrize("codec, pix_fmt", [
        ("libx264", "yuv444p"), ("mjpeg", "yuvj420p"), ("libvpx-vp9", "yuv420p")])
    def test_odd_sizes(self, codec, pix_fmt, tmp_path):
        path = write_video(tmp_path / "odd.mkv", moving_frames(20, 47, 61), codec, pix_fmt)
        check_exact(path, full_decode(path))

    @pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"),
                        reason="PyAV 17.0 writes none")
    def test_phone_videos_are_turned_upright(self, tmp_path):
        frames = np.zeros((5, 48, 64, 3), np.uint8)
        frames[:, :12, :16] = 255  # top left
        corners = {90: (-1, 0), -90: (0, -1), 180: (-1, -1)}  # by degrees, counter-clockwise
        for degrees, corner in corners.items():
            path = write_video(tmp_path / f"{degrees}.mp4", frames, "libx264", rotation=degrees)
            frame = tb.decode_frames(path, [0])[0].numpy()
            assert frame.shape == ((48, 64, 3) if degrees == 180 else (64, 48, 3))
            assert frame[corner].min() > 200 and frame.mean() < 40

    @pytest.mark.parametrize("name, codec", [
        ("one.avi", "mpeg4"), ("one.mp4", "libx264"), ("one.webm", "libvpx-vp9")])
    def test_a_single_frame_is_a_video(self, name, codec, tmp_path):
        path = write_video(tmp_path / name, moving_frames(1), codec)
        clip = tb.decode_frames(path, lambda count: tb.clip_indices(count, 16, 2))
        assert clip.shape == (16, 48, 64, 3)
        with pytest.raises(IndexError):
            tb.decode_frames(path, [1])

    def test_a_truncated_avi_gives_what_is_left(self, intact, tmp_path):
        content = (intact / "whole.avi").read_bytes()
        path = tmp_path / "truncated.avi"
        path.write_bytes(content[:len(content) // 2])
        last, count = last_frame(path)
        assert 20 < count < 70
        assert last.shape == (1, 48, 64, 3)  # the very last frame may be half there
        expected = full_decode(intact / "whole.avi")
        assert np.array_equal(tb.decode_frames(path, range(10, 20)).numpy(), expected[10:20])

    def test_a_cut_mp4_gives_what_is_left(self, intact, tmp_path):
        content = (intact / "whole.mp4").read_bytes()
        path = tmp_path / "cut.mp4"  # the index, in front, promises more than is there
        path.write_bytes(content[:len(content) * 2 // 3])
        frames = tb.decode_frames(path, lambda count: [0, count // 2, count - 1])
        assert frames.shape == (3, 48, 64, 3)

    def test_a_hole_in_an_mp4_leaves_the_other_frames(self, intact, tmp_path):
        content = bytearray((intact / "whole.mp4").read_bytes())
        middle = len(content) // 2
        content[middle:middle + 400] = bytes(400)
        path = tmp_path / "holed.mp4"
        path.write_bytes(content)
        frames = tb.decode_frames(path, lambda count: [0, count - 1])
        assert np.array_equal(frames[0].numpy(), full_decode(intact / "whole.mp4")[0])

    def test_what_holds_no_video_raises_a_decode_error(self, intact, tmp_path):
        (tmp_path / "empty.avi").touch()
        (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
        (tmp_path / "text.avi").write_text("not a video\n" * 100)
        (tmp_path / "headless.mp4").write_bytes((intact / "whole.mp4").read_bytes()[1000:])
        (tmp_path / "folder.avi").mkdir()
        write_sound_with_cover(tmp_path / "sound.mp4")
        for name in ("empty.avi", "garbage.mp4", "text.avi", "headless.mp4", "folder.avi",
                     "absent.avi", "sound.mp4"):
            with pytest.raises(tb.DECODE_ERRORS):
                tb.decode_frames(tmp_path / name, [0])

    @pytest.mark.parametrize("name", [
        "http:, %d #1 [x](y)'s & co.avi", "-dash.avi", "pipe:0.avi", "späße;.avi", "a b?.avi",
        "no_ending"])
    def test_names_that_look_like_something_else(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_video(tmp_path / "plain.avi", moving_frames(3)).rename(tmp_path / name)
        for path in (name, tmp_path / name):
            assert tb.decode_frames(path, [2]).shape == (1, 48, 64, 3)


# ---- Augmentation, and what the network sees ---------------------------------------------------

def augmented(clip, *key):
    """Stage 1's augmentation, with the random numbers of a key."""
    return tb.augment_clips([clip], 24, [tb.draw(0, *key)])[0]


def one_by_one(clip, size, rng, area=0.3, jitter=0.4, hue=0.1, jitter_prob=0.8, grey_prob=0.2):
    """What augment_clips does, for one clip, in torchvision's words."""
    clip = clip.permute(0, 3, 1, 2)
    height, width = clip.shape[2:]
    pixels = rng.uniform(area, 1) * height * width
    ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    h = min(height, round(math.sqrt(pixels / ratio)))
    w = min(width, round(math.sqrt(pixels * ratio)))
    top = int(rng.integers(height - h + 1))
    left = int(rng.integers(width - w + 1))
    clip = TF.resized_crop(clip, top, left, h, w, [size, size], antialias=True)
    if rng.random() < 0.5:
        clip = TF.horizontal_flip(clip)
    if rng.random() < jitter_prob:
        changes = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        amounts = [*rng.uniform(1 - jitter, 1 + jitter, 3), rng.uniform(-hue, hue)]
        for k in rng.permutation(4):
            clip = changes[k](clip, float(amounts[k]))
    if rng.random() < grey_prob:
        clip = TF.rgb_to_grayscale(clip, num_output_channels=3)
    return clip


def smooth_clips(count):
    """Clips of several sizes in which neighbouring pixels are alike, as in pictures."""
    torch.manual_seed(0)
    clips = []
    for k in range(count):
        coarse = torch.randint(256, (4, 3, 5, 7 - k % 2)).float()
        clip = F.interpolate(coarse, scale_factor=8, mode="bilinear")
        clips.append(clip.permute(0, 2, 3, 1).to(torch.uint8))
    return clips


class CountedOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def still():
    """A clip in which nothing moves."""
    torch.manual_seed(0)
    return torch.randint(256, (1, 40, 56, 3), dtype=torch.uint8).expand(6, -1, -1, -1)


class TestAugmentation:
    def test_all_frames_of_a_clip_are_changed_alike(self, still):
        for k in range(20):
            clip = augmented(still, k)
            assert clip.shape == (6, 3, 24, 24) and clip.dtype == torch.uint8
            assert (clip == clip[:1]).all()

    def test_a_key_draws_always_the_same(self, still):
        for k in range(20):
            assert torch.equal(augmented(still, k), augmented(still, k))

    def test_every_key_draws_another_one(self, still):
        clips = [augmented(still, k) for k in range(20)]
        for i, a in enumerate(clips):
            assert all(not torch.equal(a, b) for b in clips[:i])

    @pytest.mark.parametrize("strength", [{}, tb.WEAK], ids=["strong", "weak"])
    def test_clips_together_are_changed_as_each_alone_by_torchvision(self, strength):
        clips = smooth_clips(60)
        together = tb.augment_clips(clips, 24, [tb.draw(0, k) for k in range(60)], **strength)
        for k, clip in enumerate(clips):
            alone = one_by_one(clip, 24, tb.draw(0, k), **strength)
            assert (together[k].int() - alone.int()).abs().max() <= 1, k

    def test_a_step_of_400_clips_takes_few_operations(self):
        """Each starts a kernel on a GPU, from the thread that starts the network's, too."""
        clip = torch.zeros(16, 40, 56, 3, dtype=torch.uint8)
        with CountedOperations() as counted:
            clips = tb.augment_clips([clip] * 400, 32, [tb.draw(0, k) for k in range(400)])
        assert len(counted.names) <= 2500
        model = tb.build_model("r3d_tiny", 2)
        with CountedOperations() as counted:
            tb.to_input(clips, model)
        assert len(counted.names) <= 12

    def test_centre_crop_takes_its_share_of_the_short_side(self, still):
        crop = tb.centre_crop(still, 20, 0.5)
        assert torch.equal(crop[0], still[0, 10:30, 18:38].permute(2, 0, 1))

    def test_the_network_s_input_is_normalised(self, still):
        crop = tb.centre_crop(still, 20, 0.5)
        model = tb.build_model("r3d_tiny", 2)
        x = tb.to_input([crop, crop], model)
        mean = model.mean.view(3, 1, 1, 1)
        std = model.std.view(3, 1, 1, 1)
        expected = (crop.permute(1, 0, 2, 3) / 255 - mean) / std
        assert x.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.allclose(x[1], expected, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            inside = tb.to_input([crop, crop], model)
        assert torch.equal(inside, x.bfloat16())  # rounded once


# ---- Which frames, which labels, which videos in a batch; the toy videos -----------------------

NAMES = [f"c{c}/v{i}.avi" for c, count in enumerate((3, 40, 101)) for i in range(count)]


def subset(percent, seed=0, order=slice(None)):
    """The names that labeled_subset chooses from NAMES."""
    names = NAMES[order]
    labels = np.array([int(name[1]) for name in names])
    return {names[i] for i in tb.labeled_subset(names, labels, percent, seed)}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    tb.render_toy(root, train=24, test=8)
    return root


MOMENTS = {"step": (tb.Meter, "add"), "similarity": (tb, "temporal_similarity"),
           "write": (tb, "write_atomically"), "encode": (tb, "encode_video")}


def signalled(moment, at, number, program, *argv):
    """In another process: run a program, which gets a signal when one of MOMENTS has come `at`
    times. Of torchrun's processes only the second gets it, and not after a restart."""
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)
    chosen = os.environ.get("RANK", "1") == "1"
    chosen = chosen and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    calls = []

    def counted(*args, **more):
        result = function(*args, **more)
        calls.append(1)
        if chosen and len(calls) == int(at):
            os.kill(os.getpid(), int(number))
        return result

    setattr(owner, name, counted)
    if program == "render_toy":
        tb.render_toy(argv[0], train=24, test=8)
    else:
        importlib.import_module(program).main(argv)


def run_here(function, *argv, seconds=300):
    """Run one of this file's functions in another process: a fork, which has torch loaded, unless
    there is a GPU, whose context no fork survives, or a fork server (Python 3.14)."""
    if torch.cuda.is_available() or multiprocessing.get_start_method() != "fork":
        command = [sys.executable, __file__, function.__name__, *map(str, argv)]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=seconds)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            become(function, argv, out, err)
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        out.seek(0)
        err.seek(0)
        status = os.waitstatus_to_exitcode(ended[1])
        return subprocess.CompletedProcess(function, status, out.read(), err.read())


def become(function, argv, out, err):
    """In a fork: run a function as a program, and end."""
    status = 1
    sys.stdout = out
    sys.stderr = err
    try:
        function(*map(str, argv))
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    out.flush()
    err.flush()
    os._exit(status or 0)


def batches(toy, epoch=0, step=0, **changes):
    """The Batch of each step of three epochs, or of those that are left.

    A batch is four of the videos 5 to 23, in a new order each epoch, and two of 0 to 4."""
    settings = {"seed": 0, "size": 16, "stride": 2, "workers": 0, "epochs": 3, **changes}
    pools = [tb.Pool(np.arange(5, 24), 4, False), tb.Pool(np.arange(5), 4, True)]
    source = tb.Batches(tb.read_videos("toy", toy, True), pools, 4, settings["seed"],
                        argparse.Namespace(**settings), torch.device("cpu"))
    return list(source.stream(epoch * source.steps + step, 3 * source.steps))


def assert_same_batches(some, others):
    for (frames, *rest), (other_frames, *other_rest) in zip(some, others, strict=True):
        assert rest == other_rest
        assert all(torch.equal(x, y) for x, y in zip(frames, other_frames, strict=True))


@pytest.fixture(scope="module")
def three_epochs(toy):
    return batches(toy)


class TestData:
    def test_a_clip_lies_where_its_position_says(self):
        assert tb.clip_indices(100, 4, 2, 0).tolist() == [0, 2, 4, 6]
        assert tb.clip_indices(100, 4, 2, 1).tolist() == [93, 95, 97, 99]
        assert tb.clip_indices(100, 3, 1, 0.5).tolist() == [49, 50, 51]

    def test_a_short_video_is_slowed_down_never_dropped(self):
        assert tb.clip_indices(5, 8, 1, 0.7).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
        assert tb.clip_indices(1, 3, 2).tolist() == [0, 0, 0]
        assert tb.clip_indices(14, 8, 2).tolist() == [0, 1, 3, 5, 7, 8, 10, 12]

    def test_short_videos_are_counted(self, toy, tmp_path):
        run_stage("inv", toy, tmp_path, "--stride", 5)  # two clips of 8 frames span 76
        videos = tb.read_videos("toy", toy, True)
        counts = [len(full_decode(videos.path(i))) for i in range(len(videos))]
        short = sum(count < 76 for count in counts)
        assert 0 < short < len(videos)
        assert [line["short"] for line in read_log(tmp_path, "inv")[1:]] == [short] * 2

    def test_every_start_of_a_clip_is_as_likely(self):
        positions = np.linspace(0, 1, 400, endpoint=False)
        starts = [tb.clip_indices(10, 4, 2, position)[0] for position in positions]
        assert np.bincount(starts).tolist() == [100] * 4

    def test_clips_for_evaluation_are_spaced_evenly(self):
        clips = tb.spaced_clips(200, clips=10, frames=8, stride=2).reshape(10, 8)
        assert clips[0, 0] == 0 and clips[-1, -1] == 199
        assert len(set(np.diff(clips[:, 0]))) <= 2
        middle = tb.spaced_clips(101, clips=1, frames=64, stride=1)
        assert middle.tolist() == list(range(19, 83))

    @pytest.mark.parametrize("percent", [1, 5, 10, 50, 100])
    def test_labelled_subset_has_its_share_of_each_class(self, percent):
        chosen = subset(percent)
        counts = [sum(name.startswith(f"c{c}/") for name in chosen) for c in range(3)]
        assert counts == [max(1, round(percent / 100 * n)) for n in (3, 40, 101)]

    @pytest.mark.parametrize("percent", [1, 5, 10, 50, 100])
    def test_labelled_subset_does_not_depend_on_the_order_of_names(self, percent):
        assert subset(percent) == subset(percent, order=slice(None, None, -1))

    def test_labelled_subsets_are_nested(self):
        assert subset(1) < subset(5) < subset(10) < subset(50) < subset(100) == set(NAMES)

    def test_labelled_subset_depends_on_the_seed(self):
        assert subset(5) != subset(5, seed=1)

    def test_labelled_subset_takes_no_video_without_a_class(self):
        assert tb.labeled_subset(["u/1.avi"], [-1], 100).tolist() == []

    def test_toy_set_is_balanced_and_its_parts_are_disjoint(self, toy):
        train = tb.read_videos("toy", toy, True)
        test = tb.read_videos("toy", toy, False)
        assert len(train) == 24 and len(test) == len(train.classes) == 8
        assert not set(train.names()) & set(test.names())
        assert np.bincount(train.labels).tolist() == [3] * 8

    def test_toy_videos_depend_on_the_seed_alone(self, toy, tmp_path):
        tb.render_toy(tmp_path, train=24, test=8)
        train = tb.read_videos("toy", toy, True)
        for i in range(24):
            again = tmp_path / "UCF-101" / train.name(i)
            assert Path(train.path(i)).read_bytes() == again.read_bytes()

    def test_toy_videos_have_the_promised_sizes(self, toy):
        train = tb.read_videos("toy", toy, True)
        for i in range(24):
            frames = tb.decode_frames(train.path(i), range)
            assert 64 <= len(frames) <= 96 and frames.shape[1:] == (40, 56, 3)

    def test_encoded_frames_look_like_those_drawn(self, tmp_path):
        drawn = tb.toy_clip(0, tb.draw(0, 5))
        tb.write_atomically(tmp_path / "one.avi", lambda file: tb.encode_video(file, drawn))
        # not equal: colour has half the size
        assert np.abs(full_decode(tmp_path / "one.avi") - drawn.astype(float)).mean() < 15

    def test_interrupted_rendering_goes_on(self, toy, tmp_path, monkeypatch):
        """Killed twice, then interrupted within a file: the same files, none rendered twice."""
        def files(root):
            return {p.relative_to(root) for p in root.rglob("*") if p.is_file()}

        for at, number in [(3, signal.SIGKILL), (5, signal.SIGTERM)]:  # two files, then four
            dead = run_here(signalled, "encode", at, int(number), "render_toy", tmp_path)
            assert dead.returncode != 0 and not (tmp_path / "toy.json").exists()
        left_by_kills = files(tmp_path) - files(toy)
        assert all(file.name.startswith(".") for file in left_by_kills)

        encode = tb.encode_video
        calls = []

        def interrupted(file, frames):
            calls.append(1)
            if len(calls) == 10:
                file.write(b"half")
                raise KeyboardInterrupt
            encode(file, frames)

        monkeypatch.setattr(tb, "encode_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tb.render_toy(tmp_path, train=24, test=8)
        assert not (tmp_path / "toy.json").exists()
        tb.render_toy(tmp_path, train=24, test=8)
        assert len(calls) == 32 - 2 - 4 + 1
        assert files(tmp_path) - left_by_kills == files(toy)
        for file in files(toy):
            assert (toy / file).read_bytes() == (tmp_path / file).read_bytes()

    def test_workers_change_no_batch(self, toy, three_epochs):
        assert len(three_epochs) == 12
        assert_same_batches(three_epochs, batches(toy, workers=2))

    def test_batches_go_on_in_the_middle_of_an_epoch(self, toy, three_epochs):
        assert_same_batches(three_epochs[6:], batches(toy, epoch=1, step=2, workers=1))

    def test_batches_depend_on_the_seed(self, toy, three_epochs):
        assert batches(toy, seed=1)[0][1] != three_epochs[0][1]

    def test_no_video_is_twice_in_a_batch(self, three_epochs):
        """Eq. 1 would take a second clip of a video for a negative."""
        for batch in three_epochs:
            assert len(set(batch.ids[:4])) == 4 and min(batch.ids[:4]) >= 5 > max(batch.ids[4:])

    def test_an_epoch_passes_no_video_twice(self, three_epochs):
        for epoch in range(3):
            passed = []
            for batch in three_epochs[4 * epoch:4 * epoch + 4]:
                passed += batch.ids[:4]
            assert len(set(passed)) == 16

    def test_labelled_videos_cycle_pass_after_pass(self, three_epochs):
        cycled = []
        for batch in three_epochs:
            cycled += batch.ids[4:]
        assert all(sorted(cycled[i:i + 5]) == list(range(5)) for i in range(0, 45, 5))

    def test_no_two_clips_share_their_draws(self, three_epochs):
        keys = []
        for batch in three_epochs:
            keys += batch[2]
        assert len(set(keys)) == len(keys)


    def test_little_shared_memory_is_told(self, toy, monkeypatch):
        """In a container of the usual 64 MB a decoding process would end by a bus error."""
        videos = tb.read_videos("toy", toy, True)
        args = argparse.Namespace(size=224, stride=1, workers=16)
        pool = tb.Pool(np.arange(24), 24, False)
        source = tb.Batches(videos, [pool], 64, 0, args, torch.device("cpu"))
        little = SimpleNamespace(total=64 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.warns(UserWarning, match="--shm-size 2g"):
            source.check_shared_memory(48)
        little.total = 8 << 30
        source.check_shared_memory(48)

    def test_the_first_process_alone_writes_the_labelled_list(self, toy, tmp_path, monkeypatch):
        args = argparse.Namespace(data="ucf101", root=toy, split=1, pool="train", out=tmp_path,
                                  labeled_list=None, percent=10, subset_seed=0)
        monkeypatch.setattr(tb, "rank", lambda: 1)
        tb.labeled_and_all_videos(args)
        assert not list(tmp_path.iterdir())


# ---- The public data sets, as their archives and lists unpack ----------------------------------

def rows(file):
    return [line for line in file.read_text().splitlines() if line.strip()]


def stand_in(folder, names):
    """Empty files under the names of a data set's videos."""
    for top in {os.path.dirname(name) for name in names}:
        (folder / top).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture(scope="session")
def ucf101(real_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf101")
    shutil.copytree(real_data / "splits/ucfTrainTestlist", root / "ucfTrainTestlist")
    names = set()
    for file in root.glob("ucfTrainTestlist/*list0*.txt"):
        names |= {line.split()[0] for line in rows(file)}
    stand_in(root / "UCF-101", names)
    return root


@pytest.fixture(scope="session")
def hmdb51(real_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("hmdb51")
    lists = "testTrainMulti_7030_splits"
    shutil.copytree(real_data / "splits" / lists, root / lists)
    for file in root.glob("testTrain*/*_test_split1.txt"):
        folder = root / "hmdb51_org" / file.name[:-16]
        stand_in(folder, [line.rsplit(maxsplit=1)[0] for line in rows(file)])
    return root


@pytest.fixture(scope="module")
def kinetics400(real_data, tmp_path_factory):
    """A folder in which five of the listed videos lie among those for testing; and the list."""
    root = tmp_path_factory.mktemp("kinetics400")
    folder = real_data / "splits/videossl/kinetics400"
    path = folder / "kinetics400_train_1_percent_labeled_videos.txt"
    names = []
    for i, line in enumerate(rows(path)):
        label, name = line.split()[0].split("/")
        suffix = (".mkv", ".webm", ".mp4")[i % 3]  # copies mix formats
        names.append(f"{label.replace('_', ' ')}/{name[:-4]}{suffix}")
    stand_in(root / "train", names[5:])
    stand_in(root / "val", names[:5] + ["baking cookies/-dash.mp4"])
    (root / "train/baking cookies/folder.mp4").mkdir()
    (root / "train/baking cookies/notes.txt").touch()
    return root, path


@pytest.fixture(scope="class", params=[
    ("ucf101", 5, 476), ("ucf101", 10, 953), ("ucf101", 20, 1907), ("ucf101", 50, 4768),
    ("hmdb51", 40, 2094), ("hmdb51", 50, 2618), ("hmdb51", 60, 3141)],
    ids=lambda param: f"{param[0]}-{param[1]}")
def published(request, real_data, tmp_path_factory):
    """What a stage makes of a published list: which videos are labelled, and what it prints."""
    data, percent, count = request.param
    root = request.getfixturevalue(data)
    path = real_data / "splits/videossl" / data / "videossl_splits"
    path /= f"{data}_train_{percent}_percent_labeled_split_1_rawframes.txt"
    args = argparse.Namespace(data=data, root=root, split=1, pool="all", labeled_list=path,
                              out=tmp_path_factory.mktemp("out"))
    with (contextlib.redirect_stdout(io.StringIO()) as text,
          warnings.catch_warnings(record=True) as caught):
        warnings.simplefilter("always")
        labeled, videos = tb.labeled_and_all_videos(args)
    text = text.getvalue() + "".join(str(warning.message) for warning in caught)
    return SimpleNamespace(data=data, percent=percent, count=count, videos=videos, labeled=labeled,
                           listed=[line.split()[0] for line in rows(path)], text=text)


def small_tree(data, root):
    """A data set of two classes, two videos each for training and one for testing, as its scripts
    read it; a video's file holds its name -> root."""
    files = {}
    for c in ("brush hair" if data == "kinetics400" else "brush_hair", "wave"):
        videos = [f"{c}/v_{c}_{k}.avi" for k in range(3)]
        if data == "ucf101":
            files |= {f"UCF-101/{video}": video for video in videos}
        elif data == "hmdb51":
            files |= {f"hmdb51_org/{video}": video for video in videos}
            lines = [f"{os.path.basename(v)} {code} \n" for v, code in zip(videos, "112")]
            files[f"testTrainMulti_7030_splits/{c}_test_split1.txt"] = "".join(lines)
        else:
            test = "test" if data == "folder" else "val"
            for part, video in zip(("train", "train", test), videos):
                files[f"{part}/{video[:-4]}.mp4"] = video
    if data == "ucf101":
        files["ucfTrainTestlist/classInd.txt"] = "1 brush_hair\n2 wave\n"
        for part, wanted in [("train", "01"), ("test", "2")]:
            lines = [f"{c}/v_{c}_{k}.avi\n" for c in ("brush_hair", "wave") for k in wanted]
            files[f"ucfTrainTestlist/{part}list01.txt"] = "".join(lines)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def contents_of(data, root):
    """What the training and test videos are, whatever their names."""
    contents = []
    for train in (True, False):
        videos = tb.read_videos(data, root, train)
        files = [Path(videos.path(i)).read_text() for i in range(len(videos))]
        contents.append((videos.classes, sorted(zip(files, videos.labels.tolist()))))
    return contents


def refusal(data, root):
    """The line that says why a root cannot be read; None if it can."""
    try:
        contents_of(data, root)
    except tb.UserError as error:
        return str(error)


def pack(path, top, pattern):
    """An archive of the files of a folder; the endings .rar and .tar.gz stand for what they say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(top.glob(pattern)):
            archive.write(file, file.relative_to(top))


def make_archives(data, root, folder, form="folders"):
    """What the sites of a data set would give for the tree under root."""
    if data == "ucf101":
        pack(folder / "UCF101.rar", root, "UCF-101/*/*")
        pack(folder / "UCF101TrainTestSplits-RecognitionTask.zip", root, "ucfTrainTestlist/*")
    elif data == "hmdb51":
        classes = folder / "classes"
        for c in os.listdir(root / "hmdb51_org"):
            pack(classes / f"{c}.rar", root / "hmdb51_org", f"{c}/*")
            shutil.copy(classes / f"{c}.rar", classes / f"{c}.zip")
        pack(folder / "hmdb51_org.rar", classes, "*.rar")
        if form == "folders":
            pack(folder / "hmdb51_org.zip", root, "hmdb51_org/*/*")
        else:
            pack(folder / "hmdb51_org.zip", classes, form)
        pack(folder / "test_train_splits.zip", root, "testTrainMulti_7030_splits/*")
    elif data == "kinetics400":
        make_flat_kinetics(root, folder, corrupt=form == "corrupt")


def make_flat_kinetics(root, folder, corrupt):
    """The archives of Kinetics400 and the scripts that fetch and unpack them.

    corrupt: so is the training video that is among the replacements."""
    flat = folder / "flat"
    for part in ("train", "val"):
        (flat / part).mkdir(parents=True)
        rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for k, video in enumerate(sorted((root / part).glob("*/*"))):
            name = f"{part:-<5}{k:06d}"
            shutil.copy(video, flat / part / f"{name}_000001_000011.mp4")
            rows.append(f'"{video.parent.name}",{name},1,11,{part},0')
        (folder / f"{part}.csv").write_text("\n".join(rows))
    replaced = flat / "replacement_for_corrupted_k400/train000000_000001_000011.mp4"
    replaced.parent.mkdir()
    shutil.copy(flat / "train" / replaced.name, replaced)
    if corrupt:
        (flat / "train" / replaced.name).write_text("corrupt")
    targz = folder / "k400_targz"
    pack(targz / "train/part_0.tar.gz", flat / "train", "*")
    pack(targz / "val/part_0.tar.gz", flat / "val", "*")
    pack(targz / "replacement/r.tgz", flat, "replacement*/*")
    scripts = folder / "kinetics-dataset"
    scripts.mkdir()
    (scripts / "k400_downloader.sh").write_text(
        "mkdir -p k400/annotations; cp -r $ARCHIVES/k400_targz .; "
        "cp $ARCHIVES/*.csv k400/annotations")
    (scripts / "k400_extractor.sh").write_text(
        "for s in train val replacement; do mkdir k400/$s; "
        "tar xf k400_targz/$s/*gz -C k400/$s; done")


# In the place of these programs: no network, and rar and tar files that are zip files.
UNPACKER = """
args=()
for a in "$@"; do case $a in -*|x|xf) ;; *) args+=("$a");; esac; done
exec PYTHON -m zipfile -e "${args[0]}" "${args[1]:-.}"
"""
PROGRAMS = {"unrar": UNPACKER, "unzip": UNPACKER, "tar": UNPACKER, "wget": """
to=.
while [ $# -gt 0 ]; do
    case $1 in -O) to=$2; shift;; -*) ;; *) cp "$ARCHIVES/${1##*/}" $to || exit;; esac
    shift
done
""", "git": """cp -r "$ARCHIVES/${2##*/}" .""", "ffmpeg": """
while [ $# -gt 1 ]; do [ $1 = -i ] && input=$2; shift; done
cp "$input" "$1"
"""}


def run_lines(lines, folder):
    """Runs lines of a shell in a folder, with folder/archives for the net."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text("#!/bin/bash\n" + text.replace("PYTHON", sys.executable))
        (programs / name).chmod(0o755)
    env = os.environ | {"ARCHIVES": str(folder / "archives"),
                        "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", lines], cwd=folder, env=env, check=True)


def readme_lines(data):
    """The README's lines that get a data set."""
    text = Path(__file__).with_name("README.md").read_text()
    blocks = [block for block in text.split("```\n")[1::2] if block.startswith("mkdir -p data")]
    return next(block for block in blocks if f"data/{data}\n" in block or f"data/{data} " in block)


STATES = {  # how a root comes about that cannot be read, from a whole one; and which it is
    "ucf101": {
        "archives": ("rm -r root/*; cp archives/* root", "root"),
        "lists archived": ("rm -r root/ucf*; cp archives/* root", "root"),
        "folder of the videos": ("", "root/UCF-101"),
        "level above": ("mkdir up; mv root up", "up"),
        "level too deep": ("mv root/UCF-101 x; mkdir root/UCF-101; mv x root/UCF-101/UCF-101",
                           "root"),
        "classes in the root": ("mv root/UCF-101/* root; rmdir root/UCF-101", "root")},
    "hmdb51": {
        "archives of classes": (
            "rm -r root/hmdb51_org/*; cp archives/classes/*.rar root/hmdb51_org", "root"),
        "archives of classes in the root": (
            "rm -r root/hmdb51_org; cp archives/classes/*.rar root", "root"),
        "archive of archives": ("rm -r root/*; cp archives/*.rar archives/test*.zip root", "root"),
        "archives": ("rm -r root/*; cp archives/*.zip root", "root")},
    "kinetics400": {
        "flat": ("rm -r root/*; cp -r archives/flat/{train,val} root", "root"),
        "archives": ("rm -r root/*; cp -r archives/k400_targz/* root", "root"),
        "folder of a part": ("", "root/train"),
        "level above": ("mkdir up; mv root up/videos", "up")},
    "folder": {"folder of a part": ("", "root/train")}}


def ucf101_with_ten_missing(root):
    """A list of 200 videos, of which the first ten are not there -> names of those that are."""
    names = [f"Ring/v{i}.avi" for i in range(200)]
    stand_in(root / "UCF-101", names[10:])
    (root / "ucfTrainTestlist").mkdir()
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 Ring\r\n")
    lines = "".join(f"{name} 1\r\n" for name in names)
    (root / "ucfTrainTestlist/trainlist01.txt").write_text(lines)
    return names[10:]


class TestArchives:
    @pytest.mark.parametrize("split, in_train, in_test", [
        (1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
    def test_ucf101_has_its_official_splits(self, split, in_train, in_test, ucf101):
        train = tb.read_videos("ucf101", ucf101, True, split)
        test = tb.read_videos("ucf101", ucf101, False, split)
        assert (len(train), len(test)) == (in_train, in_test) and len(train.classes) == 101
        assert not set(train.names()) & set(test.names())
        assert train.labels.min() == 0 and train.labels.max() == 100 == test.labels.max()
        assert all(Path(train.path(i)).exists() for i in range(0, len(train), 100))

    def test_ucf101_s_folder_spelt_otherwise_than_its_files(self, ucf101):
        train = tb.read_videos("ucf101", ucf101, True, 3)
        prefix = "HandstandPushups/v_HandStandPushups_"
        handstand = [i for i, name in enumerate(train.names()) if name.startswith(prefix)]
        assert len(handstand) > 50
        assert {train.classes[train.labels[i]] for i in handstand} == {"HandstandPushups"}

    @pytest.mark.parametrize("data, state", [
        (data, state) for data, states in STATES.items() for state in states])
    def test_a_root_in_another_state_is_told_what_mends_it(self, data, state, tmp_path):
        """Archives, or a level too many or too few: one line that ends in what mends it, again
        until all is well."""
        want = small_tree(data, tmp_path / "whole/root")
        make_archives(data, want, tmp_path / "archives")
        shutil.copytree(want, tmp_path / "root")
        make, root = STATES[data][state]
        run_lines(make, tmp_path)
        root = tmp_path / root
        told = []
        while line := refusal(data, root):
            assert "\n" not in line and line not in told
            told.append(line)
            mend = line.rsplit(": ", 1)[1]
            if mend.startswith("give --root "):
                root = Path(mend.removeprefix("give --root "))
            else:
                run_lines(mend, tmp_path)
        assert told and contents_of(data, root) == contents_of(data, want)

    @pytest.mark.parametrize("data, files, words", [
        ("kinetics400", ["a/x.mp4"], "ROOT has no train; it holds a: the README"),
        ("folder", ["train/a/x.txt"], "ROOT/train: no training videos; it holds a: the README"),
        ("hmdb51", ["hmdb51_org/x/y.avi"], "no testTrainMulti_7030_splits; it holds hmdb51_org: "),
        ("ucf101", [], "no UCF-101 and no ucfTrainTestlist; it holds nothing: the README shows")])
    def test_a_root_that_no_command_mends_is_told(self, data, files, words, tmp_path):
        stand_in(tmp_path, files)
        assert words.replace("ROOT", str(tmp_path)) in refusal(data, tmp_path)

    @pytest.mark.parametrize("data, form", [
        ("ucf101", ""), ("hmdb51", "folders"), ("hmdb51", "*.rar"), ("hmdb51", "*.zip"),
        ("kinetics400", "corrupt")])
    def test_the_readme_s_lines_make_the_tree(self, data, form, tmp_path):
        """Whatever the form in which HMDB51's mirrors have the classes in hmdb51_org.zip."""
        want = small_tree(data, tmp_path / "want")
        make_archives(data, want, tmp_path / "archives", form)
        run_lines(readme_lines(data), tmp_path)
        assert contents_of(data, tmp_path / "data" / data) == contents_of(data, want)

    def test_flat_kinetics_is_what_its_csv_files_say(self, tmp_path):
        """Some copies lack start and end. A training video that the other table alone has is left
        out: its label would be one of a test video."""
        stand_in(tmp_path, ["train/-abcdefghij_000001_000011.mp4", "train/0123456789a.mp4",
                            "train/unknown-id1_000001_000011.mp4", "train/bbbbbbbbbbb.mp4",
                            "val/bbbbbbbbbbb_000005_000015.mp4"])
        (tmp_path / "annotations").mkdir()
        header = "label,youtube_id,time_start,time_end,split,is_cc\n"
        (tmp_path / "annotations/train.csv").write_text(
            header + "baking cookies,-abcdefghij,1,11,train,0\narchery,0123456789a,2,12,train,0\n"
            "crying,not-present,2,12,train,0\n")
        (tmp_path / "annotations/val.csv").write_text(
            header + '"baking cookies",bbbbbbbbbbb,5,15,val,0\n')
        with pytest.warns(UserWarning, match="2 of 4 videos in .*train are in no row of train.csv"):
            train = tb.read_videos("kinetics400", tmp_path, True)
        test = tb.read_videos("kinetics400", tmp_path, False)
        assert train.names() == ["train/-abcdefghij_000001_000011.mp4", "train/0123456789a.mp4"]
        assert train.classes == test.classes == ["archery", "baking cookies", "crying"]
        assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [1]

        (tmp_path / "list.txt").write_text("archery/0123456789a.mp4 0\n")
        assert tb.read_labeled_list(tmp_path / "list.txt", train).tolist() == [1]

    @pytest.mark.parametrize("text", ["", "<html>\nNot found\n", "label,id\narchery,x\n"])
    def test_a_csv_file_of_another_form_is_refused(self, text, tmp_path):
        stand_in(tmp_path, ["train/0123456789a.mp4", "annotations/train.csv"])
        (tmp_path / "annotations/train.csv").write_text(text)
        with pytest.raises(tb.UserError, match="train.csv no columns label and youtube_id: "):
            tb.read_videos("kinetics400", tmp_path, True)

    def test_archives_left_beside_what_they_held_are_no_error(self, tmp_path):
        small_tree("hmdb51", tmp_path)
        stand_in(tmp_path, ["hmdb51_org.rar", "hmdb51_org/wave.rar"])
        assert len(tb.read_videos("hmdb51", tmp_path, True)) == 4

    def test_hmdb51_has_its_official_split(self, hmdb51):
        train = tb.read_videos("hmdb51", hmdb51, True)
        test = tb.read_videos("hmdb51", hmdb51, False)
        assert (len(train), len(test)) == (3570, 1530) and len(train.classes) == 51
        assert np.bincount(train.labels).tolist() == [70] * 51
        assert np.bincount(test.labels).tolist() == [30] * 51
        for videos in (train, test):
            for i in range(len(videos)):
                assert os.path.exists(videos.path(i))
                assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]

    def test_hmdb51_s_pool_is_all_but_the_test_videos(self, hmdb51):
        train = tb.read_videos("hmdb51", hmdb51, True)
        test = tb.read_videos("hmdb51", hmdb51, False)
        everything = tb.read_videos("hmdb51", hmdb51, True, pool="all")
        assert len(everything) == 5236
        assert set(train.names()) < set(everything.names())
        assert not set(everything.names()) & set(test.names())

    def test_hmdb51_s_odd_names_are_read(self, hmdb51):
        names = tb.read_videos("hmdb51", hmdb51, True).names()
        assert any(set("!#&()[];+~@") & set(name) for name in names)

    def test_kinetics400_is_what_lies_in_its_folders(self, kinetics400):
        root, path = kinetics400
        train = tb.read_videos("kinetics400", root, True)
        test = tb.read_videos("kinetics400", root, False)
        assert len(train) == len({line.split()[0] for line in rows(path)}) - 5
        assert len(test) == 6 and test.classes == train.classes

    def test_kinetics400_s_published_list_fits_other_suffixes(self, kinetics400):
        root, path = kinetics400
        videos = tb.read_videos("kinetics400", root, True)
        with pytest.warns(UserWarning, match="5 rows name no training video"):
            assert len(tb.read_labeled_list(path, videos)) == len(videos)

    def test_published_list_chooses_the_videos_it_names(self, published):
        videos = published.videos
        assert len(published.labeled) == published.count == len(set(published.listed))
        names = {os.path.splitext(videos.name(i))[0] for i in published.labeled}
        assert names == set(published.listed)

    def test_published_list_s_videos_have_the_label_of_their_folder(self, published):
        videos = published.videos
        for i in published.labeled:
            assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]

    def test_published_list_hides_all_other_labels(self, published):
        assert (np.delete(published.videos.labels, published.labeled) == -1).all()

    def test_published_list_is_reported_with_its_oddities(self, published):
        text = published.text
        counts = f"{published.count} of {len(published.videos)}"
        assert f"{counts} training videos have a label" in text
        without = (published.data, published.percent) == ("ucf101", 5)
        assert ("no labelled video of CliffDiving" in text) == without
        odd = re.findall(r"the label of (\d+) rows contradicts", text)
        assert (54 <= int(odd[0]) <= 73) if published.data == "hmdb51" else not odd

    def test_labelled_lists_of_other_forms_are_read(self, toy, tmp_path):
        videos = tb.read_videos("toy", toy, True)
        names = videos.names()[:6]
        lines = []
        for i, name in enumerate(names[:5]):
            lines.append(f"/home/someone/UCF 101/{name} {videos.labels[i] + 1}")
        lines += [f"{names[5][:-4]} 80 {videos.labels[5] + 1}", "", "Nowhere/v_x.avi 3"]
        (tmp_path / "list.txt").write_text("\r\n".join(lines))
        with pytest.warns(UserWarning, match="1 rows name no training video"):
            labeled = tb.read_labeled_list(tmp_path / "list.txt", videos)
        assert labeled.tolist() == list(range(6))

    def test_a_list_that_names_no_video_is_refused(self, toy, tmp_path):
        (tmp_path / "empty.txt").write_text("Nowhere/v_x.avi 3\n")
        with (pytest.raises(tb.UserError, match="empty.txt"),
              pytest.warns(UserWarning, match="1 rows name no training video")):
            tb.read_labeled_list(tmp_path / "empty.txt", tb.read_videos("toy", toy, True))

    def test_a_few_missing_files_are_counted(self, tmp_path):
        ucf101_with_ten_missing(tmp_path)
        with pytest.warns(UserWarning, match="10 of 200 listed videos are not in"):
            assert len(tb.read_videos("ucf101", tmp_path, True)) == 190

    def test_too_many_missing_files_are_refused(self, tmp_path):
        present = ucf101_with_ten_missing(tmp_path)
        (tmp_path / "UCF-101" / present[0]).unlink()
        with pytest.raises(tb.UserError, match="11 of 200 .*Ring/v0.avi"):
            tb.read_videos("ucf101", tmp_path, True)

    def test_a_folder_of_one_s_own(self, tmp_path):
        stand_in(tmp_path, [
            "train/b/2.MP4", "train/b/1.mov", "train/a a/#1.avi", "train/b/.hidden",
            "test/b/3.webm", "unlabeled/x.mkv", "unlabeled/deep/er/y (1).avi",
            "unlabeled/readme.md"])
        train = tb.read_videos("folder", tmp_path, True)
        test = tb.read_videos("folder", tmp_path, False)
        assert train.names() == ["train/a a/#1.avi", "train/b/1.mov", "train/b/2.MP4",
                                 "unlabeled/deep/er/y (1).avi", "unlabeled/x.mkv"]
        assert train.labels.tolist() == [0, 1, 1, -1, -1]
        assert train.classes == ["a a", "b"] == test.classes
        assert test.names() == ["test/b/3.webm"] and test.labels.tolist() == [1]


# ---- The chain of stages, on a tiny toy set ----------------------------------------------------

TINY = ("--size 16 --frames 8 --epochs 2 --batch 4 --precision fp32 --device cpu --workers 0 "
        "--warmup 1").split()
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


def run_chain(root, out):
    for stage in STAGES:
        run_stage(stage, root, out)
    evaluate.main([str(out), *EVALUATE])


def load(out, name):
    return torch.load(Path(out) / f"{name}.pt", weights_only=True)


def read_log(out, name):
    """The log's lines: where the weights come from, then one an epoch."""
    return [json.loads(line) for line in (Path(out) / f"{name}.log").read_text().splitlines()]


def read_results(out):
    return json.loads((Path(out) / "results.json").read_text())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_checkpoints(a, b, names=CHECKPOINTS):
    for name in names:
        x = load(a, name)
        y = load(b, name)
        for key in x.keys() - {"args"}:
            assert same(x[key], y[key]), (name, key)


@pytest.fixture(scope="session")
def chain(toy, tmp_path_factory):
    """The folder in which all stages and the evaluation have left their files."""
    out = tmp_path_factory.mktemp("chain")
    run_chain(toy, out)
    return out


def small_ucf101(splits):
    """Names of videos of four classes, three for training and one for testing, and their lists."""
    classes = rows(splits / "ucfTrainTestlist/classInd.txt")[:4]
    lists = {"ucfTrainTestlist/classInd.txt": classes}
    names = []
    for part, count in [("train", 3), ("test", 1)]:
        file = f"ucfTrainTestlist/{part}list01.txt"
        lists[file] = []
        for line in classes:
            prefix = line.split()[1] + "/"
            lists[file] += [row for row in rows(splits / file) if row.startswith(prefix)][:count]
        names += [f"UCF-101/{row.split()[0]}" for row in lists[file]]
    return names, lists


def small_hmdb51(splits):
    names = []
    lists = {}
    for path in sorted((splits / "testTrainMulti_7030_splits").glob("*_test_split1.txt"))[:4]:
        kept = []
        for code, count in [("1", 3), ("2", 1)]:
            kept += [row for row in rows(path) if row.split()[1] == code][:count]
        lists[f"testTrainMulti_7030_splits/{path.name}"] = kept
        names += [f"hmdb51_org/{path.name[:-16]}/{row.split()[0]}" for row in kept]
    return names, lists


def small_folders(test, suffixes):
    names = []
    for name in ("baking cookies", "it's (2)", "c", "d"):
        for part, count in [("train", 3), (test, 1)]:
            names += [f"{part}/{name}/-x{i}{suffixes[i % len(suffixes)]}" for i in range(count)]
    return names


def tree_of_real_clips(data, real_data, root):
    """A small data set in its official layout: real clips, names and lists of the official ones."""
    clips = real_clips(real_data)
    lists = {}
    if data == "ucf101":
        clips = [p for p in clips if p.name.startswith("v_")]
        names, lists = small_ucf101(real_data / "splits")
    elif data == "hmdb51":
        clips = [p for p in clips if not p.name.startswith("v_")]
        names, lists = small_hmdb51(real_data / "splits")
    elif data == "kinetics400":
        names = small_folders("val", [".mp4"])
    else:
        names = small_folders("test", [".avi", ".mp4"])
        names += ["unlabeled/deep/er/a.avi", "unlabeled/b.avi"]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        alike = [p for p in clips if p.suffix == Path(name).suffix]
        shutil.copy(alike[i % len(alike)], root / name)
    for name, lines in lists.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\r\n".join(lines) + "\r\n")


class TestChain:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_checkpoints_are_finished_and_fit_the_network(self, name, chain):
        saved = load(chain, name)
        assert saved["finished"] and saved["epoch"] == 2 and len(saved["classes"]) == 8
        tb.build_model("r3d_tiny", 8).load_state_dict(saved["model"])  # strict: the head is apart

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_logs_hold_versions_and_each_epoch(self, name, chain):
        first, *epochs = read_log(chain, name)
        assert first["torch"] == torch.__version__
        assert [line["epoch"] for line in epochs] == [1, 2]

    @pytest.mark.parametrize("name, levels", [
        ("inv", {"loss": 7}),  # the same clip of the 3 other videos, the other one of all 4
        ("dist", {"l_d1": 3, "l_d2": 2})])
    def test_logs_tell_the_level_of_chance(self, name, levels, chain):
        for line in read_log(chain, name)[1:]:
            chance = {key: value for key, value in line.items() if key.endswith("_chance")}
            assert chance == {f"{key}_chance": pytest.approx(math.log(candidates), abs=1e-6)
                              for key, candidates in levels.items()}

    def test_a_stage_1_that_has_learnt_nothing_says_so(self):
        levels = {"l_d1": 2.0}
        with pytest.warns(UserWarning, match="l_d1 ends at 1.910, chance is 2.000.*--batch"):
            numbers = tb.beside_chance({"l_d1": 1.91, "lr": 1}, levels, True)
        assert numbers == {"l_d1": 1.91, "l_d1_chance": 2.0, "lr": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tb.beside_chance({"l_d1": 1.89}, levels, True)
            tb.beside_chance({"l_d1": 1.91}, levels, False)

    def test_nearest_neighbours_of_labelled_videos(self, chain, toy):
        """Against a loop, on the features of stage 1."""
        videos = tb.read_videos("toy", toy, True)
        ids = np.arange(16)
        backbone = tb.build_model("r3d_tiny", 8)
        backbone.load_state_dict(load(chain, "inv")["model"])
        args = argparse.Namespace(size=16, frames=8, stride=2, batch=4, workers=0,
                                  precision="fp32")
        share = tb.nearest_neighbours(backbone, videos, ids, args, torch.device("cpu"))
        features = []
        for i in ids:
            frames = full_decode(videos.path(i))
            clip = tb.decode_frames(videos.path(i), (len(frames) - 14) // 2 + 2 * np.arange(8), 20)
            with torch.no_grad():
                x = tb.to_input([tb.centre_crop(clip, 16)], backbone)
                features.append(backbone.features(x)[0].mean(1))
        right = 0
        for i in ids:
            others = [j for j in ids if j != i]
            nearest = max(others, key=lambda j: F.cosine_similarity(features[i], features[j], 0))
            right += videos.labels[nearest] == videos.labels[i]
        assert 0 < right < 16 and share == right / 16

    @pytest.mark.parametrize("name", ["inv", "dist", "inv_ft", "dist_ft"])
    def test_teachers_carry_each_video_s_similarity(self, name, chain):
        saved = load(chain, name)
        assert saved["similarity"].shape == (24, 2, 2) and len(saved["similarity_of"]) == 24

    def test_the_student_s_log_tells_its_loss_terms(self, chain):
        terms = {"l_sup", "l_unsup", "l_unsup_labeled", "weight_inv", "clamped", "agreement"}
        assert terms <= read_log(chain, "student")[-1].keys()

    def test_the_labelled_videos_are_listed(self, chain, toy):
        labeled = [line.split() for line in (chain / "labeled.txt").read_text().splitlines()]
        classes = tb.read_videos("toy", toy, True).classes
        assert len(labeled) == 8
        assert all(classes[int(label)] == name.split("/")[0] for name, label in labeled)

    def test_every_classifier_is_evaluated(self, chain):
        results = read_results(chain)
        assert [r["checkpoint"] for r in results] == EVALUATED
        for r in results:
            assert r["videos"] == 8 and r["labeled_count"] == 8
            assert 0 <= r["top1"] <= r["top5"] <= 100
            # one test video a class
            assert r["top1"] == pytest.approx(np.mean(list(r["per_class"].values())))

    def test_every_command_of_the_ablations_table_runs_in_order(self, chain, toy, tmp_path):
        """Pasted one after the other into one folder: none is refused, each writes its own file."""
        for name in ("inv", "dist", "inv_ft", "dist_ft", "student"):  # the first line's
            shutil.copy(chain / f"{name}.pt", tmp_path)
        scripts = {"pretrain_inv.py": pretrain_inv, "pretrain_dist.py": pretrain_dist,
                   "finetune.py": finetune, "train_student.py": train_student}
        text = (HERE / "figures" / "README.md").read_text()
        rows = re.findall(r"^\| \d \(?.*?$", text, re.M)
        commands = []
        for row in rows:
            commands += re.findall(r"`(\w+\.py [^`]*)`", row)
        assert len(rows) == 21 and len(commands) == 28
        for command in commands:
            script, *flags = command.split()
            if script.startswith("pretrain") and "--clips" not in flags:
                flags += ["--clips", "2"]
            before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
            scripts[script].main([*TINY, "--root", str(toy), "--out", str(tmp_path), *flags])
            assert before.items() <= {
                path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}.items()
        assert len(list(tmp_path.glob("*.pt"))) == 5 + 28 - 2  # two teachers were there

    def test_label_firewall(self, chain, toy, tmp_path, monkeypatch):
        """Labels that no stage may use are replaced, and nothing changes: of unlabelled videos
        once the subset is drawn, of all test videos."""
        hide = tb.Videos.hide_labels
        read = tb.read_videos

        def nonsense(videos, keep=()):
            before = videos.labels.copy()
            hide(videos, keep)
            videos.labels[videos.labels == -1] = (before[videos.labels == -1] + 3) % 8

        def shuffled_test_labels(data, root, train, *rest):
            videos = read(data, root, train, *rest)
            if not train:
                videos.labels = np.roll(videos.labels, 1)
            return videos

        monkeypatch.setattr(tb.Videos, "hide_labels", nonsense)
        monkeypatch.setattr(tb, "read_videos", shuffled_test_labels)
        monkeypatch.setattr(evaluate, "read_videos", shuffled_test_labels)
        run_chain(toy, tmp_path)
        assert_same_checkpoints(chain, tmp_path)
        before = (chain / "results.json").read_text()
        assert before != (tmp_path / "results.json").read_text()

    def test_teachers_stay_as_they_are_in_stage_3(self, chain, toy, tmp_path, monkeypatch):
        load_classifier = train_student.load_classifier
        teachers = []

        def remembered(*args):
            teachers.append(load_classifier(*args))
            return teachers[-1]

        monkeypatch.setattr(train_student, "load_classifier", remembered)
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("student*"))
        run_stage("student", toy, tmp_path)
        for teacher, name in zip(teachers, ("inv_ft", "dist_ft"), strict=True):
            assert same(dict(teacher.state_dict()), load(chain, name)["model"])
            assert all(p.grad is None for p in teacher.parameters())
        assert_same_checkpoints(chain, tmp_path, ["student"])  # to remember them changed nothing

    def test_the_student_does_not_stay_what_it_started_from(self, chain):
        student = load(chain, "student")["model"]["stem.0.weight"]
        assert not torch.equal(student, load(chain, "dist")["model"]["stem.0.weight"])

    @pytest.mark.parametrize("data", ["ucf101", "hmdb51", "kinetics400", "folder"])
    def test_all_stages_on_real_files(self, data, real_data, tmp_path):
        """In the tree that the README's lines make of archives."""
        root = tmp_path / "data" / data
        if data == "folder":
            tree_of_real_clips(data, real_data, root)
        else:
            tree_of_real_clips(data, real_data, tmp_path / "packed")
            make_archives(data, tmp_path / "packed", tmp_path / "archives")
            run_lines(readme_lines(data), tmp_path)
        out = tmp_path / "out"
        for stage in STAGES:
            run_stage(stage, root, out, "--data", data, "--arch", "r3d_tiny", "--epochs", 1)
        evaluate.main([str(out), "--clips", "2", "--workers", "0"])
        results = read_results(out)
        assert [r["checkpoint"] for r in results] == EVALUATED
        for r in results:
            assert r["data"] == data and r["videos"] == 4 and r["unreadable"] == 0
            assert r["labeled_count"] == 4  # one of each class
        assert len(load(out, "inv")["similarity_of"]) == (14 if data == "folder" else 12)


# ---- Videos that cannot be decoded -------------------------------------------------------------

@pytest.fixture
def broken(toy, tmp_path):
    """A folder of 100 training and 10 test videos, and a function that breaks some, in five ways.

    It returns their paths."""
    source = tb.read_videos("toy", toy, True)
    for part, count in [("train", 100), ("test", 10)]:
        for i in range(count):
            path = tmp_path / part / source.name(i % 24).split("/")[0] / f"{i:03}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.path(i % 24), path)

    def break_files(numbers, part="train"):
        paths = sorted((tmp_path / part).rglob("*.avi"))
        for i in numbers:
            if i % 5 == 4:
                write_sound_with_cover(paths[i].with_suffix(".mp4"))
                paths[i].with_suffix(".mp4").rename(paths[i])
            else:
                start = paths[i].read_bytes()[:300]
                paths[i].write_bytes([b"", start, b"not a video", bytes(5000)][i % 5])
        return [str(paths[i]) for i in numbers]

    return tmp_path, break_files


def folder_flags(root):
    return [*TINY, "--data", "folder", "--root", str(root), "--arch", "r3d_tiny",
            "--out", str(root / "out")]


class TestReencoding:
    """The README's line with ffmpeg, on a stand-in that copies; its filter on FFmpeg's own."""
    line = re.search("^find my .*$", (HERE / "README.md").read_text(), re.M)[0]

    def test_it_makes_the_same_tree_in_another_folder(self, tmp_path):
        names = ["train/a b/1.mp4", "test/a b/it's.mp4", "unlabeled/x.mp4"]
        for name in names:
            path = tmp_path / "my" / name
            path.parent.mkdir(parents=True)
            path.write_text(name)
        run_lines(self.line, tmp_path)
        small = tmp_path / "small" / "my"
        assert [(small / name).read_text() for name in names] == names
        assert len([path for path in small.rglob("*") if path.is_file()]) == 3

    @pytest.mark.parametrize("width, height, expected", [
        (854, 480, (456, 256)), (480, 854, (256, 456)), (320, 240, (342, 256))])
    def test_its_filter_gives_a_short_side_of_256(self, width, height, expected):
        graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="yuv420p", time_base="1/30")
        scale = graph.add("scale", re.search("-vf scale=([^ ]*)", self.line)[1])
        sink = graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(sink)
        graph.configure()
        frame = av.VideoFrame(width, height, "yuv420p")
        frame.pts = 0
        graph.push(frame)
        scaled = graph.pull()
        assert (scaled.width, scaled.height) == expected


class TestSmallFolders:
    def test_few_videos_have_small_batches_and_many_epochs(self):
        few = tb.defaults("folder", "pretrain", videos=67)
        assert few["batch"] == 8 and few["epochs"] == 5000 // (67 // 8)
        assert tb.defaults("folder", "pretrain", videos=1000) | {"data": "", "root": ""} == (
            tb.defaults("ucf101", "pretrain") | {"data": "", "root": "", "percent": 10})

    @pytest.mark.parametrize("small, batch", [(101, 8), (100, 40)])  # it has 100 videos
    def test_their_number_is_found_out(self, small, batch, broken, monkeypatch, capsys):
        monkeypatch.setattr(tb, "SMALL", small)
        flags = folder_flags(broken[0])
        del flags[flags.index("--batch"):flags.index("--batch") + 2]
        with contextlib.suppress(SystemExit):
            pretrain_inv.main([*flags, "--clips", "2", "--benchmark", "1"])
        assert f"--batch {batch} " in capsys.readouterr().out

    @pytest.mark.parametrize("batch, epochs", [(10, 500), (20, 1000)])  # it has 100 videos
    def test_another_batch_makes_as_many_steps(self, batch, epochs, broken, monkeypatch, capsys):
        monkeypatch.setattr(pretrain_inv, "training_videos", lambda args: sys.exit())
        flags = ["--data", "folder", "--root", str(broken[0]), "--batch", str(batch)]
        pretrain_inv.main([*flags, "--device", "cpu"])
        assert f"--epochs {epochs} " in capsys.readouterr().out


class TestBrokenVideos:
    def test_a_name_that_is_not_utf_8_can_be_printed(self, monkeypatch):
        terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
        monkeypatch.setattr(sys, "stdout", terminal)
        tb.print0("cannot be decoded: é", os.fsdecode(b"\xff.avi"))
        terminal.flush()
        assert terminal.buffer.getvalue() == "cannot be decoded: é \\udcff.avi\n".encode()

    def test_some_are_named_replaced_and_counted(self, broken, capsys):
        root, break_files = broken
        bad = break_files(range(10, 60, 10 + 1))  # five of them, one of each kind
        pretrain_inv.main([*folder_flags(root), "--batch", "10", "--clips", "2"])
        captured = capsys.readouterr()
        assert len(bad) == 5 and all(path in captured.err for path in bad)
        assert captured.err.count("another video takes its place") == 5
        assert read_log(root / "out", "inv")[-1]["unreadable"] == 5
        listed = captured.out.split("cannot be decoded:")[-1]
        assert all(path.split("/train/")[1] in listed for path in bad)
        assert len(load(root / "out", "inv")["similarity_of"]) == 95

    def test_more_than_a_tenth_of_them_stop_the_run(self, broken, capsys):
        root, break_files = broken
        break_files({*range(10, 60, 10 + 1), *range(5, 50, 4)})
        with pytest.raises(SystemExit) as end:
            pretrain_inv.main([*folder_flags(root), "--batch", "10", "--clips", "2", "--restart"])
        assert end.value.code == 2 and "more than 10 %" in capsys.readouterr().err

    def test_among_test_videos_they_count_as_wrong(self, broken, capsys):
        root, break_files = broken
        finetune.main([*folder_flags(root), "--init", "none", "--epochs", "1"])
        evaluate.main([str(root / "out"), "--clips", "1", "--workers", "0"])
        before = read_results(root / "out")[0]
        bad = break_files(range(10), "test")
        evaluate.main([str(root / "out"), "--clips", "1", "--workers", "0"])
        after = read_results(root / "out")[0]
        assert before["videos"] == after["videos"] == 10
        assert before["unreadable"] == 0 and after["unreadable"] == 10
        assert after["top1"] == 0 and all(path in capsys.readouterr().err for path in bad[:1])


# ---- Evaluation --------------------------------------------------------------------------------

def by_checkpoint(out):
    return {r["checkpoint"]: r for r in read_results(out)}


def cells(row):
    """The cells of a row of a printed table."""
    return [cell.strip() for cell in row.split("|")[1:-1]]


def random_results(classes):
    """In place of evaluate.evaluate_folder: accuracies that no network gave."""
    rng = np.random.default_rng(0)

    def results(folder, classifiers, *_):
        return [{"checkpoint": name, "finished": True, "labeled_count": 8,
                 **dict(zip(evaluate.METRICS, 100 * rng.random(3))),
                 "per_class": dict(zip(classes, 100 * rng.random(8)))} for name in classifiers]

    return results


def report(folder):
    """evaluate.py over the runs a and b -> what it prints; accuracies at random."""
    with (pytest.MonkeyPatch.context() as patch,
          contextlib.redirect_stdout(io.StringIO()) as text):
        patch.setattr(evaluate, "evaluate_folder",
                      random_results(load(folder / "b", "inv")["classes"]))
        evaluate.main([str(folder / "a"), str(folder / "b"), "--against", "dist_ft.pt",
                       "student.pt", "--clips", "1"])
    return text.getvalue()


def draw(folder):
    """figures/draw.py over the runs a and b -> what it prints."""
    spec = importlib.util.spec_from_file_location(
        "draw", Path(__file__).parent / "figures/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        module.main([str(folder / "a"), str(folder / "b"), "--out", str(folder / "figures")])
    return text.getvalue()


@pytest.fixture(scope="class")
def reported(chain, tmp_path_factory):
    """The report on two runs of which the first lacks a checkpoint, and the numbers behind it."""
    folder = tmp_path_factory.mktemp("reported")
    for name in "ab":
        shutil.copytree(chain, folder / name)
    (folder / "a/labeled_only.pt").unlink()
    text = report(folder)
    class_table = draw(folder).split("difference |")[1].splitlines()[2:10]
    inv = load(chain, "inv_ft")
    dist = load(chain, "dist_ft")
    assert inv["similarity_of"] == dist["similarity_of"]
    return SimpleNamespace(
        folder=folder, text=text, teachers=(inv, dist),
        runs=[by_checkpoint(folder / name) for name in "ab"], rows=list(map(cells, class_table)),
        s=tb.similarity_score(inv["similarity"], dist["similarity"]))


class TestEvaluation:
    def test_accuracy_counts_what_the_model_says(self, chain, toy):
        videos = tb.read_videos("toy", toy, False)
        model = tb.build_model("r3d_tiny", 8).eval()
        model.load_state_dict(load(chain, "student")["model"])
        right = 0
        for i in range(8):
            p = 0
            # two clips of 8 frames, first and last
            for start in (0, len(full_decode(videos.path(i))) - 8):
                clip = tb.decode_frames(videos.path(i), range(start, start + 8), short_side=20)
                for scale in (1.0, 0.8, 0.7):
                    x = tb.to_input([tb.centre_crop(clip, 16, scale)], model)
                    with torch.no_grad():
                        p = p + model(x).softmax(1)
            right += int(p.argmax()) == videos.labels[i]
        assert by_checkpoint(chain)["student.pt"]["top1"] == pytest.approx(100 * right / 8)

    def test_means_and_differences_over_runs(self, reported):
        for name in reported.runs[1]:
            runs = [run for run in reported.runs if name in run]
            top1 = [run[name]["top1"] for run in runs]
            row = next(line for line in reported.text.splitlines()
                       if line.startswith(f"| {name}") and "±" in line)
            _, count, mean, *_ = cells(row)
            spread = statistics.stdev(top1) if len(top1) > 1 else 0
            assert [count, mean] == [str(len(top1)), f"{np.mean(top1):.1f} ± {spread:.1f}"]
            for k, other in [(-4, "dist_ft.pt"), (-2, "student.pt")]:
                apart = [run[name]["top1"] - run[other]["top1"] for run in runs]
                spread = statistics.stdev(apart) if len(apart) > 1 else 0
                expected = [f"{np.mean(apart):+.1f} ± {spread:.1f}", ""]
                if len(runs) == 2 and name != other:
                    half = 12.7062 * spread / math.sqrt(2)
                    expected[1] = f"{np.mean(apart) - half:+.1f} to {np.mean(apart) + half:+.1f}"
                assert cells(row)[k:][:2] == expected

    @pytest.mark.parametrize("n, t", [(2, 12.7062), (3, 4.3027), (4, 3.1824), (10, 2.2622),
                                      (31, 2.0423)])
    def test_intervals_are_student_s(self, n, t):
        """t from a printed table; the values are so large that four of its digits count."""
        values = 1000 * np.random.default_rng(n).normal(size=n)
        half = t * statistics.stdev(values) / math.sqrt(n)
        low, high = map(float, evaluate.interval(values).split(" to "))
        assert low == pytest.approx(np.mean(values) - half, abs=0.06 + 2e-4 * half)
        assert high == pytest.approx(np.mean(values) + half, abs=0.06 + 2e-4 * half)

    def test_the_teachers_together_on_test_videos(self, chain, toy):
        """Eq. 7, with s from the teachers of stage 1 on the middle of each test video."""
        videos = tb.read_videos("toy", toy, False)
        cpu = torch.device("cpu")
        args = argparse.Namespace(workers=0, precision="fp32")
        saved = [load(chain, name) for name in ("inv_ft", "dist_ft")]
        p = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(2)
        rows = evaluate.combine_on_test_videos(
            dict(enumerate(p[0])), dict(enumerate(p[1])), saved, chain, videos, args, cpu)
        for i in range(8):
            frames = full_decode(videos.path(i))
            first = (len(frames) - 15) // 2
            clip = tb.decode_frames(videos.path(i), range(first, first + 16), short_side=20)
            s = 0
            for name in ("inv", "dist"):
                embedder = tb.Embedder(tb.build_model("r3d_tiny", 8)).eval()
                embedder.backbone.load_state_dict(load(chain, name)["model"])
                embedder.head.load_state_dict(load(chain, name)["head"])
                with torch.no_grad():
                    clips = [tb.centre_crop(half, 16) for half in clip.split(8)]
                    a, b = embedder(tb.to_input(clips, embedder.backbone))
                s += float(a @ b) / 2
            s = min(1, max(0, s))
            assert rows["teachers, mean"][i].allclose((p[0, i] + p[1, i]) / 2)
            assert rows["teachers, TSTR"][i].allclose(s * p[0, i] + (1 - s) * p[1, i], atol=1e-4)

    def test_a_video_is_decoded_once_for_all_that_see_the_same_clips(
            self, chain, toy, tmp_path, monkeypatch):
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        run_stage("labeled_only", toy, tmp_path, "--restart", "--frames", 4)
        decode_frames = tb.decode_frames
        wanted = []

        def counted(path, indices, short_side):
            frames = decode_frames(path, indices, short_side)
            wanted.append(len(frames))
            return frames

        monkeypatch.setattr(tb, "decode_frames", counted)
        evaluate.main([str(tmp_path), *EVALUATE, "--clips", "3"])
        together = read_results(tmp_path)
        assert [r["checkpoint"] for r in together] == EVALUATED
        videos = together[0]["videos"]
        # labeled_only.pt; the three others; C of both teachers
        assert wanted == [3 * 4] * videos + [3 * 8] * videos + [2 * 8] * 2 * videos
        evaluate.main([str(tmp_path / "student.pt"), *EVALUATE, "--clips", "3"])
        alone, = read_results(tmp_path)
        assert {**alone, "seconds": 0} == {**together[-1], "seconds": 0}

    def test_teachers_that_see_different_clips_are_combined_too(self, chain, tmp_path):
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        saved = load(chain, "inv_ft")
        saved["args"]["frames"] = 4
        torch.save(saved, tmp_path / "inv_ft.pt")
        evaluate.main([str(tmp_path), *EVALUATE])
        assert [r["checkpoint"] for r in read_results(tmp_path)] == EVALUATED

    def test_teachers_together_are_measured_on_their_own_videos(self, chain, toy, tmp_path):
        shutil.copytree(chain, tmp_path / "run")
        shutil.copytree(toy, tmp_path / "few")
        listed = tmp_path / "few/ucfTrainTestlist/testlist01.txt"
        listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:-2]))
        saved = load(chain, "student")
        saved["args"]["root"] = str(tmp_path / "few")
        torch.save(saved, tmp_path / "run/student.pt")
        evaluate.main([str(tmp_path / "run"), *EVALUATE])
        *others, student = read_results(tmp_path / "run")
        assert student["checkpoint"] == "student.pt"
        assert {r["videos"] for r in others} == {student["videos"] + 2}

    def test_stage_1_is_found_beside_teachers_that_moved(self, chain, tmp_path, capsys):
        for name in ("inv", "dist", "inv_ft", "dist_ft"):
            saved = load(chain, name)
            saved["args"] |= {"out": "gone", "pretrained": None}
            torch.save(saved, tmp_path / f"{name}.pt")
        evaluate.main([str(tmp_path), *EVALUATE])
        assert [r["checkpoint"] for r in read_results(tmp_path)] == EVALUATED[1:5]
        assert read_results(tmp_path) == [
            {**r, "seconds": s["seconds"]}
            for r, s in zip(read_results(chain)[1:5], read_results(tmp_path), strict=True)]

        (tmp_path / "inv.pt").unlink()
        capsys.readouterr()
        evaluate.main([str(tmp_path), *EVALUATE])
        assert [r["checkpoint"] for r in read_results(tmp_path)] == EVALUATED[1:4]
        assert "no row of TSTR, which needs" in capsys.readouterr().out

        # Teachers of other programs have no similarity, and videos may break off in their middle.
        torch.save(load(chain, "inv")["model"], tmp_path / "inv.pt")
        evaluate.main([str(tmp_path), *EVALUATE])
        assert [r["checkpoint"] for r in read_results(tmp_path)] == EVALUATED[1:4]

    def test_a_test_video_that_breaks_off_has_the_teachers_mean(self, chain, toy, monkeypatch):
        """Its clips can be decoded, not those in its middle."""
        videos = tb.read_videos("toy", toy, False)
        saved = [load(chain, name) for name in ("inv_ft", "dist_ft")]
        p = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(2)
        measure = evaluate.video_similarity

        def without_the_third(*args):
            rows, unreadable = measure(*args)
            del rows[2]
            return rows, unreadable

        monkeypatch.setattr(evaluate, "video_similarity", without_the_third)
        rows = evaluate.combine_on_test_videos(
            dict(enumerate(p[0])), dict(enumerate(p[1])), saved, chain, videos,
            argparse.Namespace(workers=0, precision="fp32"), torch.device("cpu"))
        mean, tstr = rows["teachers, mean"], rows["teachers, TSTR"]
        assert [i for i in range(8) if mean[i].equal(tstr[i])] == [2]

    def test_the_teachers_are_compared_by_class(self, reported):
        inv = reported.teachers[0]
        assert inv["similarity_clips"] == [2, 8, 1]
        assert sorted(row[0] for row in reported.rows) == sorted(inv["classes"])
        for name, *numbers in reported.rows:
            own = [video.startswith(f"{name}/") for video in inv["similarity_of"]]
            s = reported.s[torch.tensor(own)].mean()
            p_inv = np.mean([run["inv_ft.pt"]["per_class"][name] for run in reported.runs])
            p_dist = np.mean([run["dist_ft.pt"]["per_class"][name] for run in reported.runs])
            assert numbers == [f"{s:.2f}", f"{p_inv:.1f}", f"{p_dist:.1f}",
                               f"{p_inv - p_dist:+.1f}"]
        difference = [float(row[-1]) for row in reported.rows]
        assert difference == sorted(difference, reverse=True)

    def test_bars_grow_to_the_side_of_the_better_teacher(self, reported):
        bars = np.array(Image.open(reported.folder / "figures/classes.png"), int)
        assert bars.shape == (40 + 22 * 8, 720, 3)
        for k, row in enumerate(reported.rows):
            left, right = (bool((bars[36 + 22 * k + 2, x] == 255).all()) for x in (448, 452))
            difference = float(row[-1])
            assert abs(difference) < 2 or [left, right] == [difference > 0, difference < 0]

    def test_similarity_matrices_are_drawn_in_their_colours(self, reported):
        image = np.array(Image.open(reported.folder / "figures/similarity.png"), int)
        s = reported.s
        for place, i in enumerate(s.argsort(descending=True)[[0, len(s) // 2, -1]]):
            for k, saved in enumerate(reported.teachers):
                x = 2 * 100 + 12 + k * (72 + 16)
                y = place * (72 + 32) + 28
                # a cell on the diagonal, and one off it
                for column, c in enumerate(saved["similarity"][i, 0].clamp(min=0).tolist()):
                    colour = 255 - c * np.array([200, 120, 40])
                    assert np.abs(image[y + 1, x + 36 * column + 1] - colour).max() <= 1

    def test_each_checkpoint_is_read_once_and_no_optimiser(self, chain, tmp_path, monkeypatch):
        for name in "ab":
            shutil.copytree(chain, tmp_path / name)
        read = []
        load_file = torch.load

        def noted(path, **settings):
            read.append(path)
            return load_file(path, **settings)

        monkeypatch.setattr(torch, "load", noted)
        report(tmp_path)
        monkeypatch.undo()
        # the first is for report(), which looks up the names of the classes
        assert sorted(read[1:]) == sorted(tmp_path.glob("*/*.pt"))
        assert "optimizer" not in tb.read_checkpoint(chain / "student.pt")

    def test_figures_need_teachers_whose_similarity_is_known(self, chain, tmp_path, capsys):
        for name in "ab":
            shutil.copytree(chain, tmp_path / name)
        shutil.copy(chain / "labeled_only.pt", tmp_path / "b/dist_ft.pt")
        report(tmp_path)
        with pytest.raises(SystemExit):
            draw(tmp_path)
        assert "dist_ft.pt does not come from stage 1" in capsys.readouterr().err

    def test_figures_need_results(self, chain, tmp_path, capsys):
        shutil.copytree(chain, tmp_path / "a")
        (tmp_path / "a/results.json").unlink()
        with pytest.raises(SystemExit):
            draw(tmp_path)
        assert "results.json: not there, evaluate.py" in capsys.readouterr().err

    def test_prediction_of_one_s_own_videos(self, chain, toy, tmp_path, capsys):
        """A file, and a folder with the same video under another name and a broken one."""
        shutil.copy(chain / "student.pt", tmp_path)
        videos = tb.read_videos("toy", toy, False)
        (tmp_path / "clips/deep").mkdir(parents=True)
        shutil.copy(videos.path(0), tmp_path / "clips/deep/a: #1.avi")
        (tmp_path / "clips/b.avi").write_text("broken")
        evaluate.main(["--videos", videos.path(0), str(tmp_path / "clips"),
                       "--checkpoint", str(tmp_path / "student.pt"), *EVALUATE])
        predictions = json.loads((tmp_path / "predictions.json").read_text())
        first, again, bad = sorted(predictions, key=lambda p: bool(p["error"]))
        assert first["top5"] == again["top5"] and again["video"].endswith("a: #1.avi")
        assert len(again["top5"]) == 5 and set(again["top5"]) < set(videos.classes)
        assert sum(again["top5"].values()) <= 1
        assert bad["top5"] == {} and bad["error"]
        assert "b.avi: cannot be decoded" in capsys.readouterr().out

    def test_prediction_needs_a_video(self, chain, tmp_path):
        with pytest.raises(SystemExit):
            evaluate.main(["--videos", str(tmp_path / "nothing"),
                           "--checkpoint", str(chain / "student.pt"), *EVALUATE])


# ---- The engine: figures of a step, compile and checkpointing, learning rate, memory -----------

def earlier_checkpoints(chain, out, stage):
    """Copy what the stages before this one have left."""
    first = "inv_ft" if stage == "ft" else stage
    for name in CHECKPOINTS[:CHECKPOINTS.index(first)]:
        shutil.copy(chain / f"{name}.pt", out)


def one_step(stage, root, out, *flags):
    """Run the first step of a stage -> its loss terms, means over the processes; the gradients;
    the buffers of the network afterwards."""
    terms = {}
    gradients = {}
    buffers = {}
    add = tb.Meter.add

    def noted(meter, clips, **values):
        add(meter, clips, **values)
        meter.settle()
        net = meter.state.net
        net = getattr(net, "module", net)  # within DistributedDataParallel
        terms.update({name: torch.tensor(value) for name, value in meter.state.sums.items()})
        gradients.update({name: p.grad for name, p in net.named_parameters()
                          if p.grad is not None})
        buffers.update(net.named_buffers())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tb.Meter, "add", noted)
        with pytest.raises(SystemExit) as end:
            run_stage(stage, root, out, *flags)
        assert end.value.code == 1
    return terms, gradients, buffers


def first_step(stage, root, out, *flags):
    """All that one_step returns, by name."""
    terms, gradients, buffers = one_step(stage, root, out, *flags)
    return {**terms, **gradients, **buffers}


@pytest.fixture(scope="class")
def long_log(toy, tmp_path_factory):
    """The log of 12 epochs, 4 of them warm-up, under a schedule without patience."""
    out = tmp_path_factory.mktemp("long")
    run_stage("inv", toy, out, "--epochs", 12, "--warmup", 4, "--patience", 0, "--lr", 0.02)
    return read_log(out, "inv")[1:]


def memory_of_100_epochs(*argv):
    """In another process: train; what it and its workers hold does not grow after 20 epochs."""
    save = tb.State.save
    seen = []

    def measured(state):
        save(state)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        pages = 0
        for process in (os.getpid(), *children):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        seen.append((pages * 4096, len(os.listdir("/proc/self/fd"))))

    tb.State.save = measured
    pretrain_inv.main(argv)
    early = seen[20]
    late = seen[-2]
    assert late[0] - early[0] < 15e6 and late[1] <= early[1] + 2, (early, late)


class TestEngine:
    @pytest.mark.parametrize("stage, clips", [
        # clips of each video; stage 3 has as many labelled videos again
        ("inv", 2), ("dist", 6), ("labeled_only", 1), ("student", 2)])
    def test_benchmark_prints_numbers_and_writes_nothing(self, stage, clips, chain, toy, tmp_path,
                                                         capsys):
        if stage == "student":
            earlier_checkpoints(chain, tmp_path, stage)
        before = sorted(tmp_path.glob("*.pt"))
        run_stage(stage, toy, tmp_path, "--benchmark", 3)
        text = capsys.readouterr().out
        assert "bottleneck:" in text
        assert sorted(tmp_path.glob("*.pt")) == before
        numbers = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        expected = pytest.approx(4 * clips * 1000 / numbers["ms_per_step"])
        assert numbers["clips_per_s"] == expected
        assert 0 <= numbers["waiting_share"] < 1 and numbers["decode_ms_per_video"] > 0
        model = tb.build_model("r3d_tiny", 8)
        with FlopCounterMode(display=False) as counted:
            model(torch.zeros(4 * clips, 3, 8, 16, 16)).sum().backward()
        flops = numbers["tflop_per_s"] * numbers["ms_per_step"] * 1e9
        most = 1.9 if stage == "student" else 1.2  # teachers go forward only
        assert 0.8 < flops / counted.get_total_flops() < most

    @pytest.mark.skipif("TIMEBALANCE_QUIET" not in os.environ, reason="TIMEBALANCE_QUIET not set")
    def test_a_busy_neighbour_costs_what_it_takes(self, tmp_path):
        """Threads that spin at barriers would make each step ten times slower, where one core of
        two is busy, rather than twice."""
        def ms_per_step():
            out = subprocess.run(
                [sys.executable, "pretrain_inv.py", "--root", tmp_path / "toy", "--benchmark", "10",
                 "--workers", "0", "--out", tmp_path], capture_output=True, text=True, check=True,
                cwd=Path(__file__).parent).stdout
            return json.loads(re.search(r"^{.*}$", out, re.M).group())["ms_per_step"]

        quiet = ms_per_step()
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            busy = ms_per_step()
        finally:
            neighbour.kill()
        print(f"{quiet:.0f} ms a step, {busy:.0f} beside a busy process")
        assert busy < 2.5 * quiet

    def test_benchmark_times_compiled_code(self, toy, tmp_path, monkeypatch):
        """Though a counter of operations, which keeps torch from compiling, sees the first step."""
        calls = []
        compile = torch.compile

        def backend(graph, _example):
            calls.append(0)
            place = len(calls) - 1

            def run(*args):
                calls[place] += 1
                return graph(*args)
            return run

        monkeypatch.setattr(torch, "compile", lambda function, **settings: compile(
            function, backend=backend, **settings))
        torch.compiler.reset()
        run_stage("inv", toy, tmp_path, "--benchmark", 3, "--compile")
        assert calls == [6] * 5  # a graph for each part; three steps of warm-up, three timed

    def test_benchmark_counts_no_recomputation(self, toy, tmp_path, capsys):
        flop = []
        for flags in ([], ["--checkpointing"]):
            run_stage("inv", toy, tmp_path, "--benchmark", 1, *flags)
            text = capsys.readouterr().out
            numbers = json.loads(next(x for x in text.splitlines() if x.startswith("{")))
            flop.append(numbers["tflop_per_s"] * numbers["ms_per_step"])
        assert flop[0] == pytest.approx(flop[1])

    def test_every_variant_of_a_block_is_compiled(self, toy, tmp_path, monkeypatch):
        """slow_r50 has eight, as many as torch compiles of one function by default."""
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)
        compile = torch.compile
        graphs = []

        def backend(graph, _example):
            graphs.append(graph)
            return graph

        monkeypatch.setattr(torch, "compile", lambda function, **settings: compile(
            function, backend=backend, **settings))
        torch.compiler.reset()
        run_stage("inv", toy, tmp_path, "--benchmark", 1, "--compile", "--arch", "slow_r50")
        assert len(graphs) >= 1 + 8  # the stem, the blocks

    @pytest.mark.parametrize("stage", ["inv", "dist", "labeled_only", "student"])
    def test_checkpointing_and_compile_change_nothing(self, stage, chain, toy, tmp_path,
                                                      monkeypatch):
        """All that --compile hands to inductor, whose compiler takes half a minute, is run
        without it; the next test runs one of the stages with it."""
        compile = torch.compile
        compiled = []

        def quickly(function, **settings):
            compiled.append(function)
            return compile(function, backend="aot_eager", **settings)

        monkeypatch.setattr(torch, "compile", quickly)
        earlier_checkpoints(chain, tmp_path, stage)
        plain = first_step(stage, toy, tmp_path)
        assert len(plain) > 60 and not compiled
        for flags in (["--checkpointing"], ["--compile"], ["--compile", "--checkpointing"]):
            torch.compiler.reset()
            other = first_step(stage, toy, tmp_path, *flags)
            assert len(compiled) == 5 * ("--compile" in flags) and plain.keys() == other.keys()
            compiled.clear()
            for name, value in plain.items():
                # the bias of head.0 has no gradient but noise, BatchNorm follows it
                scale = float(value.abs().max()) + 0.1 * (name == "head.0.bias")
                close = torch.allclose(value, other[name], rtol=1e-4, atol=1e-4 * scale)
                assert close, (flags, name)

    @pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
    def test_compile_with_inductor_changes_nothing(self, chain, toy, tmp_path):
        torch.compiler.reset()
        earlier_checkpoints(chain, tmp_path, "student")
        plain = first_step("student", toy, tmp_path)
        other = first_step("student", toy, tmp_path, "--compile")
        for name, value in plain.items():
            scale = float(value.abs().max())
            assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-3 * scale), name

    def test_learning_rate_warms_up_linearly(self, long_log):
        assert [line["lr"] for line in long_log[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])

    def test_learning_rate_halves_on_a_plateau(self, long_log):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        for before, line in zip(long_log[3:], long_log[4:]):
            if before["epoch"] > 4:
                plateau.step(before["loss"])
            assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        assert long_log[-1]["lr"] < 0.02  # the schedule did something

    def test_a_loss_that_is_not_finite_stops_the_run(self, toy, tmp_path, monkeypatch, capsys):
        calls = []

        def exploding(z, temperature):
            calls.append(1)
            return tb.invariant_loss(z, temperature) * (math.nan if len(calls) == 9 else 1)

        monkeypatch.setattr(pretrain_inv, "invariant_loss", exploding)
        with pytest.raises(SystemExit) as end:
            run_stage("inv", toy, tmp_path)
        error = capsys.readouterr().err
        assert end.value.code == 1 and "epoch 2, step 3: not finite: {'loss': nan}" in error
        assert error.count(".avi") == 4
        saved = load(tmp_path, "inv")
        assert saved["epoch"] == 1 and all(w.isfinite().all() for w in saved["model"].values())

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_memory_and_open_files_stay_flat_over_100_epochs(self, tmp_path):
        tb.render_toy(tmp_path / "toy", 8, 8)
        flags = "--frames 4 --batch 8 --epochs 100 --workers 1".split()
        done = run_here(memory_of_100_epochs,
                        *stage_argv("inv", tmp_path / "toy", tmp_path, *flags))
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(read_log(tmp_path, "inv")) == 101


# ---- Checkpoints: what an interruption, a full disk or a stranger's file does ------------------

# stage, checkpoint, what happens how often before which signal, and the (epoch, step) at which
# the checkpoint then stands: at the last epoch's end, or after the step in hand
INTERRUPTIONS = [
    ("inv", "inv", "step", 9, signal.SIGKILL, (1, 0)),
    ("dist", "dist", "step", 9, signal.SIGKILL, (1, 0)),
    ("labeled_only", "labeled_only", "step", 3, signal.SIGKILL, (1, 0)),
    ("student", "student", "step", 6, signal.SIGKILL, (1, 0)),
    ("inv", "inv", "step", 8, signal.SIGTERM, (1, 2)),
    ("ft", "dist_ft", "step", 6, signal.SIGTERM, (0, 2)),
    ("student", "student", "step", 3, signal.SIGINT, (0, 3)),
    ("inv", "inv", "similarity", 2, signal.SIGKILL, (2, 0)),
    ("dist", "dist", "similarity", 1, signal.SIGTERM, (2, 0)),
    ("inv", "inv", "write", 2, signal.SIGINT, (1, 1))]


@pytest.fixture(scope="class", params=INTERRUPTIONS,
                ids=lambda param: f"{param[1]}-{param[2]}-{param[3]}-{param[4].name}")
def interruption(request, chain, toy, tmp_path_factory):
    """A stage in a process that gets a signal; then the same stage again."""
    stage, name, moment, at, number, stands = request.param
    out = tmp_path_factory.mktemp("interruption")
    earlier_checkpoints(chain, out, stage)
    dead = run_here(signalled, moment, at, int(number), STAGES[stage][0].__name__,
                    *stage_argv(stage, toy, out))
    left = load(out, name)
    run_stage(stage, toy, out, "--workers", 1)
    return SimpleNamespace(name=name, number=number, stands=stands, dead=dead, left=left, out=out)


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestResume:
    def test_an_interrupted_stage_ends_with_one_line(self, interruption):
        dead = interruption.dead
        if interruption.number == signal.SIGKILL:
            assert dead.returncode == -signal.SIGKILL, dead.stderr
        else:
            line = "interrupted; the same command goes on from the last checkpoint"
            assert dead.returncode == 1 and dead.stderr.strip().endswith(line), dead.stderr
            assert "Traceback" not in dead.stderr

    def test_an_interrupted_stage_leaves_a_checkpoint(self, interruption):
        """After SIGTERM and Ctrl-C, of the step in hand."""
        left = interruption.left
        assert (left["epoch"], left["step"]) == interruption.stands and not left["finished"]

    def test_an_interrupted_stage_goes_on_to_the_same_weights(self, interruption, chain):
        assert_same_checkpoints(chain, interruption.out, [interruption.name])

    def test_an_interrupted_stage_s_log_has_each_epoch_once(self, interruption, chain):
        lines = read_log(interruption.out, interruption.name)
        assert [line.get("epoch") for line in lines] == [None, 1, 2]
        for line, expected in zip(lines[1:], read_log(chain, interruption.name)[1:]):
            assert line["loss"] == expected["loss"]

    def test_a_second_ctrl_c_does_not_wait(self, monkeypatch):
        monkeypatch.setattr(tb.Signals, "deferring", True)
        monkeypatch.setattr(tb.Signals, "requested", False)
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends the second one
            tb.Signals.handle(number, None)
        with pytest.raises(KeyboardInterrupt):
            tb.Signals.handle(signal.SIGINT, None)

    @pytest.mark.skipif("TIMEBALANCE_STRESS" not in os.environ,
                        reason="TIMEBALANCE_STRESS is not set: takes minutes")
    @pytest.mark.parametrize("stage", ["inv", "dist", "labeled_only", "student"])
    def test_twenty_kills_at_random_moments(self, stage, chain, toy, tmp_path):
        earlier_checkpoints(chain, tmp_path, stage)
        rng = np.random.default_rng(CHECKPOINTS.index(stage))
        for k in range(20):
            process = subprocess.Popen(
                [sys.executable, f"{STAGES[stage][0].__name__}.py",
                 *stage_argv(stage, toy, tmp_path, "--workers", k % 3)],
                cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(1, 8))
            process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[k % 3])
            process.wait(60)
            if (tmp_path / f"{stage}.log").exists():
                read_log(tmp_path, stage)
        run_stage(stage, toy, tmp_path)
        assert_same_checkpoints(chain, tmp_path, [stage])

    def test_a_finished_stage_changes_nothing(self, chain, toy, tmp_path, capsys):
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        run_stage("inv", toy, tmp_path)
        assert "is finished" in capsys.readouterr().out
        assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()

    def test_a_finished_stage_takes_more_epochs(self, toy, tmp_path):
        for epochs in (2, 3):  # of two steps each: of so few the weights rest in none
            run_stage("inv", toy, tmp_path, "--batch", 12, "--epochs", epochs)
        run_stage("inv", toy, tmp_path / "new", "--batch", 12, "--epochs", 3)
        assert_same_checkpoints(tmp_path, tmp_path / "new", ["inv"])

    @pytest.mark.parametrize("stage, flags, words", [
        ("inv", "--size 32", ("size", "16", "32")), ("dist", "--seed 7", ("seed", "0", "7")),
        ("inv", "--lr 0.5", ("lr", "0.001", "0.5")), ("inv", "--epochs 1", ("2 epochs", "1")),
        ("ft", "--percent 40", ("percent", "6", "40")),
        ("student", "--omega 3", ("omega", "1.0", "3.0"))])
    def test_other_arguments_are_refused_with_both_values(self, stage, flags, words, chain, toy,
                                                          tmp_path, capsys):
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        with pytest.raises(SystemExit) as end:
            run_stage(stage, toy, tmp_path, *flags.split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and all(word in error for word in words), error

    def test_another_stage_s_checkpoint_is_refused(self, chain, toy, tmp_path, capsys):
        shutil.copy(chain / "student.pt", tmp_path / "inv.pt")
        with pytest.raises(SystemExit):
            run_stage("inv", toy, tmp_path)
        assert "not written by this stage" in capsys.readouterr().err

    def test_a_full_disk_leaves_the_last_checkpoint(self, chain, toy, tmp_path, monkeypatch,
                                                    capsys):
        save = torch.save
        shutil.copy(chain / "inv.pt", tmp_path)
        monkeypatch.setattr(torch, "save", lambda state, file: save(state, FullDisk()))
        with pytest.raises(SystemExit) as end:
            run_stage("inv", toy, tmp_path, "--epochs", 3)
        lines = capsys.readouterr().err.splitlines()
        [error] = [line for line in lines if line and not line.startswith("warning: loss ends")]
        assert end.value.code == 2
        assert "inv.pt cannot be written, what was there is left" in error
        assert (tmp_path / "inv.pt").read_bytes() == (chain / "inv.pt").read_bytes()
        assert not list(tmp_path.glob(".inv.pt*"))

    def test_a_file_system_that_syncs_no_folder_is_no_error(self, tmp_path, monkeypatch):
        fsync = os.fsync

        def of_files_alone(descriptor):
            if os.path.isdir(f"/dev/fd/{descriptor}"):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", of_files_alone)
        tb.write_bytes(tmp_path / "out" / "log", b"content")
        assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"content"]

    def test_no_code_in_a_checkpoint_runs(self, tmp_path, toy):
        content = {"stage": "pretrain_inv", "model": Malicious(tmp_path / "touched")}
        torch.save(content, tmp_path / "inv.pt")
        with pytest.raises(tb.UserError, match="inv.pt"):
            tb.read_checkpoint(tmp_path / "inv.pt")
        with pytest.raises(SystemExit):
            run_stage("ft", toy, tmp_path, "--init", "inv.pt")
        assert not (tmp_path / "touched").exists()


# ---- Two processes -----------------------------------------------------------------------------

def gradients_of_three_stages(toy, chain, out):
    """In one of several processes, or alone: save loss terms, gradients and statistics of first
    steps."""
    # In float64, for in float32 the order of a sum can turn a ReLU on or off.
    torch.set_default_dtype(torch.float64)
    teachers = [f"{chain}/inv_ft.pt", f"{chain}/dist_ft.pt"]
    found = {}
    for stage, flags in [("inv", []), ("dist", ["--invariant-weight", 1]),
                         ("student", ["--pretrained", chain, "--teachers", *teachers])]:
        # a new process group each
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        terms, gradients, buffers = one_step(stage, toy, out, *flags)
        found |= {f"{stage}.{name}": b for name, b in buffers.items() if "running" in name}
        found[f"{stage}.losses"] = torch.stack(list(terms.values()))
        found |= {f"{stage}.{name}": gradient for name, gradient in gradients.items()}
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        torch.save(found, f"{out}/found.pt")


class TestSettling:
    def test_the_weights_rest_in_the_last_30_steps_but_at_most_in_a_tenth(self, three_epochs):
        assert [batch.learn for batch in three_epochs] == [True] * 11 + [False]
        args = argparse.Namespace(size=16, stride=1, workers=0)
        source = tb.Batches(tb.Videos("", [], [], []), [], 4, 0, args, torch.device("cpu"), 400)
        assert [batch.learn for batch in source.stream(0, 400)] == [True] * 370 + [False] * 30

    def test_without_learning_running_statistics_alone_change(self, tmp_path):
        net = network("r3d_tiny")
        args = argparse.Namespace(out=tmp_path, arch="r3d_tiny", lr=0.1, patience=5, restart=True,
                                  benchmark=None, compile=False, checkpointing=False)
        videos = tb.Videos("", ["a"], [0], ["c"])
        state = tb.State("finetune", "any", args, net, videos, torch.device("cpu"))
        before = copy.deepcopy(net.state_dict())
        net.train()
        state.update(net(torch.randn(2, 3, 8, 16, 16)).sum(), learn=False)
        assert state.step == 1
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, before[name])
        assert not torch.equal(net.stem[1].running_mean, before["stem.1.running_mean"])

    def test_statistics_of_dark_videos_do_not_lag(self, tmp_path):
        """The mean that eval mode takes away in the stem, against that of the videos, in standard
        deviations: without rest of the weights it is off by more than a tenth."""
        for k in range(8):
            frames = np.zeros((8, 20, 20, 3), np.uint8)
            frames[:, 4 + k:6 + k, 8:12] = 255
            folder = tmp_path / "train" / f"{k % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{k}.avi", frames)
        finetune.main([*folder_flags(tmp_path), "--init", "none", "--percent", "100", "--epochs",
                       "75", "--lr", "3e-3", "--patience", "75"])
        model = tb.load_classifier(load(tmp_path / "out", "labeled_only"), torch.device("cpu"))
        videos = tb.read_videos("folder", tmp_path, True)
        clips = [tb.decode_frames(videos.path(i), range(8)) for i in range(8)]
        rngs = [tb.draw(0, i) for i in range(8)]
        x = tb.to_input(tb.augment_clips(clips, 16, rngs, **tb.WEAK), model)
        norm = model.stem[1]
        shift = norm.running_mean - model.stem[0](x).mean((0, 2, 3, 4))
        assert (shift.abs() / norm.running_var.sqrt()).mean() < 0.06


def torchrun(script, *argv, flags=(), interrupt=lambda: False):
    """Run a script in two processes; send Ctrl-C to all of them, as a terminal does, as soon as
    interrupt() says so."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, script, *map(str, argv)], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 150
    while process.poll() is None and not interrupt() and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


@pytest.fixture(scope="class")
def whole(toy, tmp_path_factory):
    """Stage 1 in two processes, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    return SimpleNamespace(done=torchrun("pretrain_inv.py", *stage_argv("inv", toy, out)), out=out)


@pytest.fixture(scope="class")
def killed(toy, tmp_path_factory):
    """The same, of which the second process is killed in the second epoch."""
    out = tmp_path_factory.mktemp("killed")
    begin = time.monotonic()
    dead = torchrun(__file__, "signalled", "step", 9, int(signal.SIGKILL), "pretrain_inv",
                    *stage_argv("inv", toy, out))
    return SimpleNamespace(dead=dead, seconds=time.monotonic() - begin, left=load(out, "inv"),
                           out=out)


class TestTorchrun:
    def test_two_processes_compute_what_one_does(self, chain, toy, tmp_path):
        found = []
        for processes in (1, 2):
            out = tmp_path / str(processes)
            out.mkdir()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared = {**os.environ, "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
            if processes == 2:
                shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            running = [subprocess.Popen(
                [sys.executable, __file__, "gradients_of_three_stages", toy, chain, out], cwd=HERE,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(processes)]
            for process in running:
                text, _ = process.communicate(timeout=200)
                assert process.returncode == 0, text.decode()[-3000:]
            found.append(torch.load(out / "found.pt"))
        one, two = found
        assert one.keys() == two.keys() and len(one) > 90
        for name, value in one.items():
            scale = float(value.abs().max())
            close = torch.allclose(value, two[name], rtol=1e-6, atol=1e-9 * (scale + 1))
            assert scale > 0 and close, name

    def test_two_processes_train_to_the_end(self, whole):
        assert whole.done.returncode == 0, whole.done.stderr[-3000:]
        assert load(whole.out, "inv")["finished"]

    def test_a_killed_process_ends_the_job_within_a_minute(self, killed):
        assert killed.dead.returncode != 0 and "exitcode  : -9" in killed.dead.stderr
        assert killed.seconds < 60
        assert (killed.left["epoch"], killed.left["finished"]) == (1, False)

    def test_max_restarts_goes_on_to_the_same_weights(self, whole, killed, toy):
        """From the checkpoint of the killed job, and once more after a kill."""
        again = torchrun(__file__, "signalled", "step", 3, int(signal.SIGKILL), "pretrain_inv",
                         *stage_argv("inv", toy, killed.out), flags=["--max-restarts=1"])
        assert again.returncode == 0, again.stderr[-3000:]
        assert same(load(whole.out, "inv")["model"], load(killed.out, "inv")["model"])
        assert len(read_log(killed.out, "inv")) == 3

    def test_two_nodes_join_again_after_a_restart(self, whole, toy, tmp_path):
        """Only the node that failed counts a restart; yet all processes must find each other."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = map(str, ["signalled", "step", 9, int(signal.SIGKILL), "pretrain_inv",
                         *stage_argv("inv", toy, tmp_path)])
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d",
                    f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two", __file__, *argv]
        nodes = [subprocess.Popen(launcher, cwd=HERE, text=True, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, start_new_session=True)
                 for _ in range(2)]
        try:
            errors = [node.communicate(timeout=150)[1] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        assert [node.returncode for node in nodes] == [0, 0], errors
        assert any("exitcode" in error or "SIGKILL" in error for error in errors), errors
        assert same(load(whole.out, "inv")["model"], load(tmp_path, "inv")["model"])

    def test_processes_agree_on_a_prefix_though_one_died_while_joining(self):
        store = torch.distributed.HashStore()
        store.set("asks/2", "of one that died before it was answered")
        prefixes = []
        for _ in range(2):  # a start, and a restart on the same store
            found = {}

            def join(place):
                found[place] = tb.agree_on_prefix(store, place, 3)

            threads = [threading.Thread(target=join, args=[k], daemon=True) for k in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert sorted(found) == [0, 1, 2] and len(set(found.values())) == 1
            prefixes.append(found[0])
        assert prefixes[0] != prefixes[1]

    def test_ctrl_c_saves_and_the_same_command_goes_on(self, toy, tmp_path):
        flags = ["--epochs", 6]
        done = torchrun("pretrain_inv.py", *stage_argv("inv", toy, tmp_path / "whole", *flags))
        assert done.returncode == 0, done.stderr[-3000:]
        argv = stage_argv("inv", toy, tmp_path / "stopped", *flags)
        log = tmp_path / "stopped/inv.log"
        stopped = torchrun("pretrain_inv.py", *argv,
                           interrupt=lambda: log.exists() and log.read_text().count("\n") >= 3)
        assert stopped.returncode != 0, stopped.stderr
        assert "interrupted; the same command goes on" in stopped.stderr, stopped.stderr
        saved = load(tmp_path / "stopped", "inv")
        assert 2 <= saved["epoch"] < 6 and not saved["finished"]
        assert torchrun("pretrain_inv.py", *argv, "--workers", 1).returncode == 0
        assert_same_checkpoints(tmp_path / "whole", tmp_path / "stopped", ["inv"])

    def test_two_processes_evaluate_to_the_same_results(self, chain, tmp_path):
        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        both = torchrun("evaluate.py", tmp_path, *EVALUATE)
        assert both.returncode == 0, both.stderr[-3000:]
        one, two = (read_results(folder) for folder in (chain, tmp_path))
        assert [{**r, "seconds": 0} for r in one] == [{**r, "seconds": 0} for r in two]

    def test_a_batch_that_cannot_be_shared_is_refused(self, toy, tmp_path, capsys):
        with OneOfTwo(), pytest.raises(SystemExit) as end:
            run_stage("inv", toy, tmp_path, "--batch", 5)
        assert end.value.code == 2
        assert "--batch 5 cannot be shared among 2 processes" in capsys.readouterr().err


# ---- On a GPU ----------------------------------------------------------------------------------

# Where there is none, a rehearsal on the CPU, so that these tests stay fit to run.
GPU = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = ["--device", GPU]
needs_gpu = pytest.mark.skipif(GPU == "cpu", reason="no GPU")


def on_both(function, *tensors):
    """A function's value and gradients on the CPU, and on the GPU in float32 and in bfloat16."""
    found = []
    for device, dtype in [("cpu", torch.float32), (GPU, torch.float32),
                          (GPU, torch.bfloat16)]:
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in tensors]
        value = function(*leaves)
        value.backward()
        found.append([t.float().cpu() for t in (value.detach(), *(x.grad for x in leaves))])
    return found


class NoWaiting(TorchDispatchMode):
    """Raises at a copy between devices that the host would wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [t for t in tree_leaves([args, out]) if isinstance(t, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and len({t.device.type for t in tensors}) > 1:
            assert kwargs.get("non_blocking"), function
        return out


@pytest.fixture(scope="class")
def exact_convolutions():
    """Without the tensor cores' shorter mantissa."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


@pytest.mark.usefixtures("exact_convolutions")
class TestCuda:
    @pytest.mark.parametrize("loss, count", [
        (tb.invariant_loss, 1), (tb.distinctive_loss, 2), (tb.unpooled_distinctive_loss, 2)])
    def test_losses_are_the_cpu_s(self, loss, count):
        torch.manual_seed(0)
        cpu, gpu, short = on_both(loss, *torch.randn(count, 8, 4, 128))
        for a, b, c in zip(cpu, gpu, short):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            assert torch.allclose(a, c, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("arch", ["r3d_tiny", "r3d_18", "slow_r50"])
    def test_networks_are_the_cpu_s(self, arch):
        torch.manual_seed(0)
        model = network(arch).eval()
        x = torch.randn(2, 3, 16, 64, 64).to(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            expected = model(x)
            gpu = copy.deepcopy(model).to(GPU, memory_format=torch.channels_last_3d)
            found = gpu(x.to(GPU)).cpu()
            with torch.autocast(GPU, torch.bfloat16):
                short = gpu(x.to(GPU)).float().cpu()
        scale = float(expected.abs().max())
        assert torch.allclose(found, expected, atol=1e-3 * scale)
        assert torch.allclose(short, expected, atol=0.1 * scale)

    def test_augmentation_is_the_cpu_s(self):
        clips = smooth_clips(60)
        cpu = tb.augment_clips(clips, 24, [tb.draw(0, k) for k in range(60)])
        gpu = tb.augment_clips([clip.to(GPU) for clip in clips], 24,
                               [tb.draw(0, k) for k in range(60)]).cpu()
        difference = (cpu.int() - gpu.int()).abs()
        assert difference.float().mean() < 0.5 and difference.max() <= 8

    @pytest.mark.parametrize("flags", [
        [], ["--checkpointing"], pytest.param(["--compile"], marks=needs_gpu)])
    @pytest.mark.parametrize("stage", ["inv", "dist", "labeled_only", "student"])
    def test_a_step_is_the_cpu_s(self, stage, flags, chain, toy, tmp_path):
        earlier_checkpoints(chain, tmp_path, stage)
        same = ["--restart"]
        if stage != "student":  # whose teachers saw the usual size
            same += ["--size", 32]  # in float32 a ReLU of a smaller network may flip
        cpu_terms, _, _ = one_step(stage, toy, tmp_path, *same)
        terms, gradients, _ = one_step(stage, toy, tmp_path, *same, *flags, *ON_GPU)
        for name, value in cpu_terms.items():
            assert torch.allclose(value, terms[name], rtol=0.02, atol=0.02), name
        assert all(g.device.type == GPU and g.isfinite().all() for g in gradients.values())

    @pytest.mark.parametrize("stage, count", [
        ("inv", 12), ("dist", 12), ("labeled_only", 4), ("student", 8)])
    def test_a_step_never_waits_for_the_gpu(self, stage, count, chain, toy, tmp_path, monkeypatch):
        """From the batch to the update: what stops the host raises."""
        earlier_checkpoints(chain, tmp_path, stage)
        next_batch = tb.Meter.next_batch
        update = tb.State.update
        steps = []

        def watched(meter):
            batch = next_batch(meter)
            torch.cuda.set_sync_debug_mode("error" if steps else "default")  # not the first
            return batch

        def unwatched(state, loss, learn):
            update(state, loss, learn)
            torch.cuda.set_sync_debug_mode("default")
            steps.append(1)

        monkeypatch.setattr(tb.Meter, "next_batch", watched)
        monkeypatch.setattr(tb.State, "update", unwatched)
        if GPU == "cpu":
            monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        run_stage(stage, toy, tmp_path, *ON_GPU)
        assert len(steps) == count

    @pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")
    @pytest.mark.parametrize("arch", ["r3d_18", "slow_r50"])
    def test_no_forward_pass_leaves_the_gpu(self, arch, monkeypatch):
        """By shapes, types and devices alone, so without a GPU, too."""
        # Autocast asks for the hardware.
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        rngs = [tb.draw(0, k) for k in range(40)]  # so many that each change has its takers
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda:0"):
                net = tb.Embedder(tb.build_model(arch, 5))
                videos = [torch.empty(16, 180, 320, 3, dtype=torch.uint8) for _ in rngs]
            with NoWaiting():
                clips = tb.augment_clips(videos, 112, rngs)
                with torch.autocast("cuda", torch.bfloat16):
                    x = tb.to_input(clips, net.backbone)
                    z = net(x, num_long=8, slices=4)
                    logits = net.backbone(x[:8])
                assert x.dtype == logits.dtype == torch.bfloat16
                z = z[:32].unflatten(0, (8, 4))
                p = logits.float().softmax(1)
                c = tb.temporal_similarity(z)
                p_teacher = tb.combine_teachers(p, p, tb.similarity_score(c, c))
                losses = [tb.invariant_loss(z), tb.distinctive_loss(z, z),
                          tb.unpooled_distinctive_loss(z, z), tb.distillation_loss(p, p_teacher)]
        assert all(loss.is_cuda and loss.dtype == torch.float32 for loss in losses)

    def test_dilated_convolution_is_cudnn_s(self):
        model = tb.build_model("r3d_18", 2).to(GPU, memory_format=torch.channels_last_3d)
        x = torch.randn(2, 3, 16, 64, 64, device=GPU)
        with torch.profiler.profile() as profile, torch.autocast(GPU, torch.bfloat16):
            model(x.to(memory_format=torch.channels_last_3d)).sum().backward()
        assert not any("slow_conv_dilated" in event.key for event in profile.key_averages())

    @needs_gpu
    def test_more_than_2_to_the_31_elements(self):
        """As in a step of over 167 clips of 16 x 224 x 224."""
        n = 176
        x = torch.randn(1, 64, 16, 112, 112, device=GPU, dtype=torch.bfloat16)
        x = x.repeat(n, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d)
        x *= torch.linspace(0.5, 2, n, device=GPU, dtype=torch.bfloat16).view(n, 1, 1, 1, 1)
        assert x.numel() > 2**31
        norm = tb.BatchNorm(64).to(GPU)
        layers = {
            "convolution": torch.nn.Conv3d(64, 64, 3, padding=1, bias=False).to(GPU).bfloat16(),
            "pooling": torch.nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            "normalisation": norm,
        }
        for name, layer in layers.items():
            with torch.no_grad():
                whole = layer(x)
                for some in (slice(0, 2), slice(n - 2, n)):
                    assert torch.allclose(whole[some], layer(x[some]), atol=0.05), name
                del whole

    @needs_gpu
    def test_chain_goes_on_under_nccl(self, toy, tmp_path):
        """With two GPUs each stage is interrupted first."""
        processes = min(2, torch.cuda.device_count())
        launch = functools.partial(torchrun, flags=[f"--nproc-per-node={processes}"])
        for stage, program in [("inv", "pretrain_inv"), ("dist", "pretrain_dist"),
                               ("ft", "finetune"), ("student", "train_student")]:
            argv = stage_argv(stage, toy, tmp_path, *ON_GPU)
            stopped = launch(__file__, "signalled", "step", 3, int(signal.SIGTERM), program, *argv)
            assert processes == 1 or stopped.returncode != 0
            done = launch(f"{program}.py", *argv)
            assert done.returncode == 0, done.stderr[-3000:]
        evaluate.main([str(tmp_path), *EVALUATE, *ON_GPU])
        names = [result["checkpoint"] for result in read_results(tmp_path)]
        assert sorted(names) == sorted(EVALUATED[1:])  # no baseline here


# ---- Mistakes of the user's: one line, exit status 2 -------------------------------------------

@pytest.fixture
def mistaken(chain, tmp_path):
    """A copy of the chain without student.pt, among files that no stage can use."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "student.pt").rename(tmp_path / "again.pt")
    (tmp_path / "hollow/train/class").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/list.txt").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/broken.pt").write_bytes((tmp_path / "inv.pt").read_bytes()[:5000])
    (tmp_path / "bad/text.pt").write_text("no tensors")
    other = load(chain, "inv_ft")
    torch.save({**other, "classes": other["classes"][:5]}, tmp_path / "bad/other.pt")
    return tmp_path


MISTAKES = [  # the flags, and what the line names
    (pretrain_inv, [
        ("--data ucf102", "--data"), ("--arch r3d_19", "--arch"), ("--frames x", "--frames"),
        ("--size 8", "--size"), ("--batch 1", "--batch"), ("--batch 25", "--batch 25"),
        ("--clips 1", "--clips"), ("--lr -1", "--lr"), ("--lr nan", "--lr"),
        ("--temperature 0", "--temperature"), ("--epochs 0", "--epochs"), ("--what", "--what"),
        ("--percent 5", "--percent"), ("--size 128 --precision bf16", "--precision fp32"),
        ("--data ucf101 --root /nowhere", "/nowhere"),
        ("--data hmdb51 --root /nowhere", "/nowhere"),
        ("--data folder --root /nowhere", "/nowhere"),
        ("--data folder --root OUT/empty", "train"),
        ("--data kinetics400 --root OUT/hollow", "no training videos"),
        ("--out OUT/inv.pt/x", "cannot be written")]),
    (pretrain_dist, [("--frames 8", "--frames 8"), ("--clips 3", "--clips 3")]),
    (finetune, [
        ("--percent 0", "--percent"), ("--percent 101", "--percent"), ("--init no.pt", "no.pt"),
        ("--out OUT/none", "pretrain_inv.py"), ("--init again.pt", "again.pt"),
        ("--arch r3d_18", "--arch"), ("--init OUT/bad/broken.pt", "broken.pt"),
        ("--init OUT/bad/text.pt", "text.pt"), ("--size 24", "--size"),
        ("--labeled-list no.txt", "no.txt"),
        ("--percent 5 --labeled-list no.txt", "--labeled-list"),
        ("--labeled-list OUT/empty/list.txt", "names no video")]),
    (train_student, [
        ("--teachers inv.pt dist.pt", "inv.pt"), ("--reweight 2", "--reweight"),
        ("--teachers inv_ft.pt inv_ft.pt", "--teachers"), ("--omega -1", "--omega"),
        ("--teachers OUT/bad/other.pt", "classes"), ("--teacher-loss l1", "--teacher-loss"),
        ("--init nothing.pt", "nothing.pt"), ("--percent 50", "--percent"),
        ("--batch 25", "unlabelled videos"),
        (" ".join(TINY) + " --lr 0.1 --name again", "lr")]),
    (evaluate, [
        ("OUT/inv.pt", "inv.pt"), ("/nowhere", "/nowhere"), ("OUT/empty", "empty"),
        ("OUT --scales 2", "--scales"), ("OUT --root /nowhere", "/nowhere"),
        ("OUT/bad/other.pt", "classes"),
        ("--videos OUT", "--checkpoint"),
        ("--videos OUT/bad --checkpoint OUT/inv.pt", "inv.pt")])]


class TestMistakes:
    def test_bf16_on_a_cpu_needs_amx(self, toy, tmp_path, monkeypatch, capsys):
        """Elsewhere oneDNN's gradients of convolutions over two time steps are wrong."""
        able = {"avx512_bf16": True, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
        assert not tb.has_bf16("cpu")
        with pytest.raises(SystemExit) as end:
            run_stage("inv", toy, tmp_path, "--precision", "bf16")
        assert end.value.code == 2 and "--precision fp32" in capsys.readouterr().err
        able["amx_bf16"] = True
        assert tb.has_bf16("cpu")

    @pytest.mark.parametrize("module, flags, word", [
        pytest.param(module, *case, id=f"{module.__name__} {case[0]}")
        for module, cases in MISTAKES for case in cases])
    def test_a_mistake_costs_one_line(self, module, flags, word, mistaken, toy, capsys):
        argv = flags.replace("OUT", str(mistaken)).split()
        if module is not evaluate:
            argv += [] if "--out" in argv else ["--out", str(mistaken)]
            argv += [] if "--root" in argv else ["--root", str(toy)]
            argv += ["--restart"] if module in (pretrain_inv, pretrain_dist) else []
        with pytest.raises(SystemExit) as end:
            module.main([*argv, "--device", "cpu"])
        error = capsys.readouterr().err.strip()
        assert end.value.code == 2 and word in error, error
        assert "\n" not in error and error.startswith(module.__name__), error

    def test_out_of_gpu_memory_names_the_flags_that_help(self, capsys):
        @tb.command
        def main(argv=None):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

        with pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err.strip()
        assert end.value.code == 2 and "\n" not in error
        assert all(flag in error for flag in ("--checkpointing", "--batch", "--size"))


# ---- What the tests run in other processes: python test_common.py NAME ARGUMENTS ---------------

PROBES = {f.__name__: f for f in (signalled, memory_of_100_epochs, gradients_of_three_stages)}

if __name__ == "__main__":
    PROBES[sys.argv[1]](*sys.argv[2:])
