"""TimeBalance (Dave et al., CVPR 2023, arXiv 2303.16268): what the five stages share.

    errors and printing - losses - TSTR - models - decoding - augmentation - lists of videos
    distributed - toy videos - commands - batches - state - meter - checkpoints - passes - arguments

The first line is the method. It takes tensors, paths and plain numbers alone, so any function or
class of it can be copied into other code with the few names that it calls. The second line is what
a run of many days needs: it knows of ranks, checkpoints and command lines."""

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections import Counter, OrderedDict, namedtuple
from datetime import timedelta
from pathlib import Path

# Read when torch is loaded, hence before it, here and in the scripts. A thread that waits for
# another one is to sleep: if it spins, each busy neighbour makes a step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ---- Errors and printing -------------------------------------------------------------------------
class UserError(Exception):
    """A mistake in arguments or input: `command` makes it one line on stderr and exit status 2."""
    status = 2


class TrainingError(UserError):
    """Training cannot go on: one line on stderr, exit status 1."""
    status = 1


def print0(*text):
    """Print above the progress bar, from torchrun's first process alone; what the terminal's
    encoding has not, as a file's name may, as an escape."""
    if os.environ.get("RANK", "0") == "0":
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = " ".join(map(str, text))
        tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding))


# ---- Losses --------------------------------------------------------------------------------------
def cosine_similarity(a, b):
    """Sim(., .) of Eq. 5 and tau * log h(., .) of Eq. 1-3, all pairs: (..., n, d), (..., m, d) ->
    (..., n, m).

    In float32 inside autocast too: in bfloat16 a cosine of 0.9 is off by 0.002, which 1 / tau
    multiplies by ten."""
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(a.float(), dim=-1)
        b = F.normalize(b.float(), dim=-1)
        return a @ b.transpose(-1, -2)


def check_clips(z, other=None):
    """ValueError unless z is (B, n >= 2, d) and `other`, where given, of the same shape."""
    shapes = [tuple(t.shape) for t in (z, other) if t is not None]
    if len(set(shapes)) > 1 or z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"expected (videos, clips >= 2, dimensions), one shape, got {shapes}")


def invariant_loss(z, temperature=0.1):
    """L_I, Eq. 1: clips of one video agree, clips of different videos do not.

    z: (B, n, d), n >= 2 clips of each of B >= 2 videos, of any norm. Returns a scalar: the mean
    over the ordered pairs of clips of one video, which is the paper's sum up to a factor
    B * n * (n - 1). ValueError for other shapes.

    Eq. 1 as printed: the indicator covers the first term of the denominator alone. So the anchor
    z[i, t1] meets clip t1 of the other videos, and clip t2 of every video; the latter's j = i is
    the positive."""
    check_clips(z)
    B, n, _ = z.shape
    if B < 2:
        raise ValueError("Eq. 1 takes its negatives from other videos: a batch needs at least two")
    logits = cosine_similarity(z.flatten(0, 1), z.flatten(0, 1)) / temperature
    logits = logits.view(B, n, B, n)  # i, t1, j, t2
    same_video = torch.eye(B, dtype=torch.bool, device=z.device)
    same_clip = torch.eye(n, dtype=torch.bool, device=z.device)
    positive = logits.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # i, t1, t2
    to_t1 = logits.diagonal(dim1=1, dim2=3)  # i, j, t1
    to_t1 = to_t1.masked_fill(same_video[:, :, None], -torch.inf).logsumexp(1)  # i, t1
    to_t2 = logits.logsumexp(2)  # i, t1, t2
    loss = torch.logaddexp(to_t1[:, :, None], to_t2) - positive
    return loss.masked_fill(same_clip, 0).sum() / (B * n * (n - 1))


def distinctive_loss(z, z_aug, temperature=0.1):
    """L_D1, Eq. 3: a clip agrees with its other augmentation, not with the video's other clips.

    z, z_aug: (B, n, d), the same n >= 2 clips of B videos under two augmentations, of any norm.
    Returns a scalar: the mean over the 2 * B * n anchors. ValueError for other shapes.

    The negatives of an anchor are the other timestamps of its own video in both augmentations. Two
    readings of Eq. 3: its denominator also holds the positive (as printed, without it, the loss has
    no lower bound), and a clip of either augmentation serves as anchor."""
    check_clips(z, z_aug)
    B, n, _ = z.shape
    views = torch.cat([z, z_aug], 1)  # (B, 2n, d)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (cosine_similarity(views, views) / temperature).masked_fill(itself, -torch.inf)
    positive = torch.arange(2 * n, device=z.device).roll(n)  # the clip in the other augmentation
    return F.cross_entropy(logits.flatten(0, 1), positive.repeat(B))


def unpooled_distinctive_loss(z_local, z_global, temperature=0.1):
    """L_D2, supplement D.2 (the local-global loss of TCLR): short clip t agrees with slice t of the
    long clip.

    z_local: (B, n, d), the n >= 2 short clips of B videos, pooled over time. z_global: (B, n, d),
    the n temporal slices of the long clip that spans them. Of any norm. Returns a scalar: InfoNCE
    over the video's n slices for each clip and over its n clips for each slice, mean over both and
    over videos. ValueError for other shapes."""
    check_clips(z_local, z_global)
    B, n, _ = z_local.shape
    logits = cosine_similarity(z_local, z_global) / temperature  # B, clip, slice
    aligned = torch.arange(n, device=logits.device).expand(B, n)
    to_slices = F.cross_entropy(logits.transpose(1, 2), aligned)
    to_clips = F.cross_entropy(logits, aligned)
    return (to_clips + to_slices) / 2


def distillation_loss(p_student, p_teacher, kind="l2"):
    """L_unsup, Eq. 8 ("l2"), and the two other losses of supplement C.1, in natural logarithms.

    p_student, p_teacher: (B, C) probabilities. Returns a scalar: the sum over classes of the
    squared difference ("l2"), KL(teacher || student) ("kl") or the Jensen-Shannon divergence
    ("js"), mean over the batch. Probabilities under 1e-8 count as 1e-8 inside logarithms: one-hot
    vectors have finite gradients. ValueError for other shapes or kinds."""
    if p_student.ndim != 2 or p_student.shape != p_teacher.shape:
        shapes = f"{tuple(p_student.shape)} and {tuple(p_teacher.shape)}"
        raise ValueError(f"expected two (B, C), got {shapes}")
    p_student = p_student.float()
    p_teacher = p_teacher.float()

    def kl(p, q):
        return (p * (p.clamp_min(1e-8).log() - q.clamp_min(1e-8).log())).sum(1)

    if kind == "l2":
        return (p_teacher - p_student).square().sum(1).mean()
    if kind == "kl":
        return kl(p_teacher, p_student).mean()
    if kind == "js":
        middle = (p_teacher + p_student) / 2
        return (kl(p_teacher, middle) + kl(p_student, middle)).mean() / 2
    raise ValueError(f"unknown distillation loss {kind!r}: l2, kl or js")


# ---- Temporal similarity based teacher reweighting (TSTR, Sec. 3.2) ------------------------------
def temporal_similarity(z):
    """C, Eq. 5: (B, n, d) representations of n clips of B videos -> (B, n, n) cosines of clips."""
    check_clips(z)
    return cosine_similarity(z, z)


def similarity_score(c_inv, c_dist):
    """s, Eq. 6: the mean of the off-diagonal elements of both teachers' (B, n, n) matrices -> (B,),
    clamped to [0, 1]: a cosine can be negative, a weight cannot, which the paper leaves open."""
    check_clips(c_inv, c_dist)
    n = c_inv.shape[1]
    diagonal = torch.eye(n, dtype=torch.bool, device=c_inv.device)
    total = (c_inv.float() + c_dist.float()).masked_fill(diagonal, 0).sum((1, 2))
    return (total / (2 * n * (n - 1))).clamp(0, 1)


def combine_teachers(p_inv, p_dist, score):
    """p_T, Eq. 7: two (B, C) probabilities, weighted by score (B,) and 1 - score -> (B, C)."""
    if p_inv.ndim != 2 or p_inv.shape != p_dist.shape or score.shape != p_inv.shape[:1]:
        shapes = [tuple(t.shape) for t in (p_inv, p_dist, score)]
        raise ValueError(f"expected (B, C), (B, C), (B,), got {shapes}")
    return score[:, None] * p_inv + (1 - score)[:, None] * p_dist


# ---- Models --------------------------------------------------------------------------------------
class Backbone(nn.Module):
    """What both networks share: their parts() one after the other, each followed by ReLU, make the
    features.

    recomputed: how many of the first parts recompute_parts recomputes, and how many of these it
    recomputes twice."""

    def parts(self):
        """The stem and the residual blocks, in order, without their last ReLU.

        ReLU keeps its output for the backward pass. Outside of the parts that is the tensor which
        the next part keeps as its input; a recomputed part would make it a second time."""
        raise NotImplementedError

    def features(self, x):
        """(B, 3, T, H, W) -> (B, D, T'), pooled over space only."""
        for part in self.parts():
            x = F.relu(part(x))
        return x.mean((3, 4))

    def initialise(self, mean, std):
        """torchvision's and PyTorchVideo's initial weights; mean, std: of the RGB in [0, 1] that
        theirs expect."""
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


class R3D(Backbone):
    """torchvision's r3d_18, key for key and shape for shape, but layer4 keeps the time axis.

    Its first convolution and its downsampling have no temporal stride, the convolution a temporal
    dilation of 2 instead: 16 frames leave T' = 4 time steps, which L_D2 needs. r3d_18 has width 64
    and 2 blocks a layer. early: the first halving of time in the stem instead of layer2, which
    takes half the operations."""

    def __init__(self, num_classes, width=64, depth=2, early=False):
        super().__init__()

        def layer(dim_in, dim_out, stride):
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(
                    nn.Conv3d(dim_in, dim_out, 1, stride, bias=False), nn.BatchNorm3d(dim_out))
            blocks = [BasicBlock(dim_in, dim_out, Conv3DSimple, stride, shortcut)]
            for _ in range(depth - 1):
                blocks.append(BasicBlock(dim_out, dim_out, Conv3DSimple))
            for block in blocks:
                block.relu = nn.Identity()  # features() has it
            return nn.Sequential(*blocks)

        stem = nn.Conv3d(3, width, (3, 7, 7), (1 + early, 2, 2), (1, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(width))
        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.layer4 = layer(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)
        if early:
            self.layer2[0].conv1[0].stride = (1, 2, 2)
            self.layer2[0].downsample[0].stride = (1, 2, 2)
        conv = self.layer4[0].conv1[0]
        conv.stride = (1, 2, 2)
        conv.dilation = conv.padding = (2, 1, 1)
        self.layer4[0].downsample[0].stride = (1, 2, 2)
        self.recomputed = 1 + depth, depth  # layer1's activations are four times the others'
        self.initialise(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))

    def parts(self):
        return [self.stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward(self, x):
        return self.fc(self.features(x).mean(2))


class Bottleneck(nn.Module):
    """One residual block of PyTorchVideo's slow_r50, under its names."""

    def __init__(self, dim_in, dim_inner, dim_out, temporal_kernel, stride):
        super().__init__()
        self.branch1_conv = self.branch1_norm = None
        if dim_in != dim_out:
            self.branch1_conv = nn.Conv3d(dim_in, dim_out, 1, (1, stride, stride), bias=False)
            self.branch1_norm = nn.BatchNorm3d(dim_out)
        kernel = (temporal_kernel, 1, 1)
        padding = (temporal_kernel // 2, 0, 0)
        self.branch2 = nn.Sequential(OrderedDict(
            conv_a=nn.Conv3d(dim_in, dim_inner, kernel, padding=padding, bias=False),
            norm_a=nn.BatchNorm3d(dim_inner),
            act_a=nn.ReLU(inplace=True),
            conv_b=nn.Conv3d(dim_inner, dim_inner, (1, 3, 3), (1, stride, stride), (0, 1, 1),
                             bias=False),
            norm_b=nn.BatchNorm3d(dim_inner),
            act_b=nn.ReLU(inplace=True),
            conv_c=nn.Conv3d(dim_inner, dim_out, 1, bias=False),
            norm_c=nn.BatchNorm3d(dim_out)))
        nn.init.zeros_(self.branch2.norm_c.weight)

    def forward(self, x):
        shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return shortcut + self.branch2(x)  # features() has the ReLU


class SlowR50(Backbone):
    """PyTorchVideo's slow_r50 (the paper's 3D-ResNet-50), key for key and number for number, for
    any input size.

    No temporal stride anywhere, temporal kernels of 3 in the last two stages only."""

    def __init__(self, num_classes):
        super().__init__()
        stem = nn.Sequential(OrderedDict(
            conv=nn.Conv3d(3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            norm=nn.BatchNorm3d(64),
            pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))))  # ReLU behind it is the same
        stages = []
        dim_in = 64
        for depth, inner, kernel, stride in [(3, 64, 1, 1), (4, 128, 1, 2), (6, 256, 3, 2),
                                             (3, 512, 3, 2)]:
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(Bottleneck(dim_in, inner, 4 * inner, kernel, stride if i == 0 else 1))
                dim_in = 4 * inner
            stages.append(nn.Sequential(OrderedDict(res_blocks=blocks)))
        head = nn.Sequential(OrderedDict(
            dropout=nn.Dropout(0.5), proj=nn.Linear(dim_in, num_classes)))
        self.blocks = nn.Sequential(stem, *stages, head)
        self.recomputed = 16, 3
        self.initialise(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))

    def parts(self):
        stem, *stages, _ = self.blocks
        return [stem] + [block for stage in stages for block in stage.res_blocks]

    def forward(self, x):
        return self.blocks[-1](self.features(x).mean(2))


