"""Sanity checks, read in ten minutes and run in one on two cores:

    python -m pytest -q test_common.py

Losses against loops, TSTR, both networks against public keys and numbers, exact frames of a few
kinds of files, the labelled subset, a tiny chain of all stages with the label firewall, a kill and
a mistake. The folder tests/ holds the other tests and shares the chain and the helpers below."""

import argparse
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the tensors are small

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.transforms.v2 import functional as TF

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


class TestLosses:
    @pytest.mark.parametrize("seed", range(8))
    def test_losses_equal_the_paper_s_loops(self, seed):
        a, b, tau = two_views(seed)
        for loss, loop in [
                (tb.invariant_loss(a, tau), loop_invariant(a, tau)),
                (tb.distinctive_loss(a, b, tau), loop_distinctive(a, b, tau)),
                (tb.unpooled_distinctive_loss(a, b, tau), loop_unpooled(a, b, tau))]:
            assert loss.item() == pytest.approx(loop, rel=1e-4)

    def test_clips_that_look_alike_give_the_level_of_chance(self):
        B, n, tau = 5, 3, 0.5
        z = torch.ones(B, n, 8)
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

    @pytest.mark.parametrize("loss, sign", [
        (lambda z: tb.invariant_loss(z), 1),
        (lambda z: tb.distinctive_loss(z, z.detach()), -1)], ids=["invariant", "distinctive"])
    def test_a_step_makes_clips_of_a_video_alike_or_different(self, loss, sign):
        torch.manual_seed(0)
        z = (torch.randn(6, 1, 16) + 0.5 * torch.randn(6, 4, 16)).requires_grad_()
        gradient, = torch.autograd.grad(loss(z), z)
        before, after = (tb.temporal_similarity(x)[:, ~torch.eye(4, dtype=torch.bool)].mean()
                         for x in (z, z - 10 * gradient))
        assert sign * (after - before) > 0.005

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
        z, w = torch.randn(2, 8, 4, 128)
        for loss in (lambda: tb.invariant_loss(z), lambda: tb.distinctive_loss(z, w),
                     lambda: tb.unpooled_distinctive_loss(z, w),
                     lambda: tb.temporal_similarity(z).sum()):
            with torch.autocast("cpu", torch.bfloat16):
                inside = loss()
            assert inside.dtype == torch.float32 and torch.equal(inside, loss())


# ---- Temporal similarity based teacher reweighting (TSTR), and distillation ----------------------

class TestTSTR:
    def test_equations_5_to_7_equal_loops(self):
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

    def test_the_score_is_clamped_and_leaves_out_the_diagonal(self):
        ones = torch.ones(1, 3, 3)
        diagonal = 99 * torch.eye(3)[None]
        for c_inv, c_dist, expected in [
                (ones, ones, 1), (-ones, ones - 1, 0), (1.5 * ones, ones, 1),
                (0.5 * ones + diagonal, 0.25 * ones - diagonal, 0.375)]:
            assert tb.similarity_score(c_inv, c_dist).item() == pytest.approx(expected)

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

    @pytest.mark.parametrize("kind", ["l2", "kl", "js"])
    def test_distillation_of_one_hot_vectors_is_finite(self, kind):
        for dtype in (torch.float32, torch.bfloat16):
            one_hot = torch.eye(3)[:2].to(dtype)
            for teacher in (one_hot, one_hot.flip(0)):
                leaf = one_hot.clone().requires_grad_()
                value = tb.distillation_loss(leaf, teacher, kind)
                value.backward()
                assert value.isfinite() and leaf.grad.isfinite().all()

    @pytest.mark.parametrize("wrong", [
        lambda z: tb.invariant_loss(z[0]), lambda z: tb.invariant_loss(z[:1]),
        lambda z: tb.invariant_loss(z[:, :1]), lambda z: tb.distinctive_loss(z, z[:2]),
        lambda z: tb.unpooled_distinctive_loss(z, z[:, :2]),
        lambda z: tb.temporal_similarity(z[0]), lambda z: tb.similarity_score(z, z[:2]),
        lambda z: tb.combine_teachers(z[0], z[0], z[0]),
        lambda z: tb.distillation_loss(z[0], z[1, :2]),
        lambda z: tb.distillation_loss(z[0], z[1], "l1")])
    def test_wrong_shapes_are_refused(self, wrong):
        with pytest.raises(ValueError):
            wrong(torch.randn(3, 4, 8))


# ---- Networks, and public weights for them -------------------------------------------------------

@functools.cache  # to draw the weights takes longer than all the rest
def network(arch):
    """A fresh network of seven classes, to look at; copy it to change it."""
    torch.manual_seed(0)
    return tb.build_model(arch, 7).eval()


