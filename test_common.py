"""Tests: pytest test_common.py (a few minutes on two cores).

Those that read real UCF101, HMDB51 and Kinetics files look for them, and for the official lists, in the folder named by
TIMEBALANCE_TEST_DATA (videos/ and splits/), and are skipped where it is not set."""

import argparse
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in what the tests start: the tensors are small

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common as tb
import evaluate
import finetune
import pretrain_dist
import pretrain_inv
import train_student

HERE = Path(tb.__file__).parent

# ---- Losses and TSTR, against loops transcribed from the paper -------------------------------------------------------

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


def loop_distinctive(z, z_aug, tau):  # Eq. 3, with the positive in the denominator, either view as anchor
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


def loop_unpooled(z_local, z_global, tau):  # Fig. 7: aligned clip and slice agree, misaligned ones do not
    B, n, _ = z_local.shape
    total = 0
    for i in range(B):
        for t in range(n):
            aligned = h(z_local[i, t], z_global[i, t], tau)
            total -= math.log(aligned / sum(h(z_local[i, t], z_global[i, k], tau) for k in range(n)))
            total -= math.log(aligned / sum(h(z_local[i, k], z_global[i, t], tau) for k in range(n)))
    return total / (2 * B * n)


@pytest.mark.parametrize("seed", range(8))
def test_losses_equal_the_paper_s_loops(seed):
    rng = np.random.default_rng(seed)
    B, n, d, tau = rng.integers(2, 7), rng.integers(2, 6), rng.integers(2, 40), float(rng.uniform(0.07, 1))
    a, b = (torch.tensor(rng.normal(0, rng.uniform(0.1, 10), (B, n, d)), dtype=torch.float64) for _ in range(2))
    assert tb.invariant_loss(a, tau).item() == pytest.approx(loop_invariant(a, tau), rel=1e-4)
    assert tb.distinctive_loss(a, b, tau).item() == pytest.approx(loop_distinctive(a, b, tau), rel=1e-4)
    assert tb.unpooled_distinctive_loss(a, b, tau).item() == pytest.approx(loop_unpooled(a, b, tau), rel=1e-4)


def test_losses_closed_form():
    tau, B, n = 0.5, 5, 3
    same = torch.ones(B, n, 8)  # every h is exp(1 / tau): only the number of terms counts
    assert tb.invariant_loss(same, tau).item() == pytest.approx(math.log(2 * B - 1))
    assert tb.distinctive_loss(same, same, tau).item() == pytest.approx(math.log(2 * n - 1))
    assert tb.unpooled_distinctive_loss(same, same, tau).item() == pytest.approx(math.log(n))
    videos = torch.eye(B)[:, None].expand(B, n, B)  # clips of one video equal, of two orthogonal
    assert tb.invariant_loss(videos, tau).item() == pytest.approx(math.log(1 + 2 * (B - 1) * math.exp(-1 / tau)))
    clips = torch.eye(n).expand(B, n, n)  # clips of one video orthogonal, both augmentations equal
    assert tb.distinctive_loss(clips, clips, tau).item() == pytest.approx(
        math.log(1 + 2 * (n - 1) * math.exp(-1 / tau)))
    assert tb.unpooled_distinctive_loss(clips, clips, tau).item() == pytest.approx(
        math.log(1 + (n - 1) * math.exp(-1 / tau)))


def test_losses_pull_and_push_the_right_way():
    """Down the gradient, clips of one video approach under L_I and part under L_D1; aligned clip and slice approach."""
    torch.manual_seed(0)
    z = (torch.randn(6, 1, 16) + 0.5 * torch.randn(6, 4, 16)).requires_grad_()
    other = torch.randn(6, 4, 16)
    off_diagonal = ~torch.eye(4, dtype=torch.bool)

    def change(loss, measure):
        gradient, = torch.autograd.grad(loss, z)
        return (measure(z - 10 * gradient) - measure(z)).item()

    def likeness(z):
        return tb.temporal_similarity(z)[:, off_diagonal].mean()

    assert change(tb.invariant_loss(z), likeness) > 0.005
    assert change(tb.distinctive_loss(z, z.detach()), likeness) < -0.005
    assert change(tb.unpooled_distinctive_loss(z, other), lambda z: F.cosine_similarity(z, other, dim=2).mean()) > 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_at_the_corners(dtype):
    corners = {"identical": torch.ones(2, 2, 4), "opposite": torch.tensor([[[1.0], [-1]], [[-1], [1]]]),
               "huge": 1e4 * torch.randn(2, 2, 4), "zero": torch.zeros(2, 2, 4)}
    for z in corners.values():
        for loss in (tb.invariant_loss, lambda z: tb.distinctive_loss(z, z),
                     lambda z: tb.unpooled_distinctive_loss(z, z)):
            leaf = z.to(dtype).requires_grad_()
            value = loss(leaf)
            value.backward()
            assert value.dtype == torch.float32 and value.isfinite() and leaf.grad.isfinite().all()
    one_hot = torch.eye(3)[:2].to(dtype)
    for kind in ("l2", "kl", "js"):
        for teacher in (one_hot, one_hot.flip(0)):
            leaf = one_hot.clone().requires_grad_()
            value = tb.distillation_loss(leaf, teacher, kind)
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all()