ARCHS = {
    "r3d_18": R3D,
    "slow_r50": SlowR50,
    "r3d_tiny": functools.partial(R3D, width=12, depth=1, early=True),
}
CLASSIFIERS = ("fc.", "blocks.5.proj.")  # the keys under which the classifier's weights lie


def build_model(arch, num_classes):
    """A classifier of clips, (B, 3, T, H, W) -> logits (B, num_classes), with
    .features(x) -> (B, D, T').

    arch: r3d_18 (D = 512, T' = T / 4), slow_r50 (D = 2048, T' = T), or r3d_tiny, an r3d of a fifth
    of the width and half the depth (D = 96, T' = T / 4). The state dict has torchvision's or
    PyTorchVideo's keys. ValueError for other names."""
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: {', '.join(ARCHS)}")
    return ARCHS[arch](num_classes)


def count_time_steps(arch, frames, size):
    """T', the time steps in the features of a clip."""
    with torch.device("meta"):  # computes shapes alone
        return build_model(arch, 1).features(torch.empty(1, 3, frames, size, size)).shape[2]


def count_flop(arch, frames, size):
    """The FLOP that a clip takes: forward, and backward."""
    with torch.device("meta"):
        with FlopCounterMode(display=False) as forward:
            logits = build_model(arch, 1)(torch.empty(1, 3, frames, size, size))
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


class ProjectionHead(nn.Sequential):
    """g, supplement B.1.2: (B, dim) clip features -> (B, 128) of unit length."""

    def __init__(self, dim):
        super().__init__(
            nn.Linear(dim, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 128, bias=False),
            nn.BatchNorm1d(128))

    def forward(self, x):
        return F.normalize(super().forward(x).float(), dim=-1)


class Embedder(nn.Module):
    """g(f(x)): a backbone of build_model and its projection head in one module, as
    DistributedDataParallel needs it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        for name, parameter in backbone.named_parameters():
            if name.startswith(CLASSIFIERS):
                parameter.requires_grad_(False)  # no part of the self-supervised stage
                if name.endswith("weight"):
                    self.head = ProjectionHead(parameter.shape[1])

    def forward(self, clips, num_long=0, slices=1):
        """(N, 3, T, H, W), the last `num_long` of them long clips ->
        (N - num_long + num_long * slices, 128).

        A row for each clip, pooled over time, then `slices` rows for each long clip, one for each
        temporal slice of its features. All pass the head together: its BatchNorm sees one batch."""
        f = self.backbone.features(clips)  # (N, D, T')
        pooled, unpooled = f.split([len(f) - num_long, num_long])
        unpooled = unpooled.unflatten(2, (slices, -1)).mean(3)  # (num_long, D, slices)
        unpooled = unpooled.transpose(1, 2).flatten(0, 1)  # (num_long * slices, D)
        return self.head(torch.cat([pooled.mean(2), unpooled]))


def load_backbone(model, saved):
    """Give a model all weights but the classifier's, from what torch.load returned, whoever wrote
    it -> how many tensors were taken and left.

    Known public forms: torchvision's r3d_18 (a bare state dict), PyTorchVideo's slow_r50 (under
    "model_state"), TCLR's (under "state_dict", names behind "module.0.", trained on BGR frames).
    ValueError if a tensor is missing or does not fit."""
    weights = saved
    for key in ("state_dict", "model_state", "model"):
        weights = saved.get(key, weights)
    tclr = any(name.startswith("module.0.") for name in weights)
    prefix = "module.0." if tclr else "module."
    weights = {name.removeprefix(prefix).removeprefix("module."): w for name, w in weights.items()}
    own = {k: w for k, w in model.state_dict().items() if not k.startswith(CLASSIFIERS)}
    fitting = {}
    for key, weight in own.items():
        if key in weights and weights[key].shape == weight.shape:
            fitting[key] = weights[key]
    unfit = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    if unfit:
        raise ValueError(f"{len(fitting)} of {len(own)} tensors fit, {unfit[0]} does not: "
                         "another arch?")
    if tclr:
        fitting["stem.0.weight"] = fitting["stem.0.weight"].flip(1)
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(weights) - len(fitting)


def recompute_parts(backbone):
    """Recompute parts in the backward pass (activation checkpointing, --checkpointing): of each it
    keeps the input until then, and not even that of the very first, whose activations are the
    largest: these are recomputed together, to have the input of each, then one by one."""
    @contextlib.contextmanager
    def without_statistics(module):  # the first pass has updated BatchNorm's, no other must
        before = [buffer.clone() for buffer in module.buffers()]
        try:
            yield
        finally:  # torch leaves a second pass by an exception, as soon as it has what it needs
            for buffer, value in zip(module.buffers(), before):
                buffer.data.copy_(value)  # .data: autograd has saved them and need not know

    def recompute_inside(module):
        def contexts():
            return contextlib.nullcontext(), without_statistics(module)

        module.forward = functools.partial(
            recompute, module.forward, use_reentrant=False, context_fn=contexts)

    once, twice = backbone.recomputed
    parts = backbone.parts()
    for part in parts[:once]:
        recompute_inside(part)
    first = nn.Sequential(parts[0])
    for part in parts[1:twice]:
        first.extend([nn.ReLU(), part])
    recompute_inside(first)
    backbone.parts = lambda: [first, *parts[twice:]]


# ---- Decoding: exact frames of real files --------------------------------------------------------
SEEKABLE = {"avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}  # have an index: seeking is exact
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)  # what a damaged file can raise
# HMDB51 has metadata that is not UTF-8, which PyAV below 19 takes for an error.
OPEN = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def open_video(path):
    """An open av container and its first video stream that is no attached picture, decoded in this
    thread."""
    # "file:" keeps a name with a colon from being taken for a URL.
    container = av.open(f"file:{os.fspath(path)}", **OPEN)
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "NONE"  # the data loader's workers are the threads
            return container, stream
    container.close()
    raise ValueError("no video stream")


def decode_frames(path, indices, short_side=None):
    """Decode frames of a video file by their index in presentation order.

    path: a file of any format that FFmpeg reads.
    indices: from 0, in any order, repeated or not; or a function from the count of frames to them.
        Files do not know their count of frames: the function is called with the count of packets,
        and again with the true count where fewer frames come out (HMDB51's files hold a packet too
        many, truncated files more).
    short_side: scale frames down, never up, to this many pixels on their shorter side.

    Returns torch.uint8 (len(indices), H, W, 3), RGB, upright: what a full decode gives there.
    IndexError for a frame past the end; av.FFmpegError, OSError or ValueError for a file that
    cannot be decoded."""
    container, stream = open_video(path)
    with container:
        # About 1 ms: decodes nothing.
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        wanted = [int(i) for i in (indices(len(packets)) if callable(indices) else indices)]
        if min(wanted, default=-1) < 0:
            raise IndexError(f"frames {wanted} asked for")
        # A frame's index is the rank of its timestamp. Not so in AVI with B-frames (XviD and DivX,
        # so much of UCF101 and all of HMDB51), whose timestamps are not in order, nor where the
        # file begins in the middle of a group.
        pts = [p.pts for p in packets]
        b_frames_in_avi = container.format.name == "avi" and stream.codec_context.has_b_frames
        starts_clean = (packets and None not in pts and packets[0].is_keyframe
                        and pts[0] == min(pts))
        if container.format.name in SEEKABLE and starts_clean and not b_frames_in_avi:
            index = {t: i for i, t in enumerate(sorted(pts))}
            keyframes = [p.pts for p in packets if p.is_keyframe]
            container.seek(max(t for t in keyframes if index[t] <= min(wanted)), stream=stream)
            indexed = ((index.get(frame.pts), frame) for frame in decode(container, stream))
            frames, _ = pick_frames(indexed, wanted, short_side)
            if frames is not None:
                return frames
    container, stream = open_video(path)  # count from the start
    with container:
        frames, count = pick_frames(enumerate(decode(container, stream)), wanted, short_side)
    if frames is not None:
        return frames
    if not count:
        raise ValueError("no frame can be decoded")
    if callable(indices):
        return decode_frames(path, indices(count), short_side)
    raise IndexError(f"frame {max(wanted)} asked for, the video has {count}")


def decode(container, stream):
    """All frames from here on. A damaged packet yields none and ends nothing, as in players."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


def pick_frames(indexed_frames, wanted, short_side):
    """Of (index, frame) pairs in rising order the wanted ones: (uint8 (T, H, W, 3), None if one is
    missing; count of frames seen).

    Stops behind the last wanted frame, and at a gap: indices behind it are not a full decode's."""
    places = {}
    for place, index in enumerate(wanted):
        places.setdefault(index, []).append(place)
    out = None
    count = 0
    last = max(wanted)
    # One for all frames: PyAV's default is one for each, 4 times slower.
    scaler = av.video.reformatter.VideoReformatter()
    for index, frame in indexed_frames:
        if index is None or (count and index != count):
            return None, 0
        count = index + 1
        if index in places:
            if out is None:  # the first frame settles the size, should it change within the file
                scale = 1
                if short_side:
                    scale = min(1, short_side / min(frame.height, frame.width))
                height = round(frame.height * scale)
                width = round(frame.width * scale)
                quarter_turns = round(frame.rotation / 90) % 4
                upright = (width, height) if quarter_turns % 2 else (height, width)
                out = np.empty((len(wanted), *upright, 3), np.uint8)
            rgb = scaler.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
            if quarter_turns:  # the call alone costs a tenth of the decoding
                rgb = np.rot90(rgb, quarter_turns)
            out[places.pop(index)] = rgb
        if index == last:
            break
    return (None if places else torch.from_numpy(out)), count