def hollow(build, *args, **settings):
    """A network without weights."""
    with torch.device("meta"):
        return build(*args, **settings)


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
    def test_r3d_18_is_torchvision_s_but_for_time_in_layer4(self):
        """The README shows the surgery that makes the stock network compute the same."""
        model = fill_by_formula(tb.build_model("r3d_18", 7))
        stock = hollow(torchvision.models.video.r3d_18, num_classes=7).eval()
        assert list(model.state_dict()) == list(stock.state_dict())
        stock.load_state_dict(model.state_dict(), assign=True)
        x = torch.randn(2, 3, 16, 48, 40)
        with torch.no_grad():
            logits = model(x)
            assert model.features(x).shape == (2, 512, 4)
            assert not torch.allclose(logits, stock(x), atol=1e-3)
            conv, shortcut = stock.layer4[0].conv1[0], stock.layer4[0].downsample[0]
            conv.stride, conv.dilation, conv.padding = (1, 2, 2), (2, 1, 1), (2, 1, 1)
            shortcut.stride = (1, 2, 2)
            assert torch.allclose(logits, stock(x), atol=1e-5)

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
        assert not network("slow_r50").blocks[4].res_blocks[2].branch2.norm_c.weight.any()
        assert model.blocks[5].dropout.p == 0.5


    @pytest.mark.parametrize("arch, dim, frames", [
        ("r3d_tiny", 96, 4), ("r3d_18", 512, 4), ("slow_r50", 2048, 16)])
    def test_features_are_pooled_over_space_only(self, arch, dim, frames):
        model = network(arch)
        x = torch.randn(1, 3, 16, 32, 48)
        with torch.no_grad():
            assert model.features(x).shape == (1, dim, frames)
            assert model(x).shape == (1, 7)

    def test_projection_head_is_the_paper_s(self):
        head = tb.ProjectionHead(2048)
        kinds = [type(module).__name__ for module in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
        assert head[3].bias is None
        assert head(torch.randn(4, 2048)).norm(dim=1).allclose(torch.ones(4))

    def test_embedder_pools_short_clips_and_slices_long_ones(self):
        torch.manual_seed(0)
        embedder = tb.Embedder(tb.build_model("r3d_tiny", 3)).eval()
        x = torch.randn(6, 3, 16, 32, 32)
        z = embedder(x, num_long=2, slices=4)
        f = embedder.backbone.features(x)
        assert z.shape == (4 + 2 * 4, 128)
        assert torch.allclose(z[:4], embedder.head(f[:4].mean(2)), atol=1e-6)
        for long, t in np.ndindex(2, 4):  # slice t of long clip `long`
            expected = embedder.head(f[4 + long, :, t][None])[0]
            assert torch.allclose(z[4 + 4 * long + t], expected, atol=1e-6)
        for name, p in embedder.backbone.named_parameters():
            assert p.requires_grad != name.startswith("fc.")  # all but the classifier are trained

    @pytest.mark.parametrize("form", ["torchvision", "pytorchvideo", "tclr"])
    def test_public_weights_are_taken_but_for_the_classifier(self, form):
        arch, public, content = public_checkpoint(form)
        model = hollow(tb.build_model, arch, 7).to_empty(device="cpu")
        for w in model.state_dict().values():
            w.fill_(7)
        taken, left = tb.load_backbone(model, content)
        assert taken == len(public) - 2 and left == 2
        for key, w in model.state_dict().items():
            if key.startswith(("fc.", "blocks.5.proj.")):
                assert (w == 7).all()
            elif form == "tclr" and key == "stem.0.weight":
                assert torch.equal(w, public[key].flip(1))  # TCLR read BGR frames
            else:
                assert torch.equal(w, public[key])

    def test_weights_that_do_not_fit_are_refused(self):
        r3d = torchvision_weights()
        for arch, saved in [("slow_r50", r3d), ("r3d_18", {"state_dict": {}}), ("r3d_tiny", r3d),
                            ("r3d_18", {"a": 1})]:
            with pytest.raises(ValueError):
                tb.load_backbone(hollow(tb.build_model, arch, 7), saved)
        with pytest.raises(ValueError, match="r3d_tiny"):
            tb.build_model("r3d_19", 3)


# ---- Exact frames of a few kinds of files, and augmentation --------------------------------------

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



def full_decode(path):
    """All frames, by PyAV's plainest means."""
    with av.open(str(path), **tb.OPEN) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


X264 = {"g": "30", "bf": "2"}
FEW_KINDS = {
    "xvid-like.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "variable-rate.mkv": {"codec": "libvpx-vp9", "options": {"g": "30"},
                          "pts": [t * t // 8 + t for t in range(96)]},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
}


class TestDecoder:
    @pytest.mark.parametrize("name", FEW_KINDS)
    def test_frames_are_those_of_a_full_decode(self, name, tmp_path):
        path = write_video(tmp_path / name, moving_frames(96), **FEW_KINDS[name])
        expected = full_decode(path)
        count = len(expected)
        assert count >= 95
        for indices in ([0], range(60, 64), [count - 1, 0, count // 2, 0], range(count)):
            frames = tb.decode_frames(path, indices)
            assert frames.dtype == torch.uint8
            assert np.array_equal(frames.numpy(), expected[list(indices)]), indices
        with pytest.raises(IndexError):
            tb.decode_frames(path, [count])

    def test_short_side_scales_down_and_never_up(self, tmp_path):
        tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
        assert tb.decode_frames(tall, [3], short_side=32).shape == (1, 48, 32, 3)
        assert tb.decode_frames(tall, [3], short_side=200).shape == (1, 96, 64, 3)

    def test_a_short_video_is_slowed_down_never_dropped(self):
        assert tb.clip_indices(100, 4, 2, 0).tolist() == [0, 2, 4, 6]
        assert tb.clip_indices(100, 4, 2, 1).tolist() == [93, 95, 97, 99]
        assert tb.clip_indices(14, 8, 2).tolist() == [0, 1, 3, 5, 7, 8, 10, 12]
        assert tb.clip_indices(1, 3, 2).tolist() == [0, 0, 0]


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


class TestAugmentation:
    @pytest.mark.parametrize("strength", [{}, tb.WEAK], ids=["strong", "weak"])
    def test_clips_together_are_changed_as_each_alone_by_torchvision(self, strength):
        clips = smooth_clips(60)
        together = tb.augment_clips(clips, 24, [tb.draw(0, k) for k in range(60)], **strength)
        for k, clip in enumerate(clips):
            alone = one_by_one(clip, 24, tb.draw(0, k), *strength.values())
            assert (together[k].int() - alone.int()).abs().max() <= 1, k

    def test_all_frames_of_a_clip_are_changed_alike_and_each_key_in_its_own_way(self):
        torch.manual_seed(0)
        still = torch.randint(256, (1, 40, 56, 3), dtype=torch.uint8).expand(6, -1, -1, -1)
        clips, again = (tb.augment_clips([still] * 20, 24, [tb.draw(0, k) for k in range(20)])
                        for _ in range(2))
        assert clips.shape == (20, 6, 3, 24, 24) and clips.dtype == torch.uint8
        assert torch.equal(clips, again) and (clips == clips[:, :1]).all()
        assert len(torch.unique(clips, dim=0)) == 20

    def test_the_network_s_input_is_the_centre_normalised(self):
        clip = moving_frames(6, 40, 56)
        crop = tb.centre_crop(torch.tensor(clip), 20, 0.5)
        assert np.array_equal(crop.numpy(), clip[:, 10:30, 18:38].transpose(0, 3, 1, 2))
        model = network("r3d_tiny")
        x = tb.to_input([crop, crop], model)
        expected = crop.permute(1, 0, 2, 3) / 255 - model.mean.view(3, 1, 1, 1)
        expected /= model.std.view(3, 1, 1, 1)
        assert x.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.allclose(x[1], expected, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tb.to_input([crop, crop], model), x.bfloat16())  # rounded once


# ---- The labelled subset, and the toy videos -----------------------------------------------------

NAMES = [f"c{c}/v{i}.avi" for c, count in enumerate((3, 40, 101)) for i in range(count)]


def subset(percent, seed=0, order=slice(None)):
    """The names that labeled_subset chooses from NAMES."""
    names = NAMES[order]
    labels = np.array([int(name[1]) for name in names])
    return {names[i] for i in tb.labeled_subset(names, labels, percent, seed)}


class TestData:
    @pytest.mark.parametrize("percent", [1, 5, 10, 50, 100])
    def test_labelled_subset_has_its_share_of_each_class(self, percent):
        chosen = subset(percent)
        counts = [sum(name.startswith(f"c{c}/") for name in chosen) for c in range(3)]
        assert counts == [max(1, round(percent / 100 * n)) for n in (3, 40, 101)]
        assert chosen == subset(percent, order=slice(None, None, -1))

    def test_labelled_subsets_are_nested_and_depend_on_the_seed(self):
        assert subset(1) < subset(5) < subset(10) < subset(50) < subset(100) == set(NAMES)
        assert subset(5) != subset(5, seed=1)
        assert tb.labeled_subset(["u/1.avi"], [-1], 100).tolist() == []  # no class

    def test_toy_set_is_balanced_and_depends_on_the_seed_alone(self, toy, tmp_path):
        tb.render_toy(tmp_path, train=24, test=8)
        train = tb.read_videos("toy", toy, True)
        test = tb.read_videos("toy", toy, False)
        assert len(train) == 24 and len(test) == len(train.classes) == 8
        assert not set(train.names()) & set(test.names())
        assert np.bincount(train.labels).tolist() == [3] * 8
        for i in range(24):
            again = tmp_path / "UCF-101" / train.name(i)
            assert Path(train.path(i)).read_bytes() == again.read_bytes()
            frames = tb.decode_frames(train.path(i), range)
            assert 64 <= len(frames) <= 96 and frames.shape[1:] == (40, 56, 3)


# ---- A tiny chain of all stages, a kill and a mistake --------------------------------------------

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


def run_chain(root, out, *finetune_flags):
    for stage in STAGES:
        run_stage(stage, root, out, *(finetune_flags if STAGES[stage][0] is finetune else ()))
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


def assert_same_checkpoints(a, b, names=CHECKPOINTS, but=("args", "log")):
    for name in names:
        x = load(a, name)
        y = load(b, name)
        assert x.keys() == y.keys()
        for key in x.keys() - set(but):
            assert same(x[key], y[key]), (name, key)


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


def die(moment, count, program, *argv):
    """Run a program that SIGKILL ends at the count-th "step" of the optimiser or "write" of a file.
    Of torchrun's processes the second one dies, and not after a restart."""
    chosen = os.environ.get("RANK", "1") == "1"
    chosen = chosen and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    counter = itertools.count(1)
    replace = os.replace

    def kill(*_):
        if next(counter) == int(count) and chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step":
        register_optimizer_step_post_hook(kill)
    else:  # the new file is complete, and the old one is still in its place
        os.replace = lambda *names: kill() or replace(*names)
    importlib.import_module(program).main(argv)


def run_and_kill(moment, count, stage, *argv):
    """Run a stage in a process that is killed, see die() -> its exit status."""
    process = multiprocessing.get_context("fork").Process(
        target=die, args=(moment, count, STAGES[stage][0].__name__, *stage_argv(stage, *argv)))
    process.start()
    process.join()
    return process.exitcode


class TestChain:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_each_stage_leaves_its_checkpoint_and_its_log(self, name, chain):
        saved = load(chain, name)
        assert saved["finished"] and saved["epoch"] == 2 and len(saved["classes"]) == 8
        tb.build_model("r3d_tiny", 8).load_state_dict(saved["model"])  # strict: the head is apart
        assert ("similarity" in saved) == (name.removesuffix("_ft") in ("inv", "dist"))
        first, *epochs = read_log(chain, name)
        assert first["torch"] == torch.__version__
        assert [line["epoch"] for line in epochs] == [1, 2]
        assert all(math.isfinite(line["loss"]) for line in epochs)

    def test_every_classifier_is_evaluated(self, chain):
        results = read_results(chain)
        assert [r["checkpoint"] for r in results] == EVALUATED
        for r in results:
            assert r["videos"] == 8 and r["labeled_count"] == 8
            assert 0 <= r["top1"] <= r["top5"] <= 100
            # one test video a class
            assert r["top1"] == pytest.approx(np.mean(list(r["per_class"].values())))

    def test_label_firewall(self, chain, toy, tmp_path):
        """Stages see the labels of the labelled videos alone. All other videos move to another
        class: the same weights come out; the evaluation, which reads the test labels, changes."""
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
            file.write_text("\n".join(names))
        run_chain(root, tmp_path / "out", "--labeled-list", chain / "labeled.txt")
        for name in CHECKPOINTS:
            assert same(load(chain, name)["model"], load(tmp_path / "out", name)["model"]), name
        assert read_results(chain) != read_results(tmp_path / "out")

    def test_a_killed_stage_goes_on_to_the_same_weights(self, chain, toy, tmp_path):
        """SIGKILL in the middle of the second epoch; then the same command, with a worker."""
        assert run_and_kill("step", 9, "inv", toy, tmp_path) == -signal.SIGKILL
        left = load(tmp_path, "inv")
        assert (left["epoch"], left["step"], left["finished"]) == (1, 0, False)
        run_stage("inv", toy, tmp_path, "--workers", 1)
        assert_same_checkpoints(chain, tmp_path, ["inv"])
        assert [line.get("epoch") for line in read_log(tmp_path, "inv")] == [None, 1, 2]

    def test_a_mistake_costs_one_line(self, chain, toy, capsys):
        with pytest.raises(SystemExit) as end:
            run_stage("student", toy, chain, "--arch", "r3d_18")
        error = capsys.readouterr().err.strip()
        assert end.value.code == 2 and "\n" not in error
        assert error.startswith("train_student") and "--arch r3d_18" in error


if __name__ == "__main__":  # so that torchrun can run it: test_common.py step 9 PROGRAM ...
    die(*sys.argv[1:])