def test_losses_are_float32_inside_autocast():
    torch.manual_seed(0)
    z, w = torch.randn(8, 4, 128), torch.randn(8, 4, 128)
    for loss in (lambda: tb.invariant_loss(z), lambda: tb.distinctive_loss(z, w),
                 lambda: tb.temporal_similarity(z).sum(), lambda: tb.unpooled_distinctive_loss(z, w)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss()
        assert inside.dtype == torch.float32 and torch.equal(inside, loss())


def test_losses_refuse_wrong_shapes():
    z = torch.randn(3, 4, 8)
    for wrong in (lambda: tb.invariant_loss(z[0]), lambda: tb.invariant_loss(z[:1]),
                  lambda: tb.invariant_loss(z[:, :1]), lambda: tb.distinctive_loss(z, z[:2]),
                  lambda: tb.unpooled_distinctive_loss(z, z[:, :2]),
                  lambda: tb.temporal_similarity(z[0]), lambda: tb.similarity_score(z, z[:2]),
                  lambda: tb.combine_teachers(z[0], z[0], z[0]), lambda: tb.distillation_loss(z[0], z[1, :2]),
                  lambda: tb.distillation_loss(z[0], z[1], "l1")):
        with pytest.raises(ValueError):
            wrong()


def test_tstr_equals_the_paper_s_sums():
    torch.manual_seed(0)
    z_inv, z_dist = torch.randn(5, 4, 16) + 1, torch.randn(5, 4, 16) + 0.5
    c_inv, c_dist = tb.temporal_similarity(z_inv), tb.temporal_similarity(z_dist)
    p_inv, p_dist = torch.rand(5, 7).softmax(1), torch.rand(5, 7).softmax(1)
    s = tb.similarity_score(c_inv, c_dist)
    p = tb.combine_teachers(p_inv, p_dist, s)
    for i in range(5):
        total = 0
        for t1 in range(4):
            for t2 in range(4):
                assert c_inv[i, t1, t2].item() == pytest.approx(
                    float(F.cosine_similarity(z_inv[i, t1], z_inv[i, t2], 0)), abs=1e-6)  # Eq. 5
                if t1 != t2:
                    total += float(c_inv[i, t1, t2] + c_dist[i, t1, t2])
        assert s[i].item() == pytest.approx(total / (2 * 4 * 3), abs=1e-6)  # Eq. 6
        assert torch.allclose(p[i], s[i] * p_inv[i] + (1 - s[i]) * p_dist[i])  # Eq. 7
    assert torch.allclose(p.sum(1), torch.ones(5))


def test_similarity_score_is_clamped():
    ones = torch.ones(1, 3, 3)
    assert tb.similarity_score(ones, ones).item() == 1
    assert tb.similarity_score(-ones, ones - 1).item() == 0
    assert tb.similarity_score(1.5 * ones, ones).item() == 1
    diagonal = 99 * torch.eye(3)[None]
    assert tb.similarity_score(0.5 * ones + diagonal, 0.25 * ones + diagonal).item() == pytest.approx(0.375)


def test_distillation_losses():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    l2 = 2 * 0.25 ** 2 + 0.5 ** 2
    kl_of_teacher = 0.25 * math.log(0.25 / 0.5) * 2 + 0.5 * math.log(0.5 / 1e-8)
    m = [0.375, 0.375, 0.25]
    js = (2 * 0.5 * math.log(0.5 / m[0]) + 2 * 0.25 * math.log(0.25 / m[0]) + 0.5 * math.log(0.5 / m[2])) / 2
    for kind, value in {"l2": l2, "kl": kl_of_teacher, "js": js}.items():  # the second row is equal: mean over two
        assert tb.distillation_loss(p, q, kind).item() == pytest.approx(value / 2, rel=1e-5)
    q[0] = torch.tensor([0.1, 0.6, 0.3])
    p[0] = torch.tensor([0.3, 0.3, 0.4])
    assert tb.distillation_loss(p, q, "kl").item() == pytest.approx(float(F.kl_div(p.log(), q, reduction="batchmean")))


# ---- Models ----------------------------------------------------------------------------------------------------------

def fill_by_formula(model):
    """Weights and statistics that anyone can compute, in eval mode."""
    for k, (name, w) in enumerate(model.state_dict().items()):
        wave = torch.cos(torch.arange(w.numel(), dtype=torch.float64) * (1 + k / 10)).view(w.shape)
        if w.ndim == 5:
            w.copy_(wave * (2 / w[0].numel()) ** 0.5)
        elif "norm" in name and name.endswith(("weight", "running_var")):
            w.copy_(1 + wave / 2)
        elif w.dtype.is_floating_point:
            w.copy_(wave / 10)
    return model.eval()


def stock_r3d_18_with_the_readme_s_surgery(num_classes):
    stock = torchvision.models.video.r3d_18(num_classes=num_classes)
    conv, shortcut = stock.layer4[0].conv1[0], stock.layer4[0].downsample[0]
    conv.stride, conv.dilation, conv.padding, shortcut.stride = (1, 2, 2), (2, 1, 1), (2, 1, 1), (1, 2, 2)
    return stock


def test_r3d_18_is_torchvision_s_but_for_time_in_layer4():
    torch.manual_seed(0)
    own, stock = tb.build_model("r3d_18", 7), stock_r3d_18_with_the_readme_s_surgery(7)
    for module in own.modules():  # statistics and scales that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    stock.load_state_dict(own.state_dict(), strict=True)
    assert list(own.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 3, 16, 48, 40)
    with torch.no_grad():
        logits = own.eval()(x)
        assert torch.allclose(logits, stock.eval()(x), atol=1e-5)
        assert own.features(x).shape == (2, 512, 4)
        plain = torchvision.models.video.r3d_18(num_classes=7).eval()
        plain.load_state_dict(own.state_dict())
        assert not torch.allclose(logits, plain(x), atol=1e-3)


def test_slow_r50_is_pytorchvideo_s():
    """The expected logits come from pytorchvideo.models.hub.slow_r50 0.1.5, in float64 (its pool made adaptive)."""
    assert sum(p.numel() for p in tb.build_model("slow_r50", 400).parameters()) == 32_454_096
    model = fill_by_formula(tb.build_model("slow_r50", 5))
    keys = list(model.state_dict())
    assert keys[0] == "blocks.0.conv.weight" and keys[-2:] == ["blocks.5.proj.weight", "blocks.5.proj.bias"]
    for key, shape in {"blocks.0.norm.running_mean": (64,), "blocks.1.res_blocks.0.branch1_norm.weight": (256,),
                       "blocks.1.res_blocks.2.branch2.conv_a.weight": (64, 256, 1, 1, 1),
                       "blocks.2.res_blocks.3.branch2.conv_b.weight": (128, 128, 1, 3, 3),
                       "blocks.3.res_blocks.5.branch2.conv_a.weight": (256, 1024, 3, 1, 1),
                       "blocks.4.res_blocks.0.branch1_conv.weight": (2048, 1024, 1, 1, 1),
                       "blocks.4.res_blocks.2.branch2.norm_c.num_batches_tracked": ()}.items():
        assert model.state_dict()[key].shape == shape
    assert len(keys) == 320 and not any("res_blocks.1.branch1" in key for key in keys)
    x = torch.cos(torch.arange(3 * 8 * 64 * 64, dtype=torch.float64)).float().view(1, 3, 8, 64, 64)
    with torch.no_grad():
        expected = [0.29953622, 0.08540572, -0.19857994, -0.23216664, -0.07341280]
        assert torch.allclose(model(x), torch.tensor([expected]), atol=1e-5)
        assert model.features(x).shape == (1, 2048, 8)
    fresh = tb.build_model("slow_r50", 5)
    assert not fresh.blocks[4].res_blocks[2].branch2.norm_c.weight.any() and fresh.blocks[5].dropout.p == 0.5


def test_every_arch_gives_features_pooled_over_space_only():
    for arch, dim, frames in [("r3d_tiny", 128, 4), ("r3d_18", 512, 4), ("slow_r50", 2048, 16)]:
        model = tb.build_model(arch, 3).eval()
        x = torch.randn(1, 3, 16, 32, 48)
        with torch.no_grad():
            f = model.features(x)
            assert f.shape == (1, dim, frames)
            assert model(x).shape == (1, 3)
    with pytest.raises(ValueError, match="r3d_tiny"):
        tb.build_model("r3d_19", 3)


def test_projection_head_and_embedder():
    torch.manual_seed(0)
    head = tb.ProjectionHead(2048)
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"] and head[3].bias is None
    assert head(torch.randn(4, 2048)).norm(dim=1).allclose(torch.ones(4))
    embedder = tb.Embedder(tb.build_model("r3d_tiny", 3)).eval()
    x = torch.randn(6, 3, 16, 32, 32)  # four short clips, two long ones
    z = embedder(x, num_long=2, slices=4)
    f = embedder.backbone.features(x)
    assert z.shape == (4 + 2 * 4, 128)
    assert torch.allclose(z[:4], embedder.head(f[:4].mean(2)), atol=1e-6)
    for long in (0, 1):
        for t in range(4):  # slice t of long clip `long`
            assert torch.allclose(z[4 + 4 * long + t], embedder.head(f[4 + long, :, t][None])[0], atol=1e-6)
    assert not [n for n, p in embedder.backbone.named_parameters() if n.startswith("fc.") == p.requires_grad]


# ---- The decoder, on files of many kinds -----------------------------------------------------------------------------

def moving_frames(count, height=48, width=64, seed=0):
    """Frames of which no two are alike: a gradient that moves, and a number in binary."""
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([(x * 3 + 7 * t + seed) % 256, (y * 4 + 5 * t) % 256, (x + y + 11 * t) % 256], -1)
                       for t in range(count)]).astype(np.uint8)
    for t in range(count):
        for bit in range(8):
            frames[t, :12, bit * 8:bit * 8 + 6] = 255 * (t >> bit & 1)
    return frames


def write_video(path, frames, codec="mpeg4", pix_fmt="yuv420p", options=None, pts=None, rotation=0, cover=False,
                extra=(), before=()):
    """Encode RGB frames. before, extra: more streams, as (codec, frames), in front of the video or behind it."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if str(path).endswith("mp4") else {}) as container:
        def add(codec, frames):
            if codec in ("aac", "mp2", "libopus"):
                return container.add_stream(codec, rate=48000), frames
            stream = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
            if cover:
                stream.disposition = av.stream.Disposition.attached_pic
            if rotation:
                stream.set_display_rotation(rotation)
            return stream, frames

        streams = [add(*s) for s in before] + [add(codec, frames)] + [add(*s) for s in extra]
        for stream, content in streams:
            if stream.type == "audio":
                for k in range(40):
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                    frame.sample_rate, frame.pts = 48000, 1024 * k
                    container.mux(stream.encode(frame))
            else:
                for t, array in enumerate(content):
                    frame = av.VideoFrame.from_ndarray(array, "rgb24")
                    if pts is not None:
                        frame.pts, frame.time_base = pts[t], Fraction(1, 25)
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def full_decode(path, stream=0):
    """All frames, by PyAV's plainest means."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=stream)])