def clip_span(frames, stride):
    """The frames of a video from the first to the last of a clip."""
    return (frames - 1) * stride + 1


def clip_indices(count, frames, stride=1, position=0.5):
    """Indices of a clip of `frames` frames, `stride` apart, in a video of `count`; of all of a
    shorter video, in slow motion. (Were it looped, its last clip could repeat its first, which L_D
    is to tell apart.)

    position: from 0 (the clip begins with the video) to 1 (it ends with it)."""
    slack = count - clip_span(frames, stride)
    if slack < 0:
        return np.arange(frames) * count // frames
    start = min(slack, int(position * (slack + 1)))
    return start + stride * np.arange(frames)


def spaced_clips(count, clips, frames, stride):
    """Indices of uniformly spaced clips, one after the other; a single one lies in the middle."""
    positions = np.linspace(0, 1, clips) if clips > 1 else [0.5]
    return np.concatenate([clip_indices(count, frames, stride, p) for p in positions])


# ---- Augmentation, on the device -----------------------------------------------------------------
def draw(seed, *key):
    """The random numbers that belong to a key of whole numbers, whoever asks, and whenever: a numpy
    Generator."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def seed_of(stage, seed):
    """The seed of one stage's weights and draws: else both teachers would begin alike and see the
    same crops of the same videos (Algorithm 1, line 6)."""
    return int(draw(seed, *stage.encode()).integers(2**62))


WEAK = dict(area=0.5, jitter=0.2, hue=0.05, p_jitter=0.5, p_grey=0.1)  # stages 2 and 3


def augment_clips(clips, size, rngs, area=0.3, jitter=0.4, hue=0.1, p_jitter=0.8, p_grey=0.2):
    """A random crop, flip, colour jitter and greyscale of each clip (Sec. 4.2), the same for all
    its frames, drawn from a numpy Generator for each. The defaults are stage 1's.

    clips: N times uint8 (T, H, W, 3) on any device -> uint8 (N, T, 3, size, size). area: least
    share of the frame that the crop keeps. jitter, hue: largest change of brightness, contrast,
    saturation, and of hue. p_jitter, p_grey: how often.

    One kernel or two for each clip, the crop; then each change of colour at once for all clips that
    take it in the same place of their order."""
    crops = []
    flipped = []
    grey = []
    takers = {(place, change): [] for place in range(4) for change in range(4)}
    amounts = np.zeros((len(clips), 4))  # of brightness, contrast, saturation, hue
    for i, (clip, rng) in enumerate(zip(clips, rngs)):
        height, width = clip.shape[1:3]
        pixels = rng.uniform(area, 1) * height * width
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        h = min(height, round(math.sqrt(pixels / ratio)))
        w = min(width, round(math.sqrt(pixels * ratio)))
        top = int(rng.integers(height - h + 1))
        left = int(rng.integers(width - w + 1))
        crop = clip[:, top:top + h, left:left + w].permute(0, 3, 1, 2)
        if crop.is_cuda:
            crop = crop.float()  # only a CPU scales uint8
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
        if rng.random() < 0.5:
            flipped.append(i)
        if rng.random() < p_jitter:
            amounts[i, :3] = rng.uniform(1 - jitter, 1 + jitter, 3)
            amounts[i, 3] = rng.uniform(-hue, hue)
            for place, change in enumerate(rng.permutation(4)):
                takers[place, change].append(i)
        if rng.random() < p_grey:
            grey.append(i)

    x = torch.stack(crops)
    if x.is_floating_point():
        x = x.round_().clamp_(0, 255).to(torch.uint8)
    # One copy to the device for all lists, and none that waits for it.
    groups = [flipped, *takers.values(), grey]
    ids = torch.tensor(sum(groups, [])).to(x.device, non_blocking=True)
    flipped, *takers, grey = ids.split([len(group) for group in groups])
    amounts = torch.from_numpy(amounts).to(x.device, non_blocking=True)  # float64
    amounts = amounts[..., None, None, None, None]  # clip, change, then as the clips
    if len(flipped):
        x[flipped] = x[flipped].flip(-1)
    for k, ids in enumerate(takers):
        change = k % 4
        if len(ids):
            x[ids] = CHANGES[change](x[ids], amounts[ids, change])
    if len(grey):
        x[grey] = luminance(x[grey]).to(torch.uint8)
    return x


def luminance(x):
    """Uint8 (..., 3, H, W) -> float32 (..., 1, H, W), whole numbers."""
    r, g, b = x.unbind(-3)
    return (0.2989 * r + 0.587 * g + 0.114 * b).floor_().unsqueeze(-3)


def blend(x, other, factor):
    x = (x * factor.float()).addcmul_(other, (1 - factor).float())
    return x.clamp_(0, 255).to(torch.uint8)


def change_brightness(x, factor):
    return (x * factor.float()).clamp_(0, 255).to(torch.uint8)


def change_contrast(x, factor):
    return blend(x, luminance(x).mean((-3, -2, -1), keepdim=True), factor)


def change_saturation(x, factor):
    return blend(x, luminance(x), factor)


def change_hue(x, turn):
    """turn: as a share of the colour circle."""
    x = x / 255
    r, g, b = x.split(1, -3)
    value = x.amax(-3, keepdim=True)
    chroma = value - x.amin(-3, keepdim=True)
    divisor = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / divisor,
                      torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4))
    sector = 5 - 2 * torch.arange(3, device=x.device).view(3, 1, 1)  # of red, green, blue
    k = (sector + hue + 6 * turn.float()) % 6
    x = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return (x * 255.999).to(torch.uint8)  # as torchvision rounds


CHANGES = [change_brightness, change_contrast, change_saturation, change_hue]


def centre_crop(clip, size, scale=1.0):
    """The central square of `scale` times the shorter side: uint8 (T, H, W, 3) ->
    uint8 (T, 3, size, size)."""
    clip = clip.permute(0, 3, 1, 2)
    side = round(scale * min(clip.shape[2:]))
    return TF.resize(TF.center_crop(clip, [side, side]), [size, size], antialias=True)


def to_input(clips, model):
    """N clips, uint8 (N, T, 3, H, W) or a list of them -> (N, 3, T, H, W), channels_last_3d,
    normalised by model.mean and model.std; in autocast's type inside autocast."""
    if not torch.is_tensor(clips):
        clips = torch.stack(clips)
    kind = clips.device.type
    dtype = model.mean.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    clips = clips.transpose(1, 2)
    x = torch.empty(clips.shape, dtype=dtype, device=clips.device,
                    memory_format=torch.channels_last_3d)
    scale = 1 / (255 * model.std).view(3, 1, 1, 1)
    shift = (-model.mean / model.std).view(3, 1, 1, 1)
    return torch.addcmul(shift, clips, scale, out=x)  # one kernel


# ---- Lists of videos, and which of them have labels ----------------------------------------------
SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm",
            ".wmv")


class Videos:
    """The videos of a data set, by an id from 0: name(i) (its path below `folder`), labels (N,)
    (-1: not known), classes."""

    def __init__(self, folder, names, labels, classes):
        self.folder = str(folder)
        self.labels = np.array(labels, np.int64)
        self.classes = list(classes)
        # One block of bytes. A list of strings would be copied into every worker, as its reference
        # counts change.
        self.encoded_names = np.array([os.fsencode(name) for name in names])

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return os.fsdecode(self.encoded_names[i])

    def names(self):
        return [self.name(i) for i in range(len(self))]

    def path(self, i):
        return os.path.join(self.folder, self.name(i))

    def hide_labels(self, keep=()):
        """The label firewall: overwrites all labels but those of `keep`, so that no later code can
        read them."""
        self.labels[np.setdiff1d(np.arange(len(self)), keep)] = -1


def read_videos(data, root, train, split=1, pool="train"):
    """The training or test videos of a data set as it lies on disk (the README shows the trees),
    all labels known.

    pool: of hmdb51's training videos, "train" for those of the split, "all" for every one that is
    not a test video. Of `folder`, what lies under unlabeled/ is among the training videos, with
    label -1. UserError if the lists or over 5 % of the videos that they name are missing."""
    root = Path(root)
    check_tree(data, root)
    if data == "hmdb51":
        folder, classes, class_of = read_hmdb51(root, train, split, pool)
    elif data in ("ucf101", "toy"):
        folder, classes, class_of = read_ucf101(root, train, split)
    else:
        folder, classes, class_of = read_folders(data, root, train)
    names = without_missing(list(class_of), folder)
    if not names:
        raise UserError(f"{folder}: no {'training' if train else 'test'} videos")
    class_number = {c: k for k, c in enumerate(classes)}
    labels = [class_number.get(class_of[name], -1) for name in names]
    if data != "folder" and -1 in labels:
        raise UserError(f"{names[labels.index(-1)]}: listed, but its class is not")
    return Videos(folder, names, labels, classes)


TREES = {  # the folders that a root must hold, if not "train": videos, lists
    "toy": ("UCF-101", "ucfTrainTestlist"),
    "ucf101": ("UCF-101", "ucfTrainTestlist"),
    "hmdb51": ("hmdb51_org", "testTrainMulti_7030_splits"),
}
UNPACK = {".rar": "unrar x -o- $f {}/", ".zip": "unzip -n $f -d {}", ".tar.gz": "tar xf $f -C {}"}


def check_tree(data, root):
    """UserError unless the root holds the data set's folders."""
    needed = TREES.get(data, ("train",))
    missing = [name for name in needed if not (root / name).is_dir()]
    if not missing:
        return
    found = list_folder(root)
    mend = ""
    if (root / needed[-1]).is_dir() and any(list_videos(root / name) for name in found):
        mend = f"ln -s . {root / needed[0]}"  # the folders of the classes lie in the root
    for folder in (root.parent, *map(root.joinpath, found)):
        if all((folder / name).is_dir() for name in needed):
            mend = f"give --root {folder}"
    raise UserError(f"{root} has no {' and no '.join(missing)}; {it_holds(root, mend)}")


def it_holds(folder, mend=""):
    """The end of an error: what a folder holds, and the command that mends it."""
    names = list_folder(folder)
    commands = []
    for suffix, command in UNPACK.items():
        if any(name.endswith(suffix) for name in names):
            commands.append(f"for f in {folder}/*{suffix}; do {command.format(folder)}; done")
    if folder.name in names:  # unpacked a level too deep
        commands.append(f"mv {folder}/{folder.name}/* {folder}")
    mend = mend or "; ".join(commands) or "the README shows the tree"
    return f"it holds {', '.join(names[:3]) or 'nothing'}: {mend}"


def read_ucf101(root, train, split):
    """Folder of the videos, classes, and {name: class}, by the official lists."""
    lists = root / "ucfTrainTestlist"
    classes = [line.split()[-1] for line in read_lines(lists / "classInd.txt")]
    rows = read_lines(lists / f"{'train' if train else 'test'}list0{split}.txt")
    names = [row.split()[0] for row in rows]
    return root / "UCF-101", classes, {name: os.path.dirname(name) for name in names}


def read_hmdb51(root, train, split, pool):
    """Folder of the videos, classes, and {name: class}, by the official lists: a file for each
    class, whose rows end in 1 (training), 2 (test) or 0 (neither)."""
    lists = root / "testTrainMulti_7030_splits"
    ending = f"_test_split{split}.txt"
    codes = "2" if not train else "1" if pool == "train" else "01"
    classes = [f.removesuffix(ending) for f in list_folder(lists) if f.endswith(ending)]
    class_of = {}
    for c in classes:
        for row in read_lines(lists / (c + ending)):
            file, code = row.rsplit(maxsplit=1)
            if code in codes:
                class_of[f"{c}/{file}"] = c
    return root / "hmdb51_org", classes, class_of


def read_folders(data, root, train):
    """Folder of the videos, classes, and {name: class}, where every class is a folder; or Kinetics
    as k400_extractor.sh leaves it, without such folders."""
    subset = "train" if train else "val" if data == "kinetics400" else "test"
    classes = subfolders(root / "train")
    class_of = {}
    if data == "kinetics400" and not classes and list_videos(root / "train"):
        classes = sorted(set(read_kinetics_labels(root, "train").values()))
        label_of = read_kinetics_labels(root, subset)
        files = list_videos(root / subset)
        class_of = {f"{subset}/{f}": label_of[f[:11]] for f in files if f[:11] in label_of}
        if len(class_of) < len(files):
            warnings.warn(f"{len(files) - len(class_of)} of {len(files)} videos in {root / subset} "
                          f"are in no row of {subset}.csv, left out")
    for c in classes:
        for file in list_videos(root / subset / c):
            class_of[f"{subset}/{c}/{file}"] = c
    if odd := set(subfolders(root / subset)) - set(classes):
        warnings.warn(f"{root / subset} has classes that {root / 'train'} has not, left out: "
                      + ", ".join(sorted(odd)))
    if data == "folder" and train:
        for path in walk_videos(root / "unlabeled"):
            class_of[os.path.relpath(path, root)] = None
    if not class_of:
        raise UserError(f"{root / subset}: no {'training' if train else 'test'} videos; "
                        f"{it_holds(root / subset)}")
    return root, classes, class_of


def read_kinetics_labels(root, subset):
    """{id, the first eleven letters of a file's name: label}, from annotations/*.csv."""
    table = root / "annotations" / f"{subset}.csv"
    rows = list(csv.DictReader(read_lines(table))) if table.exists() else []
    if not rows or not {"label", "youtube_id"} <= rows[0].keys():
        raise UserError(
            f"{root / subset} has no folders of classes, and {table} no columns label and "
            f"youtube_id: mkdir -p {table.parent}; wget -O {table} "
            f"https://s3.amazonaws.com/kinetics/400/annotations/{subset}.csv")
    return {row["youtube_id"]: row["label"] for row in rows}


def without_missing(names, folder):
    """The listed videos that are on disk; UserError if over 5 % are not."""
    present = {}
    for parent in {os.path.dirname(name) for name in names}:
        if (folder / parent).is_dir():
            present[parent] = set(os.listdir(folder / parent))
    missing = [n for n in names if os.path.basename(n) not in present.get(os.path.dirname(n), ())]
    if not missing:
        return names
    report = (f"{len(missing)} of {len(names)} listed videos are not in {folder}, such as "
              + ", ".join(missing[:3]))
    if len(missing) > 0.05 * len(names):
        raise UserError(f"{report}; {it_holds(folder)}")
    warnings.warn(report)
    return sorted(set(names) - set(missing))


def subfolders(folder):
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    return sorted(e.name for e in entries if e.is_dir())


def list_folder(folder):
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder (--root must hold the data set as the README "
                        "shows it)")
    return sorted(os.listdir(folder))


def read_lines(path):
    """The lines of a text file, without white space around them and without the empty ones."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def list_videos(folder):
    """The names of the video files in a folder, sorted; none if there is no such folder."""
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file())


def walk_videos(folder):
    """The paths of the video files in a folder and below it, sorted."""
    paths = []
    for top, _, _ in os.walk(folder):
        paths += [os.path.join(top, name) for name in list_videos(top)]
    return sorted(paths)


def labeled_subset(names, labels, percent, seed=0):
    """The deterministic labelled fraction: of each class max(1, round(percent / 100 * its videos))
    -> sorted ids.

    names, labels: of the training videos, in any order; label -1 is no class. Within a class those
    come first whose sha256 of "<seed> <name>" is smallest, so a smaller fraction is part of a
    larger one."""
    def rank_of(i):
        return hashlib.sha256(os.fsencode(f"{seed} {names[i]}")).digest()

    labels = np.asarray(labels)
    chosen = []
    for c in np.unique(labels[labels >= 0]):
        members = sorted(np.flatnonzero(labels == c), key=rank_of)
        chosen += members[:max(1, round(percent / 100 * len(members)))]
    return np.array(sorted(chosen), np.int64)


def read_labeled_list(path, videos):
    """The videos of a published list of labelled videos -> sorted ids.

    A line is a path, perhaps without its ending, and up to two numbers behind it (frames, label).
    Class and file come from the path: classes compare without blanks and underscores, files without
    their endings. Labels are not trusted, lists number classes in different ways; rows that
    contradict the rest of their class's are counted."""
    def key(name):
        folder, file = os.path.split(name)
        stem = file[:file.rfind(".")] if file.lower().endswith(SUFFIXES) else file
        return os.path.basename(folder).replace(" ", "").replace("_", "").lower(), stem

    known = {}
    for i in np.flatnonzero(videos.labels >= 0).tolist():
        file = os.path.basename(videos.name(i))
        known[key(f"{videos.classes[videos.labels[i]]}/{file}")] = i

    def match(line):
        """The id of a line's video and the last number behind it, if there are such."""
        for numbers in (2, 1, 0):
            name, *behind = line.rsplit(maxsplit=numbers)
            if key(name) in known and all(word.isdecimal() for word in behind):
                return known[key(name)], behind[-1] if behind else None
        return None

    found = set()
    absent = []
    given = {}  # class: the labels that the list gives its videos
    for line in read_lines(path):
        matched = match(line)
        if matched is None:
            absent.append(line)
            continue
        video, label = matched
        found.add(video)
        given.setdefault(videos.labels[video], []).append(label)
    odd = sum(len(each) - Counter(each).most_common(1)[0][1] for each in given.values())
    if odd:
        warnings.warn(f"{path}: the label of {odd} rows contradicts the other rows of their class; "
                      "paths are used")
    if absent:
        warnings.warn(f"{path}: {len(absent)} rows name no training video, such as {absent[0]}")
    if not found:
        raise UserError(f"{path}: names no video of this data set")
    return np.array(sorted(found), np.int64)


# ---- Distributed: from here on there are ranks, arguments and checkpoints ------------------------
# Each of these functions works without torchrun, too.
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share(items):
    """This rank's consecutive part of a list that all ranks know."""
    share = len(items) // world_size()
    return items[rank() * share:(rank() + 1) * share]