X264 = {"g": "30", "bf": "2"}
KINDS = {
    "xvid-like.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.avi": {"codec": "libx264", "options": X264},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "long-gop.mp4": {"codec": "libx264", "options": {"g": "250", "bf": "3"}},
    "open-gop.mp4": {"codec": "libx264", "options": {**X264, "x264-params": "open-gop=1:scenecut=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"g": "30", "x265-params": "log-level=none:pools=1"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "30", "svtav1-params": "lp=1"}},
    "h264.mkv": {"codec": "libx264", "options": X264},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "30"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "30"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "h264.ts": {"codec": "libx264", "options": X264},
    "444.mp4": {"codec": "libx264", "pix_fmt": "yuv444p", "options": X264},
    "10-bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none:pools=1"}},
    "12-bit.mkv": {"codec": "libx265", "pix_fmt": "yuv444p12le", "options": {"x265-params": "log-level=none:pools=1"}},
    "full-range.mp4": {"codec": "libx264", "pix_fmt": "yuvj420p", "options": X264},
    "bt709.mp4": {"codec": "libx264", "options": {**X264, "colorspace": "bt709", "color_range": "tv"}},
    "late-start.mp4": {"codec": "libx264", "options": X264, "pts": [t + 1000 for t in range(96)]},
    "late-start.mkv": {"codec": "libx264", "options": X264, "pts": [t + 1000 for t in range(96)]},
    "variable-rate.mp4": {"codec": "libx264", "options": X264, "pts": [t * 3 // 2 + t // 10 * 25 for t in range(96)]},
    "variable-rate.mkv": {"codec": "libvpx-vp9", "options": {"g": "30"}, "pts": [t * t // 8 + t for t in range(96)]},
    "audio-first.mp4": {"codec": "libx264", "options": X264, "before": [("aac", None)]},
    "two-videos.mp4": {"codec": "libx264", "options": X264, "extra": [("libx264", moving_frames(20, 32, 32))]},
}


@pytest.mark.parametrize("name", KINDS)
def test_decode_frames_equals_a_full_decode(name, tmp_path):
    path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
    expected = full_decode(path)
    assert len(expected) >= 95
    check_exact(path, expected)


def check_exact(path, expected):
    count, rng = len(expected), np.random.default_rng(0)
    ranges = [[start, *range(start + 1, min(count, start + length))]
              for start, length in zip(rng.integers(count, size=12), rng.integers(1, 40, size=12))]
    for indices in [[0], [count - 1], [count - 1, 0, count // 2, 0], range(count), *ranges]:
        frames = tb.decode_frames(path, indices)
        assert frames.dtype == torch.uint8 and np.array_equal(frames.numpy(), expected[list(indices)]), indices
    with pytest.raises(IndexError):
        tb.decode_frames(path, [count])
    asked = []
    last = tb.decode_frames(path, lambda n: asked.append(n) or [n - 1])  # files can have more packets than frames
    assert np.array_equal(last[0].numpy(), expected[-1]) and asked[-1] == count


@pytest.mark.parametrize("name, most", [
    ("xvid-like.avi", 16), ("h264.mp4", 34), ("h264.mkv", 34), ("vp9.webm", 34),  # from the keyframe before
    ("b-frames.avi", 64), ("h264.avi", 64), ("mpeg2.mpg", 64), ("mpeg2.ts", 64)])  # counted from the start: no trial
def test_decode_frames_decodes_what_it_must_and_no_more(name, most, tmp_path, monkeypatch):
    path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
    decoded, decode = [], tb.decode

    def counted(*args):
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(tb, "decode", counted)
    frames = tb.decode_frames(path, range(60, 64))
    assert np.array_equal(frames.numpy(), full_decode(path)[60:64])
    assert len(decoded) == most if most == 64 else 4 <= len(decoded) <= most


def test_decode_frames_in_any_size_and_orientation(tmp_path):
    tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
    assert tb.decode_frames(tall, [3], short_side=32).shape == (1, 48, 32, 3)
    assert tb.decode_frames(tall, [3], short_side=200).shape == (1, 96, 64, 3)  # never up
    odd = write_video(tmp_path / "odd.mkv", moving_frames(20, 47, 61), "libx264", "yuv444p")
    check_exact(odd, full_decode(odd))
    for codec in ("mjpeg", "libvpx-vp9"):
        odd = write_video(tmp_path / f"odd-{codec}.mkv", moving_frames(20, 47, 61), codec,
                          "yuvj420p" if codec == "mjpeg" else "yuv420p")
        check_exact(odd, full_decode(odd))
    small = tb.decode_frames(tall, range(20), short_side=32)
    resized = torchvision.transforms.v2.functional.resize(
        tb.decode_frames(tall, range(20)).permute(0, 3, 1, 2), [48, 32], antialias=True).permute(0, 2, 3, 1)
    assert (small.float() - resized.float()).abs().mean() < 4  # scaled, not cropped


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17.0 writes none")
def test_decode_frames_turns_phone_videos_upright(tmp_path):
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[:, :12, :16] = 255  # top left
    for degrees, corner in {90: (-1, 0), -90: (0, -1), 180: (-1, -1)}.items():  # counter-clockwise
        path = write_video(tmp_path / f"{degrees}.mp4", frames, "libx264", rotation=degrees)
        frame = tb.decode_frames(path, [0])[0].numpy()
        assert frame.shape == ((48, 64, 3) if degrees == 180 else (64, 48, 3))
        assert frame[corner].min() > 200 and frame.mean() < 40


def test_decode_frames_of_a_single_frame(tmp_path):
    for name, codec in [("one.avi", "mpeg4"), ("one.mp4", "libx264"), ("one.webm", "libvpx-vp9")]:
        path = write_video(tmp_path / name, moving_frames(1), codec)
        assert tb.decode_frames(path, lambda n: tb.clip_indices(n, 16, 2)).shape == (16, 48, 64, 3)
        with pytest.raises(IndexError):
            tb.decode_frames(path, [1])


def test_decode_frames_of_damaged_files(tmp_path):
    whole = write_video(tmp_path / "whole.avi", moving_frames(96), options={"g": "12"}).read_bytes()
    (tmp_path / "truncated.avi").write_bytes(whole[:len(whole) // 2])
    expected = full_decode(tmp_path / "whole.avi")
    asked = []
    last = tb.decode_frames(tmp_path / "truncated.avi", lambda n: asked.append(n) or [n - 1])
    assert 20 < asked[-1] < 70 and last.shape == (1, 48, 64, 3)  # what is left; its very last frame may be half there
    assert np.array_equal(tb.decode_frames(tmp_path / "truncated.avi", range(10, 20)).numpy(), expected[10:20])

    mp4 = write_video(tmp_path / "whole.mp4", moving_frames(96), "libx264", options=X264).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(mp4[:len(mp4) * 2 // 3])  # the index, in front, promises more than is there
    assert tb.decode_frames(tmp_path / "cut.mp4", lambda n: [0, n // 2, n - 1]).shape == (3, 48, 64, 3)

    holed = bytearray(mp4)
    holed[len(mp4) // 2:len(mp4) // 2 + 400] = bytes(400)
    (tmp_path / "holed.mp4").write_bytes(holed)
    frames = tb.decode_frames(tmp_path / "holed.mp4", lambda n: [0, n - 1])
    assert np.array_equal(frames[0].numpy(), full_decode(tmp_path / "whole.mp4")[0])

    (tmp_path / "empty.avi").touch()
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "text.avi").write_text("not a video\n" * 100)
    (tmp_path / "headless.mp4").write_bytes(mp4[1000:])
    (tmp_path / "folder.avi").mkdir()
    write_video(tmp_path / "sound.mp4", moving_frames(1, 32, 32), "mjpeg", "yuvj420p", cover=True,
                extra=[("aac", None)])
    for name in ("empty.avi", "garbage.mp4", "text.avi", "headless.mp4", "folder.avi", "absent.avi", "sound.mp4"):
        with pytest.raises(tb.DECODE_ERRORS):
            tb.decode_frames(tmp_path / name, [0])


def test_decode_frames_of_names_that_look_like_something_else(tmp_path, monkeypatch):
    frames = moving_frames(3)
    monkeypatch.chdir(tmp_path)
    for name in ("http:, %d #1 [x](y)'s & co.avi", "-dash.avi", "pipe:0.avi", "späße;.avi", "a b?.avi", "no_ending"):
        source = write_video(tmp_path / "plain.avi", frames)
        source.rename(tmp_path / name)
        assert tb.decode_frames(name, [2]).shape == tb.decode_frames(tmp_path / name, [2]).shape == (1, 48, 64, 3)


def test_decode_frames_of_real_files(real_data):
    paths = sorted(p for p in (real_data / "videos").iterdir() if p.suffix in tb.SUFFIXES)
    assert {p.suffix for p in paths} == {".avi", ".mp4"}
    for path in paths:
        check_exact(path, full_decode(path))


@pytest.fixture(scope="session")
def real_data():
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"])


# ---- Which frames, which videos, which draws -------------------------------------------------------------------------

def test_clip_indices():
    assert tb.clip_indices(100, 4, 2, 0).tolist() == [0, 2, 4, 6]
    assert tb.clip_indices(100, 4, 2, 1).tolist() == [93, 95, 97, 99]
    assert tb.clip_indices(100, 3, 1, 0.5).tolist() == [49, 50, 51]
    assert tb.clip_indices(5, 8, 1, 0.7).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]  # looped, never dropped
    assert tb.clip_indices(1, 3, 2).tolist() == [0, 0, 0]
    starts = [tb.clip_indices(10, 4, 2, p)[0] for p in np.linspace(0, 1, 400, endpoint=False)]
    assert np.bincount(starts).tolist() == [100] * 4  # every start alike
    clips = tb.spaced_clips(None, 200, clips=10, frames=8, stride=2).reshape(10, 8)
    assert clips[0, 0] == 0 and clips[-1, -1] == 199 and len(set(np.diff(clips[:, 0]))) <= 2
    assert tb.spaced_clips(None, 101, clips=1, frames=64, stride=1).tolist() == list(range(19, 83))


def test_labeled_subset_is_nested_and_independent_of_order():
    names = [f"c{c}/v{i}.avi" for c, count in enumerate((3, 40, 101)) for i in range(count)]
    labels = np.array([int(name[1]) for name in names])

    def subset(percent, seed=0, order=slice(None)):
        chosen = tb.labeled_subset(names[order], labels[order], percent, seed)
        return {names[order][i] for i in chosen}

    for percent in (1, 5, 10, 50, 100):
        counts = [sum(name.startswith(f"c{c}/") for name in subset(percent)) for c in range(3)]
        assert counts == [max(1, round(percent / 100 * n)) for n in (3, 40, 101)]
        assert subset(percent) == subset(percent, order=slice(None, None, -1))
    assert subset(1) < subset(5) < subset(10) < subset(50) < subset(100) == set(names)
    assert subset(5) != subset(5, seed=1)
    assert tb.labeled_subset(["u/1.avi"], [-1], 100).tolist() == []


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    tb.render_toy(root, train=24, test=8)
    return root


def test_toy_videos_are_real_files_that_depend_on_the_seed_alone(toy, tmp_path):
    train, test = (tb.read_videos("toy", toy, part) for part in (True, False))
    assert len(train) == 24 and len(test) == len(train.classes) == 8 and not set(train.names()) & set(test.names())
    assert np.bincount(train.labels).tolist() == [3] * 8
    tb.render_toy(tmp_path, train=24, test=8)
    for i in range(24):
        assert Path(train.path(i)).read_bytes() == (tmp_path / "UCF-101" / train.name(i)).read_bytes()
        frames = tb.decode_frames(train.path(i), lambda n: range(n))
        assert 64 <= len(frames) <= 96 and frames.shape[1:] == (40, 56, 3)
    drawn = tb.toy_clip(0, tb.draw(0, 5))
    tb.write_atomically(tmp_path / "one.avi", lambda file: tb.encode_video(file, drawn))
    assert np.abs(full_decode(tmp_path / "one.avi") - drawn.astype(float)).mean() < 15  # colour has half the size


def test_toy_rendering_is_finished_after_an_interruption(toy, tmp_path, monkeypatch):
    encode, calls = tb.encode_video, []

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
    assert len(calls) == 33  # nothing was rendered twice
    files = [p.relative_to(toy) for p in toy.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((toy / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def settings(**changes):
    return argparse.Namespace(**{"seed": 0, "size": 16, "stride": 2, "workers": 0, "epochs": 3, **changes})


def batches(videos, pools, epoch=0, step=0, **changes):
    run = argparse.Namespace(epoch=epoch, step=step)
    stream = tb.VideoStream(videos, pools, 4, settings(**changes), torch.device("cpu"), run)
    return [next(stream) for _ in range(3 * stream.steps - epoch * stream.steps - step)]


def test_batches_depend_on_seed_epoch_and_step_alone(toy):
    videos = tb.read_videos("toy", toy, True)
    pools = [tb.Pool(np.arange(5, 24), 4, False), tb.Pool(np.arange(5), 4, True)]
    whole = batches(videos, pools)
    assert len(whole) == 12
    for others, first in [(batches(videos, pools, workers=2), 0),
                          (batches(videos, pools, epoch=1, step=2, workers=1), 6)]:
        for a, b in zip(whole[first:], others, strict=True):
            assert a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    for _, numbers, _ in whole:  # Eq. 1 would take a second clip of a video for a negative
        assert len(set(numbers[:4])) == 4 and min(numbers[:4]) >= 5 > max(numbers[4:])
    for epoch in range(3):
        passed = [v for batch in whole[4 * epoch:4 * epoch + 4] for v in batch[1][:4]]
        assert len(set(passed)) == 16
    cycled = [v for batch in whole for v in batch[1][4:]]
    assert all(sorted(cycled[i:i + 5]) == list(range(5)) for i in range(0, 45, 5))  # pass after pass
    keys = [key for batch in whole for key in batch[2]]
    assert len(set(keys)) == len(keys)  # so no two clips share their draws
    assert batches(videos, pools, seed=1)[0][1] != whole[0][1]


def test_augmentation_is_drawn_once_per_clip():
    torch.manual_seed(0)
    still = torch.randint(256, (1, 40, 56, 3), dtype=torch.uint8).expand(6, -1, -1, -1)
    seen = []
    for k in range(20):
        clip = tb.augment(still, 24, tb.draw(0, k), **tb.STRONG)
        assert clip.shape == (6, 3, 24, 24) and clip.dtype == torch.uint8 and (clip == clip[:1]).all()
        assert torch.equal(clip, tb.augment(still, 24, tb.draw(0, k), **tb.STRONG))
        seen.append(clip)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    crop = tb.centre_crop(still, 20, 0.5)
    assert torch.equal(crop[0], still[0, 10:30, 18:38].permute(2, 0, 1))
    model = tb.build_model("r3d_tiny", 2)
    x = tb.to_input([crop, crop], model)
    expected = (crop.permute(1, 0, 2, 3) / 255 - model.mean.view(3, 1, 1, 1)) / model.std.view(3, 1, 1, 1)
    assert x.is_contiguous(memory_format=torch.channels_last_3d) and torch.allclose(x[1], expected, atol=1e-6)


# ---- The chain of stages, on a tiny toy set --------------------------------------------------------------------------

TINY = "--size 16 --frames 8 --epochs 2 --batch 4 --precision fp32 --device cpu --workers 0 --warmup 1".split()
STAGES = [(pretrain_inv, ["--clips", "2"]), (pretrain_dist, ["--clips", "2"]), (finetune, []),
          (finetune, ["--init", "none"]), (train_student, [])]
CHECKPOINTS = ["inv", "dist", "inv_ft", "dist_ft", "labeled_only", "student"]


def run_stage(stage, root, out, *flags):
    module, own = STAGES[stage]
    module.main([*TINY, *own, "--root", str(root), "--out", str(out), *flags])


def run_chain(root, out):
    for stage in range(len(STAGES)):
        run_stage(stage, root, out)
    evaluate.main([str(out), "--clips", "2", "--device", "cpu", "--workers", "0", "--precision", "fp32"])


def load(out, name):
    return torch.load(Path(out) / f"{name}.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_checkpoints(a, b, names=CHECKPOINTS):
    for name in names:
        x, y = load(a, name), load(b, name)
        for key in x.keys() - {"args"}:
            assert same(x[key], y[key]), (name, key)


@pytest.fixture(scope="session")
def chain(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("chain")
    run_chain(toy, out)
    return out


def test_chain_writes_what_the_next_stage_and_the_user_need(chain, toy):
    for name in CHECKPOINTS:
        saved = load(chain, name)
        assert saved["finished"] and saved["epoch"] == 2 and len(saved["classes"]) == 8
        fresh = tb.build_model("r3d_tiny", 8)
        fresh.load_state_dict(saved["model"])  # strict: the head lies beside it
        log = [json.loads(line) for line in (chain / f"{name}.log").read_text().splitlines()]
        assert log[0]["torch"] == torch.__version__ and [line["epoch"] for line in log[1:]] == [1, 2]
    for name in ("inv", "dist", "inv_ft", "dist_ft"):
        saved = load(chain, name)
        assert saved["similarity"].shape == (24, 2, 2) and len(saved["similarity_of"]) == 24
    last = json.loads((chain / "student.log").read_text().splitlines()[-1])
    assert {"l_sup", "l_unsup", "l_unsup_labeled", "weight_inv", "clamped", "agreement"} <= last.keys()
    labeled = [line.split() for line in (chain / "labeled.txt").read_text().splitlines()]
    classes = tb.read_videos("toy", toy, True).classes
    assert len(labeled) == 8 and all(classes[int(label)] == name.split("/")[0] for name, label in labeled)
    results = json.loads((chain / "results.json").read_text())
    assert [r["checkpoint"] for r in results] == ["labeled_only.pt", "dist_ft.pt", "inv_ft.pt", "student.pt"]
    for r in results:
        assert r["videos"] == 8 and r["labeled_count"] == 8 and 0 <= r["top1"] <= r["top5"] <= 100
        assert r["top1"] == pytest.approx(np.mean(list(r["per_class"].values())))  # one test video a class


def test_evaluation_counts_what_the_model_says(chain, toy):
    results = {r["checkpoint"]: r for r in json.loads((chain / "results.json").read_text())}
    saved, videos = load(chain, "student"), tb.read_videos("toy", toy, False)
    model = tb.build_model("r3d_tiny", 8).eval()
    model.load_state_dict(saved["model"])
    right = 0
    for i in range(8):
        frames = full_decode(videos.path(i))
        starts = [0, len(frames) - 15]  # two clips of 8 frames at stride 2, first and last
        p = 0
        for start in starts:
            for scale in (1.0, 0.8, 0.7):
                clip = tb.decode_frames(videos.path(i), range(start, start + 15, 2), short_side=20)
                with torch.no_grad():
                    p = p + model(tb.to_input([tb.centre_crop(clip, 16, scale)], model)).softmax(1)
        right += int(p.argmax()) == videos.labels[i]
    assert results["student.pt"]["top1"] == pytest.approx(100 * right / 8)


def test_means_differences_and_figures_of_several_runs(chain, tmp_path, monkeypatch, capsys):
    for name in "ab":
        shutil.copytree(chain, tmp_path / name)
    (tmp_path / "a/labeled_only.pt").unlink()
    shutil.copy(chain / "labeled_only.pt", tmp_path / "b/dist_ft.pt")
    argv = [*map(str, (tmp_path / "a", tmp_path / "b")), "--against", "dist_ft.pt", "--figures", "--clips", "1"]
    classes, rng = load(chain, "inv")["classes"], np.random.default_rng(0)
    monkeypatch.setattr(evaluate, "evaluate", lambda file, *_: {
        "checkpoint": file.name, "finished": True, "labeled_count": 8,
        **dict(zip(evaluate.METRICS, 100 * rng.random(3))),
        "per_class": dict(zip(classes, 100 * rng.random(8)))})
    with pytest.raises(SystemExit):  # a teacher of which no similarity is known
        evaluate.main(argv)
    assert "dist_ft.pt does not come from stage 1" in capsys.readouterr().err
    shutil.copy(chain / "dist_ft.pt", tmp_path / "b")
    evaluate.main(argv)
    text = capsys.readouterr().out
    runs = [{r["checkpoint"]: r for r in json.loads((tmp_path / name / "results.json").read_text())} for name in "ab"]
    top1 = {name: [run[name]["top1"] for run in runs if name in run] for name in runs[1]}
    for name, values in top1.items():
        apart = [run[name]["top1"] - run["dist_ft.pt"]["top1"] for run in runs if name in run]
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}") and "±" in line)
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in (values, apart)]
        assert [cell.strip() for cell in row.split("|")[2:4]] == [
            str(len(values)), f"{np.mean(values):.1f} ± {spread[0]:.1f}"]
        assert row.split("|")[-2].strip() == f"{np.mean(apart):+.1f} ± {spread[1]:.1f}"

    inv, dist = load(chain, "inv_ft"), load(chain, "dist_ft")
    assert inv["similarity_of"] == dist["similarity_of"] and inv["similarity_clips"] == [2, 8, 1]
    s = tb.similarity_score(inv["similarity"], dist["similarity"])
    lines = text.split("difference |")[1].splitlines()[2:10]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert sorted(row[0] for row in rows) == sorted(inv["classes"])
    for name, *numbers in rows:
        own = [i for i, video in enumerate(inv["similarity_of"]) if video.startswith(f"{name}/")]
        p_inv, p_dist = (np.mean([run[f"{k}_ft.pt"]["per_class"][name] for run in runs]) for k in ("inv", "dist"))
        assert numbers == [f"{s[own].mean():.2f}", f"{p_inv:.1f}", f"{p_dist:.1f}", f"{p_inv - p_dist:+.1f}"]
    difference = [float(row[-1]) for row in rows]
    assert difference == sorted(difference, reverse=True)

    bars, matrices = (np.array(Image.open(tmp_path / f"a/{name}.png"), int) for name in ("classes", "similarity"))
    assert bars.shape == (40 + 22 * 8, 720, 3) and not list((tmp_path / "b").glob("*.png"))
    for k, row in enumerate(rows):  # the side to which a bar grows
        white = [bool((bars[36 + 22 * k + 2, x] == 255).all()) for x in (448, 452)]
        assert abs(float(row[-1])) < 2 or white == [float(row[-1]) > 0, float(row[-1]) < 0]
    for place, i in zip(range(3), s.argsort(descending=True)[[0, len(s) // 2, -1]]):
        for k, saved in enumerate((inv, dist)):  # the colours of a cell off the diagonal, and of one on it
            x, y = 2 * 100 + 12 + k * (72 + 16), place * (72 + 32) + 28
            for column, c in enumerate(saved["similarity"][i, 0].clamp(min=0).tolist()):
                colour = 255 - c * np.array([200, 120, 40])
                assert np.abs(matrices[y + 1, x + 36 * column + 1] - colour).max() <= 1


def test_label_firewall(chain, toy, tmp_path, monkeypatch):
    """Labels that no stage may use are replaced: of unlabelled videos once the subset is drawn, of all test videos."""
    hide, read = tb.Videos.hide_labels, tb.read_videos

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
    assert (chain / "results.json").read_text() != (tmp_path / "results.json").read_text()


def test_a_finished_stage_returns_and_takes_more_epochs(chain, toy, tmp_path, capsys):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "inv.pt").read_bytes()
    run_stage(0, toy, tmp_path)
    assert "is finished" in capsys.readouterr().out and (tmp_path / "inv.pt").read_bytes() == before
    run_stage(0, toy, tmp_path, "--epochs", "3")
    run_stage(0, toy, tmp_path / "new", "--epochs", "3")
    assert_same_checkpoints(tmp_path, tmp_path / "new", ["inv"])


PROBE = """
import os, sys, torch, common, pretrain_inv, pretrain_dist, train_student
torch.set_num_threads(1)
toy, chain, out = sys.argv[1:]
found, rank = {}, int(os.environ.get("RANK", 0))
init, record, step = common.Run.__init__, common.Run.record, torch.optim.Adam.step
def with_fixed_statistics(run, args, stage, name, net, *rest):
    init(run, args, stage, name, net, *rest)
    for m in net.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.eval()
    run.optimizer.step = lambda: found.update({f"{stage}.{n}": p.grad for n, p in net.named_parameters()
                                               if p.grad is not None})
def noted(run, clips, **terms):
    record(run, clips, **terms)
    found.setdefault(run.facts["stage"] + ".losses", run.pending[1][:len(terms)])
    raise common.TrainingError("one step is enough")
common.Run.__init__, common.Run.record = with_fixed_statistics, noted
for k, (module, own) in enumerate([(pretrain_inv, ["--clips", "2"]), (train_student, ["--pretrained", chain]),
                                   (pretrain_dist, ["--clips", "2", "--invariant-weight", "1"])]):
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if module is train_student:
        own += ["--teachers", f"{chain}/inv_ft.pt", f"{chain}/dist_ft.pt"]
    try:
        module.main([*"--size 16 --frames 8 --epochs 1 --batch 4 --precision fp32 --device cpu --workers 0".split(),
                     *own, "--root", toy, "--out", out])
    except SystemExit as end:
        assert end.code == 1, end
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
if rank == 0:
    torch.save(found, f"{out}/found.pt")
"""


def test_two_processes_compute_what_one_does(chain, toy, tmp_path):
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
            [sys.executable, "-c", PROBE, toy, chain, out], cwd=HERE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(processes)]
        for process in running:
            text, _ = process.communicate(timeout=200)
            assert process.returncode == 0, text.decode()[-3000:]
        found.append(torch.load(out / "found.pt"))
    one, two = found
    assert one.keys() == two.keys() and len(one) > 90
    for name, value in one.items():
        scale = float(value.abs().max())
        assert scale > 0 and torch.allclose(value, two[name], rtol=1e-3, atol=1e-5 * (scale + 1)), name


def test_teachers_stay_as_they_are_in_stage_3(chain, toy, tmp_path, monkeypatch):
    teachers, load_classifier = [], train_student.load_classifier

    def remembered(*args):
        teachers.append(load_classifier(*args))
        return teachers[-1]

    monkeypatch.setattr(train_student, "load_classifier", remembered)
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("student*"))
    run_stage(4, toy, tmp_path)
    for teacher, name in zip(teachers, ("inv_ft", "dist_ft"), strict=True):
        assert same(dict(teacher.state_dict()), load(chain, name)["model"])
        assert all(p.grad is None for p in teacher.parameters())
    assert_same_checkpoints(chain, tmp_path, ["student"])
    changed = load(chain, "student")["model"], load(chain, "dist")["model"]
    assert not torch.equal(*(weights["stem.0.weight"] for weights in changed))


@pytest.mark.parametrize("stage", [0, 1, 3, 4])
def test_benchmark_prints_numbers_and_writes_nothing(stage, chain, toy, tmp_path, capsys):
    if stage == 4:
        earlier_checkpoints(chain, tmp_path, "student")
    before = sorted(tmp_path.glob("*.pt"))
    with pytest.raises(SystemExit) as end:
        run_stage(stage, toy, tmp_path, "--benchmark", "3")
    text = capsys.readouterr().out
    numbers = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert not end.value.code and "bottleneck:" in text and sorted(tmp_path.glob("*.pt")) == before
    clips = {0: 2, 1: 6, 3: 1, 4: 2}[stage]  # of each video; stage 3 has as many labelled videos again
    assert numbers["clips_per_s"] == pytest.approx(4 * clips * 1000 / numbers["ms_per_step"])
    assert 0 <= numbers["waiting_share"] < 1 and numbers["decode_ms_per_video"] > 0
    model = tb.build_model("r3d_tiny", 8)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(4 * clips, 3, 8, 16, 16)).sum().backward()
    flops = numbers["tflop_per_s"] * numbers["ms_per_step"] * 1e9
    assert 0.8 < flops / counted.get_total_flops() < (1.9 if stage == 4 else 1.2)  # teachers go forward only


def one_step(stage, chain, toy, out, *flags):
    """The loss terms, gradients and buffers of a stage's first step."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        record = tb.Run.record

        def noted(run, clips, **terms):
            record(run, clips, **terms)
            found.update({name: term.detach() for name, term in terms.items()}, **{
                name: p.grad for name, p in run.net.named_parameters() if p.grad is not None})
            found.update(run.net.named_buffers())
            raise KeyboardInterrupt

        patch.setattr(tb.Run, "record", noted)
        earlier_checkpoints(chain, out, {0: "inv", 1: "dist", 3: "labeled_only", 4: "student"}[stage])
        with pytest.raises(SystemExit):
            run_stage(stage, toy, out, *flags)
    return found


@pytest.mark.parametrize("stage", [0, 1, 3, 4])
def test_checkpointing_and_compile_change_nothing(stage, chain, toy, tmp_path, monkeypatch):
    # Without inductor, whose compiler takes half a minute: all that --compile hands to it, for one of the stages to it.
    compiled, compile = [], torch.compile

    def quickly(function, **settings):
        compiled.append(function)
        return compile(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", quickly)
    plain = one_step(stage, chain, toy, tmp_path)
    assert len(plain) > 60 and not compiled
    for flags in (["--checkpointing"], ["--compile"], ["--compile", "--checkpointing"]):
        torch.compiler.reset()
        other = one_step(stage, chain, toy, tmp_path, *flags)
        assert len(compiled) == 5 * ("--compile" in flags) and plain.keys() == other.keys()
        compiled.clear()
        for name, value in plain.items():  # the bias of head.0 has no gradient but noise, BatchNorm follows it
            scale = float(value.abs().max()) + 0.1 * (name == "head.0.bias")
            assert torch.allclose(value, other[name], rtol=1e-4, atol=1e-4 * scale), (flags, name)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_with_inductor(chain, toy, tmp_path):
    torch.compiler.reset()
    plain, other = (one_step(4, chain, toy, tmp_path, *flags) for flags in ([], ["--compile"]))
    for name, value in plain.items():
        assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-3 * float(value.abs().max())), name


def test_learning_rate_in_the_log_is_the_paper_s(toy, tmp_path):
    run_stage(0, toy, tmp_path, "--epochs", "12", "--warmup", "4", "--patience", "0", "--lr", "0.02", "--size", "16")
    log = [json.loads(line) for line in (tmp_path / "inv.log").read_text().splitlines()[1:]]
    assert [line["lr"] for line in log[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.02)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for before, line in zip(log[3:], log[4:]):
        if before["epoch"] > 4:
            plateau.step(before["loss"])
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
    assert log[-1]["lr"] < 0.02  # the schedule did something


# ---- The public data sets, as their archives and lists unpack --------------------------------------------------------

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
    stand_in(root / "UCF-101", {line.split()[0] for file in root.glob("ucfTrainTestlist/*list0*.txt")
                                for line in file.read_text().splitlines() if line.strip()})
    return root


@pytest.fixture(scope="session")
def hmdb51(real_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("hmdb51")
    shutil.copytree(real_data / "splits/testTrainMulti_7030_splits", root / "testTrainMulti_7030_splits")
    stand_in(root / "hmdb51_org", {f"{file.name[:-16]}/{line.rsplit(maxsplit=1)[0]}"
                                   for file in root.glob("testTrain*/*_test_split1.txt")
                                   for line in file.read_text().splitlines() if line.strip()})
    return root


def test_ucf101_as_it_is(ucf101):
    for split, counts in {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}.items():
        train, test = (tb.read_videos("ucf101", ucf101, part, split) for part in (True, False))
        assert (len(train), len(test)) == counts and len(train.classes) == 101
        assert not set(train.names()) & set(test.names())
        assert train.labels.min() == 0 and train.labels.max() == 100 == test.labels.max()
    handstand = [i for i in range(len(train)) if train.name(i).startswith("HandstandPushups/v_HandStandPushups_")]
    assert len(handstand) > 50 and {train.classes[train.labels[i]] for i in handstand} == {"HandstandPushups"}
    assert all(Path(train.path(i)).exists() for i in range(0, len(train), 100))


def test_hmdb51_as_it_is(hmdb51):
    train, test = (tb.read_videos("hmdb51", hmdb51, part) for part in (True, False))
    everything = tb.read_videos("hmdb51", hmdb51, True, pool="all")
    assert (len(train), len(test), len(everything)) == (3570, 1530, 5236) and len(train.classes) == 51
    assert np.bincount(train.labels).tolist() == [70] * 51 and np.bincount(test.labels).tolist() == [30] * 51
    assert set(train.names()) < set(everything.names()) and not set(everything.names()) & set(test.names())
    assert any(set("!#&()[];+~@") & set(name) for name in train.names())
    for videos in (train, test):
        assert all(os.path.exists(videos.path(i)) and videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]
                   for i in range(len(videos)))


@pytest.mark.parametrize("data, percent, count", [("ucf101", 5, 476), ("ucf101", 10, 953), ("ucf101", 20, 1907),
                                                  ("ucf101", 50, 4768), ("hmdb51", 40, 2094), ("hmdb51", 50, 2618),
                                                  ("hmdb51", 60, 3141)])
def test_published_labelled_lists(data, percent, count, request, real_data, tmp_path, capsys):
    root = request.getfixturevalue(data)
    file = f"{data}_train_{percent}_percent_labeled_split_1_rawframes.txt"
    path = real_data / "splits/videossl" / data / "videossl_splits" / file
    videos = tb.read_videos(data, root, True, pool="all")
    labeled = tb.choose_labeled(videos, argparse.Namespace(labeled_list=path, out=tmp_path))
    listed = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    assert len(labeled) == count == len(set(listed))
    assert {os.path.splitext(videos.name(i))[0] for i in labeled} == set(listed)
    assert all(videos.classes[videos.labels[i]] == videos.name(i).split("/")[0] for i in labeled)
    assert (np.delete(videos.labels, labeled) == -1).all()
    text = capsys.readouterr().out
    assert f"{count} of {len(videos)} training videos have a label" in text
    assert ("no labelled video of CliffDiving" in text) == (data == "ucf101" and percent == 5)
    odd = re.findall(r"the label of (\d+) rows contradicts", text)
    assert (54 <= int(odd[0]) <= 73) if data == "hmdb51" else not odd


def test_kinetics400_and_its_list(real_data, tmp_path, capsys):
    path = real_data / "splits/videossl/kinetics400/kinetics400_train_1_percent_labeled_videos.txt"
    listed = [line.split()[0] for line in path.read_text().splitlines()]
    on_disk = [name.split("/")[0].replace("_", " ") + "/" + name.split("/")[1] for name in listed]
    on_disk = [name[:-4] + (".mkv", ".webm", ".mp4")[i % 3] for i, name in enumerate(on_disk)]  # copies mix formats
    stand_in(tmp_path / "train", on_disk[5:])
    stand_in(tmp_path / "val", on_disk[:5] + ["baking cookies/-dash.mp4"])
    (tmp_path / "train/baking cookies/folder.mp4").mkdir()
    (tmp_path / "train/baking cookies/notes.txt").touch()
    videos = tb.read_videos("kinetics400", tmp_path, True)
    assert len(videos) == len(set(listed)) - 5
    labeled = tb.read_labeled_list(path, videos)
    assert len(labeled) == len(videos) and "5 rows name no training video" in capsys.readouterr().out
    test = tb.read_videos("kinetics400", tmp_path, False)
    assert len(test) == 6 and test.classes == videos.classes


def test_labelled_lists_of_other_forms(toy, tmp_path, capsys):
    videos = tb.read_videos("toy", toy, True)
    names = videos.names()[:6]
    rows = [f"/home/someone/UCF 101/{name} {videos.labels[i] + 1}" for i, name in enumerate(names[:5])]
    rows += [f"{names[5][:-4]} 80 {videos.labels[5] + 1}", "", "Nowhere/v_x.avi 3"]
    (tmp_path / "list.txt").write_text("\r\n".join(rows))
    assert tb.read_labeled_list(tmp_path / "list.txt", videos).tolist() == list(range(6))
    assert "1 rows name no training video" in capsys.readouterr().out
    (tmp_path / "empty.txt").write_text("Nowhere/v_x.avi 3\n")
    with pytest.raises(tb.UserError, match="empty.txt"):
        tb.read_labeled_list(tmp_path / "empty.txt", videos)


def test_missing_files_are_counted(toy, tmp_path, capsys):
    names = [f"Ring/v{i}.avi" for i in range(200)]
    stand_in(tmp_path / "UCF-101", names[10:])
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/classInd.txt").write_text("1 Ring\r\n")
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_text("".join(f"{name} 1\r\n" for name in names))
    assert len(tb.read_videos("ucf101", tmp_path, True)) == 190
    assert "10 of 200 listed videos are not in" in capsys.readouterr().out
    (tmp_path / "UCF-101" / names[10]).unlink()
    with pytest.raises(tb.UserError, match="11 of 200 .*Ring/v0.avi"):
        tb.read_videos("ucf101", tmp_path, True)


def test_a_folder_of_one_s_own(tmp_path):
    stand_in(tmp_path, ["train/b/2.MP4", "train/b/1.mov", "train/a a/#1.avi", "train/b/.hidden", "test/b/3.webm",
                        "unlabeled/x.mkv", "unlabeled/deep/er/y (1).avi", "unlabeled/readme.md"])
    train, test = (tb.read_videos("folder", tmp_path, part) for part in (True, False))
    assert train.names() == ["train/a a/#1.avi", "train/b/1.mov", "train/b/2.MP4",
                             "unlabeled/deep/er/y (1).avi", "unlabeled/x.mkv"]
    assert train.labels.tolist() == [0, 1, 1, -1, -1] and train.classes == ["a a", "b"] == test.classes
    assert test.names() == ["test/b/3.webm"] and test.labels.tolist() == [1]


def tree_of_real_clips(data, real_data, root):
    """A small data set in its official layout: real clips under names of the official lists, which are cut down."""
    clips = sorted(p for p in (real_data / "videos").iterdir() if p.suffix in tb.SUFFIXES)
    splits, lists = real_data / "splits", {}
    if data == "ucf101":
        clips = [p for p in clips if p.name.startswith("v_")]
        lists["ucfTrainTestlist/classInd.txt"] = (splits / "ucfTrainTestlist/classInd.txt").read_text().splitlines()[:4]
        for part, count in [("train", 3), ("test", 1)]:
            rows = (splits / f"ucfTrainTestlist/{part}list01.txt").read_text().splitlines()
            kept = [row for line in lists["ucfTrainTestlist/classInd.txt"]
                    for row in [r for r in rows if r.startswith(line.split()[1] + "/")][:count]]
            lists[f"ucfTrainTestlist/{part}list01.txt"] = kept
        names = [f"UCF-101/{row.split()[0]}" for part in ("train", "test")
                 for row in lists[f"ucfTrainTestlist/{part}list01.txt"]]
    elif data == "hmdb51":
        clips, names = [p for p in clips if p.suffix == ".avi" and not p.name.startswith("v_")], []
        for file in sorted((splits / "testTrainMulti_7030_splits").glob("*_test_split1.txt"))[:4]:
            rows = file.read_text().splitlines()
            kept = [row for code, count in (("1", 3), ("2", 1))
                    for row in [r for r in rows if r.split()[1] == code][:count]]
            lists[f"testTrainMulti_7030_splits/{file.name}"] = kept
            names += [f"hmdb51_org/{file.name[:-16]}/{row.split()[0]}" for row in kept]
    else:
        clips = [p for p in clips if p.suffix == ".mp4"] if data == "kinetics400" else clips
        test = "val" if data == "kinetics400" else "test"
        names = [f"{part}/{c}/-x{i}{clips[i % len(clips)].suffix}" for c in ("baking cookies", "it's (2)", "c", "d")
                 for part, count in (("train", 3), (test, 1)) for i in range(count)]
        names += ["unlabeled/deep/er/a.avi", "unlabeled/b.avi"] if data == "folder" else []
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        alike = [p for p in clips if p.suffix == Path(name).suffix]
        shutil.copy(alike[i % len(alike)], root / name)
    for name, rows in lists.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\r\n".join(rows) + "\r\n")


@pytest.mark.parametrize("data", ["ucf101", "hmdb51", "kinetics400", "folder"])
def test_all_stages_on_real_files(data, real_data, tmp_path):
    tree_of_real_clips(data, real_data, tmp_path / "root")
    for module, own in STAGES:
        module.main([*TINY, *own, "--data", data, "--root", str(tmp_path / "root"), "--arch", "r3d_tiny",
                     "--epochs", "1", "--out", str(tmp_path / "out")])
    evaluate.main([str(tmp_path / "out"), "--clips", "2", "--workers", "0"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [r["checkpoint"] for r in results] == ["labeled_only.pt", "dist_ft.pt", "inv_ft.pt", "student.pt"]
    for r in results:
        assert r["data"] == data and r["videos"] == 4 and r["unreadable"] == 0
        assert r["labeled_count"] == 4  # one of each class
    assert len(load(tmp_path / "out", "inv")["similarity_of"]) == (14 if data == "folder" else 12)


@pytest.fixture
def broken(toy, tmp_path):
    """A folder of 100 training videos, of which break_files breaks some in five ways."""
    source = tb.read_videos("toy", toy, True)
    for part, count in [("train", 100), ("test", 10)]:
        for i in range(count):
            path = tmp_path / part / source.name(i % 24).split("/")[0] / f"{i:03}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.path(i % 24), path)

    def break_files(numbers, part="train"):
        paths = sorted((tmp_path / part).rglob("*.avi"))
        for i in numbers:
            content = paths[i].read_bytes()
            paths[i].write_bytes([b"", content[:300], b"not a video", bytes(5000), content[:4000]][i % 5][:5000])
            if i % 5 == 4:
                write_video(paths[i].with_suffix(".mp4"), moving_frames(1, 32, 32), "mjpeg", "yuvj420p", cover=True,
                            extra=[("aac", None)])
                paths[i].with_suffix(".mp4").rename(paths[i])  # sound and a cover picture
        return [str(paths[i]) for i in numbers]

    return tmp_path, break_files


def test_broken_videos_are_named_replaced_and_counted(broken, tmp_path, capsys):
    root, break_files = broken
    bad = break_files(range(10, 60, 10 + 1))  # five of them, one of each kind
    flags = ["--data", "folder", "--root", str(root), "--arch", "r3d_tiny", "--out", str(tmp_path / "out"), *TINY]
    pretrain_inv.main([*flags, "--batch", "10", "--clips", "2"])
    captured = capsys.readouterr()
    error = captured.err
    assert len(bad) == 5 and all(path in error for path in bad) and error.count("another video takes its place") == 5
    log = [json.loads(line) for line in (tmp_path / "out/inv.log").read_text().splitlines()[1:]]
    assert log[-1]["unreadable"] == 5
    assert all(path.split("/train/")[1] in captured.out.split("cannot be decoded:")[-1] for path in bad)
    assert len(load(tmp_path / "out", "inv")["similarity_of"]) == 95
    break_files(range(5, 50, 4))
    with pytest.raises(SystemExit) as end:
        pretrain_inv.main([*flags, "--batch", "10", "--clips", "2", "--restart"])
    assert end.value.code == 2 and "more than 10 %" in capsys.readouterr().err


def test_prediction_of_one_s_own_videos(chain, toy, tmp_path, capsys):
    shutil.copy(chain / "student.pt", tmp_path)
    videos = tb.read_videos("toy", toy, False)
    (tmp_path / "clips/deep").mkdir(parents=True)
    shutil.copy(videos.path(0), tmp_path / "clips/deep/a: #1.avi")
    (tmp_path / "clips/b.avi").write_text("broken")
    flags = ["--checkpoint", str(tmp_path / "student.pt"), "--clips", "2", "--workers", "0", "--precision", "fp32"]
    evaluate.main(["--videos", videos.path(0), str(tmp_path / "clips"), *flags])
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    same_video, again, bad = sorted(predictions, key=lambda p: bool(p["error"]))
    assert same_video["top5"] == again["top5"] and again["video"].endswith("a: #1.avi")
    assert len(again["top5"]) == 5 and set(again["top5"]) < set(videos.classes) and sum(again["top5"].values()) <= 1
    assert bad["top5"] == {} and bad["error"] and "b.avi: cannot be decoded" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["--videos", str(tmp_path / "nothing"), *flags])


def test_public_weights(tmp_path, capsys):
    torch.manual_seed(0)
    r3d = torchvision.models.video.r3d_18(num_classes=400).state_dict()
    slow = tb.build_model("slow_r50", 400).state_dict()
    tclr = {f"module.0.{k}" if not k.startswith("fc") else f"module.1.{k}": w for k, w in r3d.items()}
    for arch, saved in [("r3d_18", r3d), ("slow_r50", {"model_state": slow}),
                        ("r3d_18", {"state_dict": tclr, "epoch": 3})]:
        torch.save(saved, tmp_path / "public.pth")
        model = tb.build_model(arch, 7)
        before = {k: w.clone() for k, w in model.state_dict().items()}
        tb.load_backbone(model, tmp_path / "public.pth", tb.read_checkpoint(tmp_path / "public.pth"))
        after, source = model.state_dict(), slow if arch == "slow_r50" else r3d
        assert f"took {len(after) - 2} tensors of" in capsys.readouterr().out
        for key, w in after.items():
            if key.startswith(tb.CLASSIFIERS):
                assert torch.equal(w, before[key])
            elif "state_dict" in saved and key == "stem.0.weight":
                assert torch.equal(w, source[key].flip(1))  # TCLR read BGR frames
            else:
                assert torch.equal(w, source[key])
    for arch, saved in [("slow_r50", r3d), ("r3d_18", {"state_dict": {}}), ("r3d_tiny", r3d), ("r3d_18", {"a": 1})]:
        with pytest.raises(tb.UserError, match="x.pth"):
            tb.load_backbone(tb.build_model(arch, 7), "x.pth", saved)


def test_unreadable_test_videos_count_as_wrong(broken, tmp_path, capsys):
    root, break_files = broken
    flags = ["--data", "folder", "--root", str(root), "--arch", "r3d_tiny", "--out", str(tmp_path / "out"), *TINY]
    finetune.main([*flags, "--init", "none", "--epochs", "1"])
    evaluate.main([str(tmp_path / "out"), "--clips", "1", "--workers", "0"])
    before = json.loads((tmp_path / "out/results.json").read_text())[0]
    bad = break_files(range(10), "test")
    evaluate.main([str(tmp_path / "out"), "--clips", "1", "--workers", "0"])
    after = json.loads((tmp_path / "out/results.json").read_text())[0]
    assert before["videos"] == after["videos"] == 10 and before["unreadable"] == 0 and after["unreadable"] == 10
    assert after["top1"] == 0 and all(path in capsys.readouterr().err for path in bad[:1])


# ---- What a run may rely on ------------------------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys, time, common
where, at, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), []
def after(function):
    def wrapped(*args, **terms):
        result = function(*args, **terms)
        count.append(1)
        if len(count) == at:
            os.kill(os.getpid(), number)
        return result
    return wrapped
owner, name = {"step": (common.Run, "record"), "similarity": (common, "temporal_similarity"),
               "write": (common, "write_atomically"), "encode": (common, "encode_video")}[where]
setattr(owner, name, after(getattr(owner, name)))
module = __import__(sys.argv[4])
module.main(sys.argv[5:])
"""


def interrupted(stage, where, at, number, root, out, *flags):
    """Run a stage in a process that sends itself a signal, when something has happened `at` times."""
    module, own = STAGES[stage]
    command = [SIGNALLED, where, str(at), str(int(number)), module.__name__, *TINY, *own, "--root", root, "--out", out]
    return subprocess.run([sys.executable, "-c", *command, *flags], cwd=HERE, capture_output=True, text=True,
                          timeout=120)


def earlier_checkpoints(chain, out, name):
    for file in chain.glob("*.pt"):
        if CHECKPOINTS.index(file.stem) < CHECKPOINTS.index(name):
            shutil.copy(file, out)


@pytest.mark.parametrize("stage, name, where, at, number", [
    (0, "inv", "step", 9, signal.SIGKILL), (1, "dist", "step", 9, signal.SIGKILL),
    (3, "labeled_only", "step", 3, signal.SIGKILL), (4, "student", "step", 6, signal.SIGKILL),
    (0, "inv", "step", 8, signal.SIGTERM), (4, "student", "step", 3, signal.SIGINT),
    (0, "inv", "similarity", 2, signal.SIGKILL), (1, "dist", "similarity", 1, signal.SIGTERM),
    (0, "inv", "write", 2, signal.SIGINT), (2, "dist_ft", "step", 6, signal.SIGTERM)])
def test_an_interrupted_stage_goes_on_to_the_same_weights(stage, name, where, at, number, chain, toy, tmp_path):
    earlier_checkpoints(chain, tmp_path, "inv_ft" if name == "dist_ft" else name)
    dead = interrupted(stage, where, at, number, toy, tmp_path)
    if number == signal.SIGKILL:
        assert dead.returncode == -signal.SIGKILL, dead.stderr
    else:
        assert dead.returncode == 1 and dead.stderr.strip().endswith(
            "interrupted; the same command goes on from the last checkpoint"), dead.stderr
        assert "Traceback" not in dead.stderr
    if (where, number) == ("step", signal.SIGTERM):
        saved = load(tmp_path, name)
        assert saved["step"] > 0 or saved["epoch"] > 0  # the step in hand was finished and saved
    run_stage(stage, toy, tmp_path, "--workers", "1")
    assert_same_checkpoints(chain, tmp_path, [name])
    lines = [json.loads(line) for line in (tmp_path / f"{name}.log").read_text().splitlines()]
    assert [line.get("epoch") for line in lines] == [None, 1, 2]
    for line, expected in zip(lines[1:], (chain / f"{name}.log").read_text().splitlines()[1:]):
        assert line["loss"] == json.loads(expected)["loss"]


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.setattr(tb.Signals, "deferring", True)
    monkeypatch.setattr(tb.Signals, "requested", False)
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends the second one
        tb.Signals.handle(number, None)
    with pytest.raises(KeyboardInterrupt):
        tb.Signals.handle(signal.SIGINT, None)


def test_sigterm_saves_the_step_in_hand(toy, chain, tmp_path):
    interrupted(0, "step", 8, signal.SIGTERM, toy, tmp_path)
    saved = load(tmp_path, "inv")
    assert (saved["epoch"], saved["step"]) == (1, 2) and not saved["finished"]  # 6 steps an epoch


def test_interrupted_rendering_goes_on(toy, tmp_path):
    for at, number in [(3, signal.SIGKILL), (5, signal.SIGTERM)]:
        code = f"common.render_toy({str(tmp_path / 'toy')!r}, 24, 8)"
        wrapped = SIGNALLED.replace("module = __import__(sys.argv[4])\nmodule.main(sys.argv[5:])\n", code)
        dead = subprocess.run([sys.executable, "-c", wrapped, "encode", str(at), str(int(number))], cwd=HERE,
                              capture_output=True, timeout=120)
        assert dead.returncode != 0 and not (tmp_path / "toy/toy.json").exists()
    tb.render_toy(tmp_path / "toy", 24, 8)
    for file in toy.rglob("*.avi"):
        assert file.read_bytes() == (tmp_path / "toy" / file.relative_to(toy)).read_bytes()


@pytest.mark.skipif("TIMEBALANCE_STRESS" not in os.environ, reason="TIMEBALANCE_STRESS is not set: takes minutes")
@pytest.mark.parametrize("stage, name", [(0, "inv"), (1, "dist"), (3, "labeled_only"), (4, "student")])
def test_twenty_kills_at_random_moments(stage, name, chain, toy, tmp_path):
    earlier_checkpoints(chain, tmp_path, name)
    module, own = STAGES[stage]
    rng = np.random.default_rng(stage)
    for k in range(20):
        command = [f"{module.__name__}.py", *TINY, *own, "--root", toy, "--out", tmp_path, "--workers", str(k % 3)]
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 8))
        process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[k % 3])
        process.wait(60)
        for line in (tmp_path / f"{name}.log").read_text().splitlines() if (tmp_path / f"{name}.log").exists() else []:
            json.loads(line)
    run_stage(stage, toy, tmp_path)
    assert_same_checkpoints(chain, tmp_path, [name])


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_leaves_the_last_checkpoint(chain, toy, tmp_path, monkeypatch, capsys):
    shutil.copy(chain / "inv.pt", tmp_path)
    before = (tmp_path / "inv.pt").read_bytes()
    monkeypatch.setattr(tb.torch, "save", lambda state, file, save=torch.save: save(state, FullDisk()))
    with pytest.raises(SystemExit) as end:
        run_stage(0, toy, tmp_path, "--epochs", "3")
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "inv.pt cannot be written, what was there is left" in error and "\n" not in error
    assert (tmp_path / "inv.pt").read_bytes() == before and not list(tmp_path.glob(".inv.pt*"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_checkpoint_runs(tmp_path, toy):
    torch.save({"stage": "pretrain_inv", "model": Malicious(tmp_path / "touched")}, tmp_path / "inv.pt")
    with pytest.raises(tb.UserError, match="inv.pt"):
        tb.read_checkpoint(tmp_path / "inv.pt")
    with pytest.raises(SystemExit):
        finetune.main([*TINY, "--init", "inv.pt", "--root", str(toy), "--out", str(tmp_path)])
    assert not (tmp_path / "touched").exists()


def test_other_arguments_are_refused_with_both_values(chain, toy, tmp_path, capsys):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    for stage, flags, words in [(0, ["--size", "32"], ("size", "16", "32")), (1, ["--seed", "7"], ("seed", "0", "7")),
                                (0, ["--lr", "0.5"], ("lr", "0.001", "0.5")), (0, ["--epochs", "1"], ("2 epochs", "1")),
                                (2, ["--percent", "40"], ("percent", "6", "40")),
                                (4, ["--omega", "3"], ("omega", "1.0", "3.0"))]:
        with pytest.raises(SystemExit) as end:
            run_stage(stage, toy, tmp_path, *flags)
        error = capsys.readouterr().err
        assert end.value.code == 2 and all(word in error for word in words), error
    shutil.copy(tmp_path / "student.pt", tmp_path / "inv.pt")
    with pytest.raises(SystemExit):
        run_stage(0, toy, tmp_path)
    assert "not written by this stage" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch, capsys):
    calls = []

    def exploding(z, temperature):
        calls.append(1)
        return tb.invariant_loss(z, temperature) * (math.nan if len(calls) == 9 else 1)

    monkeypatch.setattr(pretrain_inv, "invariant_loss", exploding)
    with pytest.raises(SystemExit) as end:
        run_stage(0, toy, tmp_path)
    error = capsys.readouterr().err
    assert end.value.code == 1 and "epoch 2, step 3: not finite: {'loss': nan}" in error and error.count(".avi") == 4
    saved = load(tmp_path, "inv")
    assert saved["epoch"] == 1 and all(w.isfinite().all() for w in saved["model"].values())


def torchrun(script, *argv, flags=(), interrupt=lambda: False):
    """Run a script in two processes; send Ctrl-C to all of them, as a terminal does, as soon as interrupt() says so."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", *flags]
    process = subprocess.Popen([sys.executable, "-m", *launcher, script, *map(str, argv)], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 150
    while process.poll() is None and not interrupt() and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def test_ctrl_c_under_torchrun(toy, tmp_path):
    flags = [*TINY, "--clips", "2", "--root", toy, "--epochs", "12", "--out"]
    assert torchrun("pretrain_inv.py", *flags, tmp_path / "whole").returncode == 0
    log = tmp_path / "stopped/inv.log"
    stopped = torchrun("pretrain_inv.py", *flags, tmp_path / "stopped",
                       interrupt=lambda: log.exists() and log.read_text().count("\n") >= 4)
    assert stopped.returncode != 0 and "interrupted; the same command goes on" in stopped.stderr, stopped.stderr
    saved = load(tmp_path / "stopped", "inv")
    assert 3 <= saved["epoch"] < 12 and not saved["finished"]
    assert torchrun("pretrain_inv.py", *flags, tmp_path / "stopped", "--workers", "1").returncode == 0
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "stopped", ["inv"])


def test_torchrun_trains_resumes_and_evaluates(chain, toy, tmp_path):
    flags = [*TINY, "--clips", "2", "--root", toy, "--out", tmp_path]
    whole = torchrun("pretrain_inv.py", *flags)
    assert whole.returncode == 0, whole.stderr[-3000:]
    weights = load(tmp_path, "inv")
    second_process = 'len(count) == at and os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10"'
    (tmp_path / "killed.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
                                        + SIGNALLED.replace("len(count) == at", second_process))
    begin = time.monotonic()
    again = [*TINY, "--clips", "2", "--root", toy, "--out", tmp_path / "again"]
    dead = torchrun(tmp_path / "killed.py", "step", 9, int(signal.SIGKILL), "pretrain_inv", *again)
    assert dead.returncode != 0 and time.monotonic() - begin < 60 and "exitcode  : -9" in dead.stderr
    assert (load(tmp_path / "again", "inv")["epoch"], load(tmp_path / "again", "inv")["finished"]) == (1, False)
    gone_on = torchrun(tmp_path / "killed.py", "step", 3, int(signal.SIGKILL), "pretrain_inv", *again,
                       flags=["--max-restarts=1"])
    assert gone_on.returncode == 0, gone_on.stderr[-3000:]
    assert same(weights["model"], load(tmp_path / "again", "inv")["model"])
    assert len((tmp_path / "again/inv.log").read_text().splitlines()) == 3
    shutil.copytree(chain, tmp_path / "eval")
    both = torchrun("evaluate.py", tmp_path / "eval", *"--clips 2 --device cpu --workers 0 --precision fp32".split())
    assert both.returncode == 0, both.stderr[-3000:]
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (chain, tmp_path / "eval"))
    assert [{**r, "seconds": 0} for r in one] == [{**r, "seconds": 0} for r in two]
    odd = torchrun("pretrain_inv.py", *flags, "--batch", 5, "--restart")
    assert odd.returncode != 0 and "--batch 5 cannot be shared among 2 processes" in odd.stderr


LONG = """
import gc, os, sys, common, pretrain_inv
seen, save = [], common.Run.save
def measured(run, *args, **more):
    save(run, *args, **more)
    children = [int(p) for p in open(f"/proc/self/task/{os.getpid()}/children").read().split()]
    memory = [int(open(f"/proc/{p}/statm").read().split()[1]) * 4096 for p in [os.getpid(), *children]]
    seen.append((sum(memory), len(os.listdir("/proc/self/fd"))))
common.Run.save = measured
pretrain_inv.main(sys.argv[1:])
early, late = seen[40], seen[-2]
assert late[0] - early[0] < 30e6 and late[1] <= early[1] + 2, (early, late)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_files_stay_flat_over_200_epochs(tmp_path):
    tb.render_toy(tmp_path / "toy", 8, 8)
    flags = [*TINY, *"--clips 2 --frames 4 --batch 8 --epochs 200 --workers 1 --root".split(), tmp_path / "toy"]
    flags += ["--out", tmp_path]
    done = subprocess.run([sys.executable, "-c", LONG, *flags], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([json.loads(line) for line in (tmp_path / "inv.log").read_text().splitlines()]) == 201


# ---- Mistakes of the user's: one line, exit status 2 -----------------------------------------------------------------

@pytest.mark.parametrize("module, flags, word", [
    (pretrain_inv, "--data ucf102", "--data"), (pretrain_inv, "--arch r3d_19", "--arch"),
    (pretrain_inv, "--frames x", "--frames"), (pretrain_inv, "--size 8", "--size"),
    (pretrain_inv, "--batch 1", "--batch"), (pretrain_inv, "--batch 25", "--batch 25"),
    (pretrain_inv, "--clips 1", "--clips"), (pretrain_inv, "--lr -1", "--lr"), (pretrain_inv, "--lr nan", "--lr"),
    (pretrain_inv, "--temperature 0", "--temperature"), (pretrain_inv, "--epochs 0", "--epochs"),
    (pretrain_inv, "--what", "--what"), (pretrain_inv, "--percent 5", "--percent"),
    (pretrain_inv, "--size 128 --precision bf16", "--precision fp32"),
    (pretrain_inv, "--data ucf101 --root /nowhere", "/nowhere"),
    (pretrain_inv, "--data hmdb51 --root /nowhere", "/nowhere"),
    (pretrain_inv, "--data folder --root /nowhere", "/nowhere"), (pretrain_dist, "--frames 8", "--frames 8"),
    (pretrain_dist, "--clips 3", "--clips 3"), (finetune, "--percent 0", "--percent"),
    (finetune, "--percent 101", "--percent"), (finetune, "--init no.pt", "no.pt"),
    (finetune, "--out OUT/none", "pretrain_inv.py"), (finetune, "--init again.pt", "again.pt"),
    (finetune, "--arch r3d_18", "--arch"), (finetune, "--init OUT/bad/broken.pt", "broken.pt"),
    (finetune, "--labeled-list no.txt", "no.txt"), (finetune, "--percent 5 --labeled-list no.txt", "--labeled-list"),
    (finetune, "--init OUT/bad/text.pt", "text.pt"), (finetune, "--size 24", "--size"),
    (train_student, "--teachers inv.pt dist.pt", "inv.pt"), (train_student, "--reweight 2", "--reweight"),
    (train_student, "--teachers inv_ft.pt inv_ft.pt", "--teachers"), (train_student, "--omega -1", "--omega"),
    (train_student, "--teachers OUT/bad/other.pt", "classes"), (train_student, "--teacher-loss l1", "--teacher-loss"),
    (train_student, "--init nothing.pt", "nothing.pt"), (train_student, "--percent 50", "--percent"),
    (train_student, " ".join(TINY) + " --lr 0.1 --name again", "lr"), (evaluate, "OUT/inv.pt", "inv.pt"),
    (evaluate, "/nowhere", "/nowhere"), (evaluate, "OUT/empty", "empty"), (evaluate, "OUT --scales 2", "--scales"),
    (evaluate, "OUT --root /nowhere", "/nowhere"), (evaluate, "OUT/bad/other.pt", "classes"),
    (pretrain_inv, "--out OUT/inv.pt/x", "cannot be written"),
    (pretrain_inv, "--data folder --root OUT/empty", "train"),
    (pretrain_inv, "--data kinetics400 --root OUT/hollow", "no training videos"),
    (finetune, "--labeled-list OUT/empty/list.txt", "names no video"),
    (evaluate, "OUT/inv_ft.pt --figures", "dist_ft.pt"), (evaluate, "--videos OUT", "--checkpoint"),
    (evaluate, "--videos OUT/bad --checkpoint OUT/inv.pt", "inv.pt"),
])
def test_mistakes_cost_one_line(module, flags, word, chain, toy, tmp_path, capsys):
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
    argv = flags.replace("OUT", str(tmp_path)).split()
    if module is not evaluate:
        argv += [] if "--out" in argv else ["--out", str(tmp_path)]
        argv += [] if "--root" in argv else ["--root", str(toy)]
        argv += ["--restart"] if module in (pretrain_inv, pretrain_dist) else []
    with pytest.raises(SystemExit) as end:
        module.main([*argv, "--device", "cpu"])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and word in error and "\n" not in error and error.startswith(module.__name__), error


def test_out_of_gpu_memory_names_the_flags_that_help(capsys):
    @tb.command
    def main(argv=None):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in error
    assert all(flag in error for flag in ("--checkpointing", "--batch", "--size"))