def all_gather(z):
    """(B, ...) of each rank -> (ranks * B, ...), in rank order, on every rank, with gradient for
    the rank's own rows.

    Every rank computes the same loss of all rows: the gradient of its own ones, times the ranks,
    since DistributedDataParallel averages."""
    if world_size() == 1:
        return z
    rows = [torch.empty_like(z) for _ in range(world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    own = z.view_as(z)
    own.register_hook(lambda gradient: gradient * world_size())
    rows[rank()] = own
    return torch.cat(rows)


class SynchronisedNorm(torch.autograd.Function):
    """BatchNorm in training, over the equally many rows of all ranks: (N, C, ...) -> the same, mean
    and biased variance (C,).

    Unlike nn.SyncBatchNorm it runs on gloo, too, never stops the host and breaks no compiled graph:
    that one leaves out ranks without rows, by a mask that the host must read."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims = [0, *range(2, x.ndim)]
        norm = torch.linalg.vector_norm(x, dim=dims, dtype=weight.dtype)  # float32 for bf16, too
        sums = torch.stack([x.sum(dims, dtype=weight.dtype), norm.square()])
        dist.all_reduce(sums)
        ctx.count = x.numel() // x.shape[1] * world_size()
        mean, square = sums / ctx.count
        var = (square - mean.square()).clamp_min(0)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx, dy, _mean, _var):
        x, weight, mean, var = ctx.saved_tensors
        # The gradients at fixed mean and variance, by one kernel; then what goes through these two.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dweight, dbias])
        dist.all_reduce(sums)
        by_x_hat, by_one = sums / ctx.count
        inverse_std = (var + ctx.eps).rsqrt()
        slope = weight * inverse_std * by_x_hat * inverse_std
        offset = weight * inverse_std * by_one - slope * mean
        channels = [1, -1] + [1] * (x.ndim - 2)
        dx.addcmul_(x, slope.view(channels), value=-1).sub_(offset.view(channels))
        return dx, dweight, dbias, None


def batch_norm(module, x):
    """forward of nn.BatchNorm1d to 3d, over all ranks in training, and in 4 dimensions: for 5 torch
    has no channels_last kernels in bfloat16."""
    flat = x.flatten(2, 3) if x.ndim == 5 else x  # a view
    mean = module.running_mean
    var = module.running_var
    momentum = module.momentum
    if module.training:
        module.num_batches_tracked.add_(1)
    if module.training and world_size() > 1:
        y, batch_mean, batch_var = SynchronisedNorm.apply(
            flat, module.weight, module.bias, module.eps)
        with torch.no_grad():
            count = flat.numel() // flat.shape[1] * world_size()
            mean.lerp_(batch_mean, momentum)
            var.lerp_(batch_var * (count / (count - 1)), momentum)
    else:
        y = F.batch_norm(flat, mean, var, module.weight, module.bias, module.training, momentum,
                         module.eps)
    return y.unflatten(2, x.shape[2:4]) if x.ndim == 5 else y


def gather_objects(value):
    """Every rank's value, in a list, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """The first rank's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def training_videos(args):
    """The training videos of --data, all labels hidden."""
    videos = read_training_videos(args)
    videos.hide_labels()
    return videos


def labeled_and_all_videos(args, teachers={}):
    """Sorted ids of the labelled videos, and all training videos, with no label but theirs.

    teachers: {name: content} of the checkpoints that were fine-tuned on them; without any, the
    labelled videos are drawn, or read from --labeled-list, and written to OUT/labeled.txt."""
    videos = read_training_videos(args)
    if teachers:
        labeled = find_labeled(videos, teachers)
    elif args.labeled_list:
        labeled = read_labeled_list(args.labeled_list, videos)
    else:
        labeled = labeled_subset(videos.names(), videos.labels, args.percent, args.subset_seed)
    videos.hide_labels(keep=labeled)
    if not teachers:
        report_labeled(videos, labeled, args.out)
    return labeled, videos


def read_training_videos(args):
    """All labels known: no script calls this. Those of toy are rendered where they are missing."""
    if args.data == "toy":
        if rank() == 0:
            render_toy(args.root)
        broadcast(None)  # the others wait for it
    videos = read_videos(args.data, args.root, True, args.split, args.pool)
    print0(f"{len(videos)} training videos of {len(videos.classes)} classes in {videos.folder}")
    return videos


def find_labeled(videos, teachers):
    """The videos on which all the teachers were fine-tuned -> sorted ids."""
    names = next(iter(teachers.values()))["labeled"]
    for path, saved in teachers.items():
        if saved["classes"] != videos.classes or saved["labeled"] != names:
            raise UserError(f"{path} was fine-tuned on different labelled videos, or for other "
                            "classes")
    ids = {name: i for i, name in enumerate(videos.names())}
    if absent := [name for name in names if name not in ids]:
        raise UserError(f"{videos.folder}: without {len(absent)} of the teachers' labelled videos, "
                        f"such as {absent[0]}")
    return np.array([ids[name] for name in names])


def report_labeled(videos, labeled, out):
    """Print how many labelled videos there are, and write their names and labels to a file."""
    names = [videos.name(i) for i in labeled]
    counts = np.bincount(videos.labels[labeled], minlength=len(videos.classes))
    print0(f"{len(labeled)} of {len(videos)} training videos have a label: {counts.min()} to "
           f"{counts.max()} in each of {len(counts)} classes, set {set_digest(names)}")
    if not counts.all():
        without = [videos.classes[c] for c in np.flatnonzero(counts == 0)]
        print0("warning: no labelled video of " + ", ".join(without))
    rows = [f"{name} {label}\n" for name, label in zip(names, videos.labels[labeled])]
    write_bytes(Path(out) / "labeled.txt", os.fsencode("".join(rows)))


def set_digest(names):
    """Eight hexadecimal digits that tell one set of videos from another."""
    text = "\n".join(sorted(names))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


# ---- The built-in set of toy videos --------------------------------------------------------------
HEIGHT, WIDTH = 40, 56  # pixels of a frame
TOY_COLOURS = np.array([(220, 60, 50), (60, 190, 80), (60, 90, 220), (230, 200, 60)], np.uint8)
TOY_PATTERNS = {  # of the object, over u, v in [-1, 1]; a repetitive class is told by its pattern
    "Stripes": lambda u, v: np.floor(2 * (u + 1)) % 2 == 0,
    "Checker": lambda u, v: (u > 0) == (v > 0),
    "Ring": lambda u, v: np.maximum(np.abs(u), np.abs(v)) > 0.5,
    "Bars": lambda u, v: np.floor(2 * (v + 1)) % 2 == 0,
}
# A composite class is told by its two movements, one after the other. Up and down have the same
# frames, grow and shrink, too: only their order tells. Each is of two classes, so that who takes
# the clips of a video for alike takes all four classes for alike.
TOY_MOVES = {
    "UpGrow": ("up", "grow"),
    "GrowDown": ("grow", "down"),
    "DownShrink": ("down", "shrink"),
    "ShrinkUp": ("shrink", "up"),
}
TOY_PATHS = {  # a movement: what changes of the object as `way` runs from -1 to 1
    "up": lambda way: {"y": 20 - 18 * way},
    "down": lambda way: {"y": 20 + 18 * way},
    "grow": lambda way: {"radius": 12 + 7 * way},
    "shrink": lambda way: {"radius": 12 - 7 * way},
}


def toy_clip(label, rng):
    """One toy video of class `label` -> uint8 (64 to 96, 40, 56, 3).

    Repetitive: an object of the class's pattern swings to and fro, at a period of 8 or 16 frames,
    so that any two clips of 16 frames look alike. Composite: an object of any pattern makes the
    class's first movement, then, in the other scene and another colour, its second."""
    count = int(rng.integers(64, 97))
    patterns = list(TOY_PATTERNS.values())
    if label < len(patterns):
        pattern = patterns[label]
        shots = [("swing", count)]
        radius = 15
    else:
        pattern = patterns[rng.integers(len(patterns))]
        first, second = list(TOY_MOVES.values())[label - len(patterns)]
        cut = int(count * rng.uniform(0.4, 0.6))
        shots = [(first, cut), (second, count - cut)]
        radius = 11
    scene = rng.integers(2)
    colours = rng.permutation(TOY_COLOURS)
    video = []
    for k, (move, length) in enumerate(shots):
        square = {"x": rng.uniform(24, 32), "y": rng.uniform(17, 23), "radius": radius}
        if move == "swing":
            period = rng.choice([8, 16])  # frames
            swing = 6 * np.sin(2 * np.pi * (np.arange(length) / period + rng.random()))
            square[rng.choice(["x", "y"])] += swing
        else:
            square |= TOY_PATHS[move](np.linspace(-1, 1, length))
        video.append(paint_toy(square, length, pattern, colours[k], (scene + k) % 2))
    return np.concatenate(video)


def paint_toy(square, length, pattern, colour, scene):
    """Frames, uint8 (length, 40, 56, 3), of a square object in one of two scenes.

    square: x, y and radius in pixels, each a number or one for each frame."""
    v, u = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    ground = 110 + 30 * (u // 8 % 2) if scene else 60 + 40 * v / HEIGHT
    x, y, radius = (np.broadcast_to(square[key], length)[:, None, None]
                    for key in ("x", "y", "radius"))
    du = (u - x) / radius
    dv = (v - y) / radius
    inside = (np.maximum(np.abs(du), np.abs(dv)) < 1)[..., None]
    figure = np.where(pattern(du, dv)[..., None], colour, np.uint8(245))
    return np.where(inside, figure, ground[..., None].astype(np.uint8))


def render_toy(root, train=400, test=200, seed=0):
    """Write the toy videos as MPEG-4 files in UCF101's layout, unless toy.json says that all are
    there.

    The frames depend on the seed alone. Every file is complete or absent, so what was begun is
    finished."""
    root = Path(root)
    done = root / "toy.json"
    settings = {"version": 2, "train": train, "test": test, "seed": seed}
    if done.exists():
        if json.loads(done.read_text())["version"] != settings["version"]:
            raise UserError(f"{root} holds toy videos of another version: remove it or choose "
                            "another --root")
        return
    classes = [*TOY_PATTERNS, *TOY_MOVES]
    names = []
    for i in tqdm(range(train + test), desc=f"rendering toy videos into {root}", disable=None):
        k, label = divmod(i, len(classes))
        c = classes[label]
        names.append(f"{c}/v_{c}_g{k // 4 + 1:02}_c{k % 4 + 1:02}.avi")
        path = root / "UCF-101" / names[i]
        if not path.exists():
            frames = toy_clip(label, draw(seed, int.from_bytes(names[i].encode(), "big")))
            write_atomically(path, lambda file: encode_video(file, frames))
    rows = [f"{name} {i % len(classes) + 1}" for i, name in enumerate(names)]
    lists = {
        "classInd": [f"{k + 1} {c}" for k, c in enumerate(classes)],
        "testlist01": names[:test],
        "trainlist01": rows[test:],
    }
    for name, lines in lists.items():
        text = "".join(f"{line}\n" for line in lines)
        write_bytes(root / "ucfTrainTestlist" / f"{name}.txt", text.encode())
    write_bytes(done, json.dumps(settings).encode())


def encode_video(file, frames, fps=25):
    """uint8 (T, H, W, 3) -> MPEG-4 in an AVI container, as UCF101's files are."""
    with av.open(file, "w", format="avi") as container:
        options = {"qscale": "3", "threads": "1"}
        stream = container.add_stream("mpeg4", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode())


# ---- Commands: process group, signals, a user's mistakes -----------------------------------------
class Signals:
    """While deferring, the first Ctrl-C or SIGTERM lets the step in hand end; otherwise it ends the
    program, as a second Ctrl-C always does."""
    deferring = False
    requested = 0

    @classmethod
    def handle(cls, signal_number, _frame):
        again = signal_number == cls.requested == signal.SIGINT
        if again or not cls.deferring:
            raise KeyboardInterrupt
        # torchrun sends SIGTERM after a Ctrl-C: that is no second request.
        cls.requested = cls.requested or signal_number

    @classmethod
    def end_at_once(cls):
        """From here on: what is done now is not saved before its end."""
        cls.deferring = False
        if cls.requested:
            raise KeyboardInterrupt


def leave_signals_to_parent(_worker):
    """Ctrl-C and SIGTERM reach the decoding processes, too: they stay until the main process has
    ended its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # After SIGTERM an alarm ends it: Python waits at exit for those that are left.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def command(main):
    """Make main(argv=None) a command: signals as Signals says, mistakes and warnings as one line
    each, exit status 0, 1 or 2."""
    script = os.path.basename(main.__code__.co_filename)

    def complain(text):
        print(f"{script}: {text}".replace("\n", " "), file=sys.stderr, flush=True)

    def warn(message, *_):
        if rank() == 0:
            tqdm.write(f"warning: {message}".replace("\n", " "), file=sys.stderr)

    @functools.wraps(main)
    def run(argv=None):
        Signals.deferring = False
        Signals.requested = 0
        handlers = {s: signal.signal(s, Signals.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        status = 0
        try:
            with warnings.catch_warnings():
                warnings.showwarning = warn
                main(argv)
        except UserError as error:
            status = error.status
            complain(error)
        except torch.cuda.OutOfMemoryError as error:
            status = 2
            complain("out of GPU memory: try --checkpointing, or a smaller --batch or --size "
                     f"({error})")
        except KeyboardInterrupt:
            status = 1
            complain("interrupted; the same command goes on from the last checkpoint")
        except SystemExit as end:  # of --help and --benchmark
            status = end.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if status:
            raise SystemExit(status)
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


def start(parser, argv):
    """Parse the arguments and join torchrun's processes, if there are any -> args, device."""
    args = parser.parse_args(argv)
    if parser.stage and args.out is None:  # it is needed first, for the checkpoints are read there
        args.out = f"runs/{args.data or 'toy'}"
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives large blocks back and faults them in again in each step: it is to keep them.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu")
    if args.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs here for "
                            f"{local_rank + 1} processes or more")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store, place, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(agree_on_prefix(store, place, size), store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=place, world_size=size,
            # Ranks wait for the slowest one's share of a pass over all videos, and for rank 0.
            timeout=timedelta(hours=2), device_id=device if device.type == "cuda" else None)
    return args, device


def agree_on_prefix(store, place, size):
    """A prefix for the keys of this start of all processes, the same in each of them.

    After --max-restarts the store still holds the addresses of dead processes, and nothing that
    torchrun tells its processes is the same on all nodes, yet new: the count of restarts is that of
    the node that failed. So rank 0 invents a prefix and gives it to those who ask, until all have
    it; who asked in an earlier start and died is answered in vain."""
    own = uuid.uuid4().hex
    if place > 0:
        store.set(f"asks/{place}", own)
        prefix = store.get(f"answer/{own}").decode()  # waits for it
        store.add(f"joined/{prefix}", 1)
        return prefix
    while store.add(f"joined/{own}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(0.05)
    return own


def warm_up(optimizer, lr, epoch, warmup):
    """Set the learning rate lr * (epoch + 1) / warmup in the first `warmup` epochs (supplement
    B.2)."""
    if epoch < warmup:
        for group in optimizer.param_groups:
            group["lr"] = lr * (epoch + 1) / warmup


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# ---- Batches: who is in a step, and their frames -------------------------------------------------
class Frames(Dataset):
    """Item (key, i): (key, i, the frames of video i, how many the file has); instead of the frames
    a string, the reason, where they cannot be decoded.

    indices: a function from the count of frames and, unless it is None, the key to those wanted."""

    def __init__(self, videos, indices, short_side):
        self.videos = videos
        self.indices = indices
        self.short_side = short_side

    def __getitem__(self, item):
        key, i = item
        count = 0

        def indices(frames_in_file):
            nonlocal count
            count = frames_in_file
            return self.indices(count) if key is None else self.indices(count, key=key)

        try:
            frames = decode_frames(self.videos.path(i), indices, self.short_side)
        except DECODE_ERRORS as error:
            frames = f"{type(error).__name__}: {error}"
        return key, i, frames, count

    def loader(self, items, workers, device, ahead=2):
        """An iterator over the items, in order; each worker decodes `ahead` of them in advance."""
        return iter(DataLoader(
            self, batch_size=None, sampler=items, num_workers=workers,
            prefetch_factor=ahead if workers else None, pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_parent))


def random_span(count, key, seed, frames, stride):
    """Indices of one clip at a random place of the video, drawn from (seed, key)."""
    return clip_indices(count, frames, stride, draw(seed, *key).random())


# A role in a batch: which videos may take it, and how many do, over all ranks. A pool that cycles
# may hold a video twice in a batch and runs on into its next lap; the remainder of a lap of one
# that does not is dropped.
Pool = namedtuple("Pool", "ids batch cycle")

# Of each video its frames, uint8 (T, H, W, 3) on the device; its id; and its key (role, lap, id),
# which with the seed settles all its draws. learn: False in the last steps of a run.
Batch = namedtuple("Batch", "videos ids keys learn")

# While weights change, BatchNorm's running statistics lag behind them: of dark videos by so much
# that a network of 71 % in train mode had 25 % in eval mode. So the weights rest in the last steps.
SETTLING = 30  # steps, but at most a tenth of all


@functools.lru_cache(maxsize=8)
def shuffled(seed, role, lap, count):
    return draw(seed, role, lap).permutation(count)


class Batches:
    """Who is in a step, by (seed, epoch, step) alone: so any number of workers gives the same, and
    going on needs no state.

    frames: of each video. steps: of an epoch; by default one lap of the first pool. A video that
    cannot be decoded is named, and another of its pool, which is not in the batch, takes its place
    and its draws; over 10 % of a pool stop the run (UserError)."""

    def __init__(self, videos, pools, frames, seed, args, device, steps=None):
        self.videos = videos
        self.pools = pools
        self.seed = seed
        self.workers = args.workers
        self.device = device
        self.unreadable = {}  # id: reason
        self.short = set()  # ids of those with fewer frames than `span`
        if steps is None:
            laps = len(pools[0].ids) / pools[0].batch
            steps = math.ceil(laps) if pools[0].cycle else int(laps)
        if not steps:
            raise UserError(f"--batch {pools[0].batch} is more than the {len(pools[0].ids)} videos")
        print0(f"{steps} steps an epoch")
        self.steps = steps
        self.share = sum(pool.batch for pool in pools) // world_size()
        self.frames = frames
        self.span = clip_span(frames, args.stride)
        indices = functools.partial(random_span, seed=seed, frames=frames, stride=args.stride)
        self.dataset = Frames(videos, indices, round(1.25 * args.size))

    def members(self, epoch, step):
        """The keys of a step's videos on all ranks, a list for each pool."""
        groups = []
        for role, pool in enumerate(self.pools):
            count = len(pool.ids)
            places = step * pool.batch + np.arange(pool.batch)
            laps = np.full(pool.batch, epoch)
            if pool.cycle:
                laps, places = np.divmod(places + epoch * self.steps * pool.batch, count)
            group = []
            for lap, place in zip(laps.tolist(), places):
                order = shuffled(self.seed, role, lap, count)
                group.append((role, lap, int(pool.ids[order[place]])))
            groups.append(group)
        return groups

    def items(self, first, last):
        """This rank's (key, id), from step to step."""
        for step in range(first, last):
            for group in self.members(*divmod(step, self.steps)):
                for key in own_share(group):
                    yield key, key[2]

    def stream(self, first, last):
        """This rank's Batch of each step from `first` to before `last`, counted from the run's
        beginning."""
        ahead = max(2, math.ceil(2 * self.share / max(1, self.workers)))  # two batches
        self.check_shared_memory(ahead * self.workers)
        loader = self.dataset.loader(self.items(first, last), self.workers, self.device, ahead)
        for step in range(first, last):
            batch = Batch([], [], [], learn=last - step > min(SETTLING, last // 10))
            spare = {}  # pool: its substitutes
            for key, i, frames, count in itertools.islice(loader, self.share):
                key = tuple(key)  # data loaders make lists of tuples
                while isinstance(frames, str):
                    self.note_unreadable(key, i, frames)
                    if key[0] not in spare:
                        spare[key[0]] = self.substitutes(key[0], *divmod(step, self.steps))
                    i = next(spare[key[0]], None)
                    if i is None:
                        raise UserError("too few videos can be decoded to fill a batch: choose a "
                                        "smaller --batch")
                    _, _, frames, count = self.dataset[key, i]
                if count < self.span:
                    self.short.add(i)
                batch.videos.append(frames.to(self.device, non_blocking=True))
                batch.ids.append(i)
                batch.keys.append(key)
            dropout_seed = draw(self.seed, *divmod(step, self.steps), rank()).integers(2**63)
            torch.manual_seed(dropout_seed)
            yield batch

    def check_shared_memory(self, items):
        """Warn if /dev/shm may be too small for so many items, as it is in containers."""
        side = self.dataset.short_side
        needed = items * self.frames * 3 * side * side * 16 // 9  # bytes, if all are wide
        there = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else needed
        if needed > there:
            warnings.warn(
                f"/dev/shm has {there >> 20} MiB, decoding ahead may take {needed >> 20}, and ends "
                "by a bus error if it does: fewer --workers, or a container with --shm-size "
                f"{(needed >> 30) + 1}g")

    def substitutes(self, role, epoch, step):
        """Videos that may stand in for unreadable ones, in an order of the step's own."""
        group = self.members(epoch, step)[role]
        ids, _, cycle = self.pools[role]
        taken = set() if cycle else {key[2] for key in group}
        spare = [int(i) for i in ids if i not in taken]
        order = draw(self.seed, *group[0][:2], epoch, step, 1).permutation(len(spare))
        for k in order[rank()::world_size()]:
            if spare[k] not in self.unreadable:
                yield spare[k]

    def note_unreadable(self, key, i, reason):
        if i not in self.unreadable:
            self.unreadable[i] = reason
            tqdm.write(f"warning: {self.videos.path(i)}: {reason}; another video takes its place",
                       file=sys.stderr)
            check_unreadable(self.unreadable, self.pools[key[0]].ids, self.videos)


def check_unreadable(unreadable, ids, videos):
    """UserError if over 10 % of the videos `ids` are among the unreadable ones."""
    bad = [videos.path(i) for i in ids if i in unreadable]
    if len(bad) > 0.1 * len(ids):
        names = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UserError(f"{len(bad)} of {len(ids)} videos cannot be decoded, more than 10 %: mend "
                        f"or remove {names}")


# ---- State: all that a checkpoint holds ----------------------------------------------------------
FREE_ARGUMENTS = {  # those that may change between a run and its continuation
    "out", "root", "pretrained", "epochs", "workers", "device", "checkpointing", "compile",
    "restart"}


class State:
    """Where the training of a network stands: all that its checkpoint OUT/NAME.pt holds.

    net: the module to train, initialised: a classifier or an Embedder. carried: what else later
    stages need. Where the checkpoint exists already, the State is what it holds."""

    def __init__(self, stage, name, args, net, videos, device, labeled=(), carried={}):
        self.name = name
        self.args = args
        self.path = Path(args.out) / f"{name}.pt"
        self.log_path = Path(args.out) / f"{name}.log"
        self.facts = {
            "stage": stage,
            "arch": args.arch,
            "classes": videos.classes,
            "video_set": set_digest(videos.names()),
            "labeled": [videos.name(i) for i in labeled],
        }
        self.carried = dict(carried)
        self.epoch = 0  # that is done
        self.step = 0  # that is done of the next epoch
        self.sums = {}  # of the loss terms over these steps
        self.finished = False

        net.to(device, memory_format=torch.channels_last_3d)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = functools.partial(batch_norm, module)
        trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, args.lr, betas=(0.9, 0.999),
                                          fused=device.type == "cuda")
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=args.patience)
        backbone = net.backbone if isinstance(net, Embedder) else net
        self.modules = {"model": backbone, "optimizer": self.optimizer, "plateau": self.plateau}
        if isinstance(net, Embedder):
            self.modules["head"] = net.head

        if args.benchmark:
            pass  # leaves no trace
        elif not args.restart and broadcast(self.path.exists()):
            self.resume()
        else:
            self.write_log([json.dumps(describe_command())])
        if args.compile:
            # The parts differ in shape, the steps do not: as many variants as there are parts.
            torch._dynamo.config.recompile_limit = 64
            for part in backbone.parts():
                part.forward = torch.compile(part.forward, dynamic=False)
        if args.checkpointing:
            recompute_parts(backbone)
        self.net = nn.parallel.DistributedDataParallel(net) if world_size() > 1 else net

    def resume(self):
        """Go on from the checkpoint; UserError if it was made by another command."""
        saved = read_checkpoint(self.path, with_optimizer=True)
        if saved.get("stage") != self.facts["stage"]:
            raise UserError(f"{self.path} was not written by this stage: choose another --out, or "
                            "--restart")
        for key, value in {**vars(self.args), **self.facts}.items():
            before = saved.get(key, saved["args"].get(key))
            if key not in FREE_ARGUMENTS and before != value:
                raise UserError(f"{self.path} was made with {key} {str(before)[:60]}, not "
                                f"{str(value)[:60]}: repeat that to go on, or give --restart to "
                                "begin again or another --out")
        if saved["epoch"] > self.args.epochs:
            raise UserError(f"{self.path} has {saved['epoch']} epochs, --epochs "
                            f"{self.args.epochs} is less")
        for name, module in self.modules.items():
            module.load_state_dict(saved[name])
        self.epoch = saved["epoch"]
        self.step = saved["step"]
        self.sums = saved["sums"]
        self.finished = saved["finished"] and self.epoch == self.args.epochs
        if self.finished:
            print0(f"{self.path} is finished ({self.epoch} epochs)")
        else:
            print0(f"going on from {self.path} at epoch {self.epoch + 1}, step {self.step + 1}")
        # The log may be a line ahead, or end in half of one.
        lines = read_lines(self.log_path) if self.log_path.exists() else []
        lines = [line for line in lines if line.endswith("}")]
        self.write_log([x for x in lines if json.loads(x).get("epoch", 0) <= self.epoch])

    def update(self, loss, learn):
        """One step of the optimiser; without `learn` one that leaves the weights as they are."""
        if learn:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.step += 1

    def end_epoch(self, numbers):
        """Print and log an epoch's numbers, then write the checkpoint."""
        self.epoch += 1
        self.step = 0
        self.sums = {}
        line = {"epoch": self.epoch}
        for key, value in numbers.items():
            line[key] = round(value, 6) if isinstance(value, float) else value
        if rank() == 0:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(line) + "\n")
        print0(f"{self.name}:", ", ".join(f"{key} {value:.4g}" for key, value in line.items()))
        self.save()

    def save(self):
        """Write the checkpoint. If the power fails, the old or the new one is there, whole."""
        if rank() == 0:
            content = {
                **self.facts,
                **self.carried,
                "args": vars(self.args),
                "epoch": self.epoch,
                "step": self.step,
                "sums": self.sums,
                "finished": self.finished,
            }
            for name, module in self.modules.items():
                content[name] = module.state_dict()
            write_atomically(self.path, lambda file: torch.save(content, file))
        if world_size() > 1:
            dist.barrier()

    def finish(self, carried={}):
        """Write the checkpoint that the next stage reads, with what else it needs."""
        self.carried |= carried
        self.finished = True
        self.save()
        print0(f"wrote {self.path}")

    def write_log(self, lines):
        write_bytes(self.log_path, "".join(f"{line}\n" for line in lines).encode())


def describe_command():
    """The first line of a log: the command, the commit of this code, versions."""
    folder = os.path.dirname(os.path.abspath(__file__))
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", folder, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, av, np)}
    return {"command": " ".join(sys.argv), "commit": commit, **versions}


# ---- Meter: the numbers of a step, and the end of a run ------------------------------------------
class Meter:
    """Shows, checks and averages the numbers of the steps, times them, and ends the run after a
    signal. Holds nothing that is saved.

    A step's numbers are read one step later, when they have reached the host without anyone
    waiting for them."""

    def __init__(self, state, batches, args, device):
        self.state = state
        self.batches = batches
        self.args = args
        self.device = device
        done = state.epoch * batches.steps + state.step
        self.stream = batches.stream(done, args.epochs * batches.steps)
        self.pending = None  # the numbers of the last step
        self.stopping = False  # whether all ranks agreed to stop

    def steps(self, epoch):
        """The batches that are left of an epoch; after a signal a checkpoint, and the end."""
        Signals.deferring = True
        self.restart_timing()
        bar = f"{self.state.name} {epoch + 1}/{self.args.epochs}"
        with tqdm(total=self.batches.steps, initial=self.state.step, desc=bar, leave=False,
                  disable=True if rank() else None) as self.bar:
            if self.args.benchmark:
                yield from self.benchmark(self.args.benchmark)
            while self.state.step < self.batches.steps:
                yield self.next_batch()
                self.bar.update()
                if self.stopping or (Signals.requested and world_size() == 1):
                    self.settle()
                    self.state.save()
                    raise KeyboardInterrupt

    def restart_timing(self):
        self.begin = time.perf_counter()
        self.waiting = 0.0  # seconds, for data
        self.clips = 0  # of this process

    def next_batch(self):
        begin = time.perf_counter()
        self.batch = next(self.stream)
        self.waiting += time.perf_counter() - begin
        return self.batch

    def add(self, clips, **terms):
        """Note a step's number of clips and its loss terms, scalars, of which the first is the
        loss."""
        stop = torch.full((), float(bool(Signals.requested)), device=self.device)
        values = torch.stack([*(term.detach().float() for term in terms.values()), stop])
        if world_size() > 1:
            dist.all_reduce(values)  # with the wish to stop: so all ranks stop at one step
            values /= world_size()
        self.settle()
        ready = None
        if self.device.type == "cuda":
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.clips += clips
        self.pending = {"names": list(terms), "values": values, "ready": ready,
                        "step": self.state.step, "ids": self.batch.ids}

    def settle(self):
        """Take in the numbers of the last step; TrainingError if they are not finite."""
        if self.pending is None:
            return
        if self.pending["ready"] is not None:
            self.pending["ready"].synchronize()
        *values, stop = self.pending["values"].tolist()
        terms = dict(zip(self.pending["names"], values))
        if not all(map(math.isfinite, values)):
            videos = ", ".join(self.batches.videos.name(i) for i in self.pending["ids"])
            raise TrainingError(
                f"epoch {self.state.epoch + 1}, step {self.pending['step']}: not finite: {terms}. "
                f"The videos of this step: {videos}. {self.state.path} was left as it was")
        self.stopping = self.stopping or stop > 0
        sums = self.state.sums
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value
        means = {name: f"{total / self.pending['step']:.3f}" for name, total in sums.items()}
        self.bar.set_postfix(means, refresh=False)
        self.pending = None

    def means(self):
        """The numbers of the epoch that ends: means of the loss terms, learning rate, speed."""
        self.settle()
        seconds = time.perf_counter() - self.begin
        numbers = {name: total / self.state.step for name, total in self.state.sums.items()}
        unreadable = set()
        short = set()
        for ids, others in gather_objects((list(self.batches.unreadable), self.batches.short)):
            unreadable.update(ids)
            short.update(others)
        if unreadable:
            names = sorted(map(self.batches.videos.name, unreadable))
            print0("cannot be decoded:", ", ".join(names))
        return {
            **numbers,
            "lr": self.state.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "clips_per_s": self.clips * world_size() / seconds,
            "waiting_share": self.waiting / seconds,
            "memory_gib": peak_memory(self.device),
            "unreadable": len(unreadable),  # videos met so far, as is the next
            "short": len(short),
        }

    def benchmark(self, count):
        """The steps of --benchmark, then their numbers, as a table and as JSON, and the end."""
        Signals.deferring = False  # nothing is to be saved
        for _ in range(min(5, count)):  # warm-up
            yield self.next_batch()
        self.settle()  # which waits for the GPU
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.restart_timing()
        for _ in range(count):
            yield self.next_batch()
        self.settle()
        step = (time.perf_counter() - self.begin) / count
        waiting_share = self.waiting / count / step
        # On paper, so that it neither counts what is recomputed nor disturbs what is compiled.
        forward, backward = count_flop(self.args.arch, self.args.frames, self.args.size)
        teachers = [name for name in getattr(self.args, "teachers", ()) if name != "none"]
        flop = self.clips / count * (forward + backward + len(teachers) * forward)
        keys = self.batch.keys[:16]
        begin = time.perf_counter()
        for key in keys:
            self.batches.dataset[key, key[2]]
        decode_seconds = (time.perf_counter() - begin) / len(keys)
        numbers = {
            "videos_per_s": self.batches.share * world_size() / step,
            "ms_per_step": 1000 * step,
            "clips_per_s": self.clips * world_size() / count / step,
            "decode_ms_per_video": 1000 * decode_seconds,
            "waiting_share": waiting_share,
            "tflop_per_s": flop * world_size() / step / 1e12,
            "memory_gib": peak_memory(self.device),
        }
        for key, value in numbers.items():
            print0(f"{key:20} {value:10.4g}")
        print0(json.dumps(numbers))
        flag = "--precision bf16" if self.args.precision == "fp32" else "--compile, more processes"
        print0("bottleneck:", "decoding; --workers, or re-encode the videos (README)"
               if waiting_share > 0.05 else f"the network; {flag}")
        raise SystemExit


def beside_chance(means, levels, last):
    """The means of an epoch, each loss of `levels` beside its level of chance: that of a network to
    which all clips look alike, the logarithm of the number of candidates. A warning if the last
    epoch ends within 5 % of it."""
    numbers = {}
    for name, value in means.items():
        numbers[name] = value
        if name in levels:
            numbers[f"{name}_chance"] = levels[name]
            if last and value > 0.95 * levels[name]:
                warnings.warn(f"{name} ends at {value:.3f}, chance is {levels[name]:.3f}: stage 1 "
                              "has learnt nothing. It needs more steps: more --epochs, or a "
                              "smaller --batch")
    return numbers


def peak_memory(device):
    """The most that this process has held so far, in GiB: on the GPU, or of the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- Checkpoints ---------------------------------------------------------------------------------
def write_atomically(path, write):
    """Call write(file) on a new file that then takes the place of `path`, whole and on disk;
    UserError if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # which some network file systems refuse for folders
            os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        raise UserError(f"{path} cannot be written, what was there is left: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path, content):
    """write_atomically, on rank 0 alone, for what is already there as bytes."""
    if rank() == 0:
        write_atomically(path, lambda file: file.write(content))


def read_checkpoint(path, stages=None, with_optimizer=False):
    """What torch.save has written to a file: a dict, tensors on the CPU, the same on every rank. No
    code of it runs.

    stages: those that may have written it, to its end (None: another program). UserError if
    another one has, or if it is damaged or unfinished."""
    saved = error = None
    if rank() == 0:
        try:
            # Mapped, what nobody uses is never read: the optimiser is two thirds of a checkpoint.
            mapped = not with_optimizer and zipfile.is_zipfile(path)
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except FileNotFoundError:
            error = f"{path}: no such checkpoint{written_by(path)}"
        except (OSError, RuntimeError, EOFError, ValueError, KeyError,
                pickle.UnpicklingError) as e:
            reason = str(e).strip().splitlines()[0][:120]
            error = f"{path}: damaged, or no file of tensors ({reason}){written_by(path)}"
        if error is None and not isinstance(saved, dict):
            error = f"{path}: not a checkpoint"
        if error is None and not with_optimizer:
            saved.pop("optimizer", None)
    saved, error = broadcast((saved, error))
    if error:
        raise UserError(error)
    stage = saved.get("stage")
    if stages and stage not in stages:
        wanted = " or ".join(SCRIPTS[s] for s in stages if s)
        raise UserError(f"{path}: found a checkpoint of {SCRIPTS.get(stage, 'another program')}, "
                        f"expected one of {wanted}")
    if stages and stage and not saved["finished"]:
        raise UserError(f"{path}: unfinished (epoch {saved['epoch']} of {saved['args']['epochs']});"
                        f" the same command of {SCRIPTS[stage]} goes on")
    return saved


SCRIPTS = {"pretrain_inv": "pretrain_inv.py", "pretrain_dist": "pretrain_dist.py",
           "finetune": "finetune.py", "student": "train_student.py"}  # by stage
COMMANDS = {"inv": "pretrain_inv.py", "dist": "pretrain_dist.py",
            "both": "pretrain_dist.py --invariant-weight 1", "student": "train_student.py",
            "labeled_only": "finetune.py --init none"}  # by the name of the checkpoint


def written_by(path):
    """The end of an error: the command that writes a checkpoint of this name, if the name tells."""
    stem = Path(path).stem
    if stem.endswith("_ft"):
        return f"; finetune.py --init {stem.removesuffix('_ft')}.pt writes it"
    for name, command in COMMANDS.items():
        if stem.startswith(name):
            return f"; {command}{'' if stem == name else f' --name {stem}'} writes it"
    return ""


def find_checkpoint(name, folder):
    """The path of a checkpoint: `name` itself if it has a folder, else that file in `folder`."""
    return name if os.path.dirname(name) else os.path.join(folder, name)


def start_from(model, path, saved):
    """Give a model the weights of a checkpoint's content, all but the classifier's."""
    try:
        taken, left = load_backbone(model, saved)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    print0(f"took {taken} tensors of {path}, left {left}")


def load_classifier(saved, device):
    """The classifier of a checkpoint's content, in eval mode, without gradient."""
    model = build_model(saved["arch"], len(saved["classes"]))
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last_3d).requires_grad_(False).eval()


def load_embedder(saved, device):
    """The backbone and projection head of a checkpoint of stage 1, in eval mode."""
    embedder = Embedder(build_model(saved["arch"], len(saved["classes"])))
    embedder.backbone.load_state_dict(saved["model"])
    embedder.head.load_state_dict(saved["head"])
    return embedder.to(device, memory_format=torch.channels_last_3d).eval()


# ---- Passes over all videos ----------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def map_videos(function, videos, indices, group_size, size, workers, device, title, show=None):
    """Apply a function to the decoded frames at `indices` of all videos, shared among the ranks.

    function: a list of up to `group_size` uint8 (T, H, W, 3) on the device -> a tensor with a
    row for each. size: of the network's input. show(id, row) is called for each of this rank's
    videos as soon as it is done. Returns {id: row} and, of those that cannot be decoded,
    {id: reason}."""
    Signals.end_at_once()
    ids = range(rank(), len(videos), world_size())
    dataset = Frames(videos, indices, round(1.25 * size))
    items = dataset.loader([(None, i) for i in ids], workers, device)
    bar = tqdm(items, desc=title, total=len(ids), leave=False, disable=True if rank() else None)
    rows = {}
    unreadable = {}
    group = {}
    for _, i, frames, _ in bar:
        if isinstance(frames, str):
            unreadable[i] = frames
            tqdm.write(f"warning: {videos.path(i)}: {frames}", file=sys.stderr)
        else:
            group[i] = frames.to(device, non_blocking=True)
        if group and (len(group) == group_size or i == ids[-1]):
            new = dict(zip(group, function(list(group.values())).cpu()))
            for each in new.items() if show else ():
                show(*each)
            rows |= new
            group = {}
    # In one tensor a rank: pickling a row for each of 240,000 videos takes half a minute.
    stacked = torch.stack(list(rows.values())) if rows else ()
    for numbers, values, reasons in gather_objects((list(rows), stacked, unreadable)):
        rows.update(zip(numbers, values))
        unreadable.update(reasons)
    return dict(sorted(rows.items())), dict(sorted(unreadable.items()))


def measure_similarity(embedder, videos, args, device):
    """What a checkpoint of stage 1 carries to stage 3: video_similarity of the training videos.
    UserError if over 10 % of them cannot be decoded."""
    rows, unreadable = video_similarity(embedder, videos, args, device)
    check_unreadable(unreadable, range(len(videos)), videos)
    return {
        "similarity_of": [videos.name(i) for i in rows],
        "similarity": torch.stack(list(rows.values())),
        "similarity_clips": [args.clips, args.frames, args.stride],
    }


def video_similarity(embedder, videos, args, device):
    """C of Eq. 5 of each video by a network of stage 1, before fine-tuning (Algorithm 1, line 16),
    from args.clips consecutive clips in its middle, centre crop, eval mode.

    Returns {id: (n, n)} and {id: reason} as map_videos does."""
    def similarity(frames):
        clips = []
        for video in frames:
            clips += [centre_crop(clip, args.size) for clip in video.split(args.frames)]
        with autocast(args, device):
            z = embedder(to_input(clips, embedder.backbone))
        return temporal_similarity(z.unflatten(0, (-1, args.clips)))

    embedder.eval()
    span = functools.partial(spaced_clips, clips=1, frames=args.clips * args.frames,
                             stride=args.stride)
    group_size = max(1, args.batch // world_size())
    return map_videos(similarity, videos, span, group_size, args.size, args.workers, device,
                      "similarity")


def nearest_neighbours(backbone, videos, ids, args, device):
    """The share of the videos `ids` whose nearest other one is of the same class: what the features
    of stage 1 know of the classes, before a label has trained them.

    By the cosine of features, mean over time, of the clip in the middle of each. Of more than 2,000
    videos it takes every second, third, ..."""
    def features(frames):
        clips = [centre_crop(video, args.size) for video in frames]
        with autocast(args, device):
            return backbone.features(to_input(clips, backbone)).float().mean(2)

    ids = ids[::math.ceil(len(ids) / 2000)]
    names = [videos.name(i) for i in ids]
    some = Videos(videos.folder, names, videos.labels[ids], videos.classes)
    span = functools.partial(spaced_clips, clips=1, frames=args.frames, stride=args.stride)
    backbone.eval()
    rows, _ = map_videos(features, some, span, args.batch, args.size, args.workers, device,
                         "neighbours")
    z = torch.stack(list(rows.values()))
    labels = some.labels[list(rows)]
    nearest = cosine_similarity(z, z).fill_diagonal_(-torch.inf).argmax(1)
    return float((labels[nearest] == labels).mean())


def paired_similarity(teachers):
    """The videos of which both teachers' checkpoints hold C of Eq. 5: names, and both C, (N, n, n).

    teachers: {name: content} of two. UserError if one holds none, or for another n."""
    for name, saved in teachers.items():
        if "similarity" not in saved:
            raise UserError(f"{name} does not come from stage 1, TSTR cannot weigh it: "
                            "--reweight mean or a number")
    first, second = teachers.values()
    n_first, n_second = first["similarity"].shape[1], second["similarity"].shape[1]
    if n_first != n_second:
        raise UserError(f"{' and '.join(teachers)} come from stage 1 with --clips {n_first} and "
                        f"{n_second}, TSTR needs the same: repeat one, or --reweight mean")
    rows = {name: k for k, name in enumerate(second["similarity_of"])}
    names = [name for name in first["similarity_of"] if name in rows]
    shared = [k for k, name in enumerate(first["similarity_of"]) if name in rows]
    return names, first["similarity"][shared], second["similarity"][[rows[n] for n in names]]


# ---- Arguments -----------------------------------------------------------------------------------
DATA_SETS = ("toy", "ucf101", "hmdb51", "kinetics400", "folder")
SMALL = 1000  # a folder of fewer training videos has settings of its own


def defaults(data, stage, videos=math.inf, batch=None):
    """What a stage ("pretrain", "finetune", "student") does where no flag says otherwise: the
    paper's settings, and others for toy and for small folders of `videos` training videos, of which
    --batch takes `batch` a step.

    Batch and epochs of fine-tuning, which the paper does not name, are the authors' code's."""
    ssl = stage == "pretrain"
    settings = {
        "data": data,
        "root": f"data/{data}",
        "split": 1,
        "pool": "train",
        "percent": {"ucf101": 5, "hmdb51": 40, "toy": 6}.get(data, 10),
        "subset_seed": 0,
        "seed": 0,
        "clips": 4,
        "frames": 16 if ssl else 8,
        "stride": 1 if ssl else 2,
        "size": 224,
        "arch": "slow_r50",
        "epochs": 150 if not ssl else 100 if data == "kinetics400" else 250,
        "batch": 40 if ssl else 16,
        "lr": 1e-3,
        "warmup": 10,
        "patience": 5,
    }
    if data == "toy":
        settings |= {
            "frames": 16,
            "stride": 1,
            "size": 24,
            "arch": "r3d_tiny",
            "epochs": {"pretrain": 7, "finetune": 75, "student": 13}[stage],
            "batch": 10 if ssl else 16,
            "warmup": 2,
        }
    small_folder = data == "folder" and videos < SMALL
    if small_folder and ssl:
        # The paper's 250 epochs are 60,000 steps of UCF101, but 1,000 of 160 videos.
        settings["batch"] = batch or 8
        steps = max(1, videos // settings["batch"])
        settings["epochs"] = max(settings["epochs"], 5000 // steps)
    if data == "toy" or small_folder:  # an epoch has few steps
        settings["patience"] = 25
        if stage == "finetune":
            settings["lr"] = 3e-4
    return settings


def settle_arguments(args, stage="", sources={}, inherited=()):
    """Fill in what no flag has set: from the checkpoints that the stage reads, {path: content},
    from defaults(), or from what the machine has. UserError on a contradiction."""
    taken = {}
    for path, saved in sources.items():
        for key in inherited if saved and saved.get("stage") else ():
            value = saved["args"][key]
            given = getattr(args, key)
            if given is None and value is not None:
                setattr(args, key, value)
                taken[key] = value
            elif given != value and key != "root":  # the videos may have moved
                raise UserError(f"{flag(key)} {given} contradicts {path}, made with {value}")
    if taken:
        print0("from", ", ".join(sources) + ":", *(f"{flag(k)} {v}" for k, v in taken.items()))
    table = defaults(args.data or "toy", stage) if stage else {}
    if stage and args.data == "folder":
        videos = read_videos("folder", args.root or table["root"], train=True)
        table = defaults("folder", stage, len(videos), args.batch)
    if getattr(args, "labeled_list", None):
        if args.percent is not None:
            raise UserError("--percent and --labeled-list: choose one")
        del table["percent"]
    for key, value in table.items():
        if getattr(args, key, 0) is None:
            setattr(args, key, value)
    if args.workers is None:
        on_linux = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
        args.workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.precision is None:
        args.precision = broadcast("bf16" if has_bf16(args.device) else "fp32")
    if not stage:
        return
    if args.benchmark:
        args.epochs = 10**6  # as many as it needs
    large_r3d = args.arch.startswith("r3d") and args.size > 112
    if args.device == "cpu" and args.precision == "bf16" and (large_r3d or not has_bf16("cpu")):
        raise UserError(f"{args.arch} at --size {args.size} needs --precision fp32 on this CPU: "
                        "oneDNN's gradients in bf16 are wrong there")
    if args.batch % world_size():
        raise UserError(f"--batch {args.batch} cannot be shared among {world_size()} processes: "
                        "choose a multiple")
    print0("settings:", *(f"{flag(k)} {v}" for k, v in vars(args).items() if v is not None))


def flag(key):
    return "--" + key.replace("_", "-")


def has_bf16(device):
    """Whether to compute in bfloat16: the hardware has it, rather than emulates it, and is right.

    Of CPUs those with AMX. On others with AVX-512 oneDNN 3.12 leaves parts of the weights' gradient
    unwritten, of a 3 x 3 x 3 convolution over two time steps, as the tail of r3d has in stage 3."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def ranged(kind, least, most=math.inf):
    """An argparse type: an int or a float, from `least` to `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {least} to {most}")
    return parse


class Parser(argparse.ArgumentParser):
    """Flags in named groups, their defaults in --help, with those that training stages share.

    stage: "pretrain", "finetune" or "student" ("": none of these flags). A mistake becomes a
    UserError, so one line."""

    def __init__(self, description, stage=""):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)
        self.stage = stage
        self.groups = {}
        count = ranged(int, 1)
        from_0 = ranged(int, 0)
        flags = [  # group, flag, its help, its type or its choices (None: it takes no value), unit
            ("data", "--data", "data set; toy is rendered where it is missing (default toy)",
             DATA_SETS, None),
            ("data", "--root", "its folder (default data/<data>)", str, "DIR"),
            ("data", "--split", "official split of ucf101 and hmdb51", ranged(int, 1, 3), "N"),
            ("data", "--pool", "hmdb51's training videos: the split's, or all but test's",
             ("train", "all"), None),
            ("data", "--percent", "%% of each class with a label", ranged(float, 1e-3, 100), "P"),
            ("data", "--labeled-list", "read the labelled videos from a published list instead",
             str, "FILE"),
            ("data", "--subset-seed", "draws which P percent", from_0, "N"),
            ("clips", "--clips", "consecutive clips per video, n", ranged(int, 2), "N"),
            ("clips", "--frames", "frames per clip", count, "N"),
            ("clips", "--stride", "frames from one to the next", count, "N"),
            ("clips", "--size", "side of the square that the network sees", ranged(int, 16),
             "PIXELS"),
            ("model", "--arch", "network", tuple(ARCHS), None),
            ("training", "--epochs", "passes over the videos", count, "N"),
            ("training", "--batch", "videos per step, over all processes", count, "VIDEOS"),
            ("training", "--lr", "Adam's learning rate", ranged(float, 0), "X"),
            ("training", "--warmup", "epochs in which it rises linearly", from_0, "EPOCHS"),
            ("training", "--patience", "epochs without a lower loss before it halves", from_0,
             "EPOCHS"),
            ("run", "--out", "folder of checkpoints and logs (default runs/<data>)", str, "DIR"),
            ("run", "--seed", "of weights, order and augmentation (default 0)", from_0, "N"),
            ("run", "--checkpointing", "recompute activations: less memory, up to a third more "
             "time", None, None),
            ("run", "--compile", "torch.compile: slow to start, then faster on GPUs", None, None),
            ("run", "--restart", "begin again, even where there is a checkpoint", None, None),
            ("run", "--benchmark", "time so many steps, write no checkpoint", count, "N"),
            ("run", "--workers", "decoding processes (default: its share of the cores)", from_0,
             "N"),
            ("run", "--device", "default: cuda where there is a GPU", ("cpu", "cuda"), None),
            ("run", "--precision", "default: bf16 autocast where the hardware has it",
             ("bf16", "fp32"), None),
        ]
        not_here = {"pretrain": {"--percent", "--labeled-list", "--subset-seed"},
                    "finetune": {"--clips"}, "student": {"--clips"}}
        for group, name, text, kind, unit in flags:
            if not stage and name not in ("--workers", "--device", "--precision"):
                continue
            if name in not_here.get(stage, ()):
                continue
            if kind is None:
                self.add(group, name, text, action="store_true")
            elif isinstance(kind, tuple):
                self.add(group, name, text, choices=kind)
            else:
                self.add(group, name, text, type=kind, metavar=unit)

    def add(self, group, name, text, **settings):
        """Add a flag (or, without dashes, an argument) to a group, with its default in the help."""
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        if "default" not in text:
            text += self.describe_default(name.strip("-").replace("-", "_"), **settings)
        self.groups[group].add_argument(name, help=text, **settings)

    def describe_default(self, key, default=None, **_):
        if default is not None:
            return f" (default {' '.join(map(str, np.atleast_1d(default)))})"
        if not self.stage:
            return ""
        table = {data: defaults(data, self.stage).get(key) for data in DATA_SETS}
        usual = table["ucf101"]
        if usual is None:
            return ""
        small = defaults("folder", self.stage, videos=200).get(key)
        if small != table["folder"]:
            table["folder of 200 videos"] = small
        odd = [f"; {data} {value}" for data, value in table.items() if value != usual]
        return f" (default {usual}{''.join(odd)})"

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")
