"""TimeBalance (Dave et al., CVPR 2023, arXiv 2303.16268): what the five scripts share.

Six sections: losses and TSTR - models and public weights - video: decoding, clips, augmentation -
data sets, labelled subset, toy videos - training - passes over videos, and arguments. The first
four take only tensors, paths and plain numbers: you can copy any function or class of them into
other code, with the few names that it calls."""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict, namedtuple
from datetime import timedelta
from pathlib import Path

# These are read when torch is imported, so they come before it, here and in the scripts.
# A thread that waits for another one sleeps: if it spins, other processes make a step much slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Segments of a fixed size leave gaps of 5 to 11 GiB in a GPU's memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


# ==== Losses and TSTR =============================================================================
def at_least_float32(x):
    """float32 of lower precisions; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pairwise_cosine(a, b):
    """Sim(., .) of Eq. 5 for all pairs: (..., n, d), (..., m, d) -> (..., n, m).

    The vectors need not be normalised. float64 stays float64; all else is computed in float32,
    inside autocast too: in bfloat16 a cosine of 0.9 is off by 0.002, and 1 / temperature makes that
    0.02. ValueError for other shapes or types."""
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"expected (..., n, d) and (..., m, d); found {tuple(a.shape)} and "
                         f"{tuple(b.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"expected floating-point tensors; found {a.dtype} and {b.dtype}")
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(at_least_float32(a), dim=-1)
        b = F.normalize(at_least_float32(b), dim=-1)
        return a @ b.transpose(-1, -2)


def log_h(a, b, temperature):
    """log h(., .) of Eq. 1 and 3 for all pairs: (..., n, d), (..., m, d) -> (..., n, m)."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    return pairwise_cosine(a, b) / temperature


def invariant_loss(z, temperature=0.1):
    """L_I, Eq. 1: clips of one video agree, clips of different videos do not.

    z: (B, n, d), n >= 2 clips of each of B >= 2 videos (the other videos are the negatives); need
    not be normalised. Returns a scalar: the mean over the ordered pairs of clips of one video,
    which is the paper's sum divided by B * n * (n - 1). ValueError for other shapes or types.

    Eq. 1 as printed: the indicator covers only the first term of the denominator. So the anchor
    z[i, t1] is compared with clip t1 of the other videos and with clip t2 of every video. For j = i
    the latter is the positive."""
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"expected z (B, n, d), B and n 2 or more; found {tuple(z.shape)}")
    B, n, _ = z.shape
    logits = log_h(z.flatten(0, 1), z.flatten(0, 1), temperature)
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

    z, z_aug: (B, n, d), the same n >= 2 clips of B videos under two augmentations; need not be
    normalised. Returns a scalar: the mean over the 2 * B * n anchors. ValueError for other shapes
    or types.

    The negatives of an anchor are the other timestamps of its own video in both augmentations. Two
    changes to Eq. 3 as printed: the denominator also contains the positive (without it, the loss
    has no lower bound), and clips of both augmentations serve as anchors."""
    if z.ndim != 3 or z.shape != z_aug.shape or z.shape[0] < 1 or z.shape[1] < 2:
        raise ValueError(f"expected two (B, n, d), n 2 or more; found {tuple(z.shape)} and "
                         f"{tuple(z_aug.shape)}")
    B, n, _ = z.shape
    views = torch.cat([z, z_aug], 1)  # (B, 2n, d)
    self_mask = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = log_h(views, views, temperature).masked_fill(self_mask, -torch.inf)
    positive = torch.arange(2 * n, device=z.device).roll(n)  # the clip in the other augmentation
    return F.cross_entropy(logits.flatten(0, 1), positive.repeat(B))


def unpooled_distinctive_loss(z_local, z_global, temperature=0.1):
    """L_D2, supplement D.2 (the local-global loss of TCLR): short clip t agrees with slice t of the
    long clip.

    z_local: (B, n, d), n >= 2 short clips of each of B videos, pooled over time. z_global:
    (B, n, d), the n temporal slices of the long clip that spans them. They need not be normalised.
    Returns a scalar: InfoNCE of each clip over the n slices of its video and of each slice over the
    n clips, mean over both directions and over videos. ValueError for other shapes or types."""
    shape = z_local.shape
    if len(shape) != 3 or shape != z_global.shape or shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"expected two (B, n, d), n 2 or more; found {tuple(shape)} and "
                         f"{tuple(z_global.shape)}")
    B, n, _ = shape
    logits = log_h(z_local, z_global, temperature)  # B, clip, slice
    aligned = torch.arange(n, device=logits.device).expand(B, n)
    to_slices = F.cross_entropy(logits.transpose(1, 2), aligned)
    to_clips = F.cross_entropy(logits, aligned)
    return (to_clips + to_slices) / 2


def distillation_loss(p_student, p_teacher, kind="l2"):
    """L_unsup, Eq. 8 ("l2"), and the two other losses of supplement C.1, in natural logarithms.

    p_student, p_teacher: (B, C) probabilities. Returns a scalar: the sum over classes of the
    squared difference ("l2"), KL(teacher || student) ("kl") or the Jensen-Shannon divergence
    ("js"), mean over the batch. Inside logarithms, probabilities below 1e-8 count as 1e-8, so that
    one-hot vectors have finite gradients. ValueError for other shapes or kinds."""
    if p_student.ndim != 2 or p_student.shape != p_teacher.shape or 0 in p_student.shape:
        raise ValueError(f"expected two (B, C); found {tuple(p_student.shape)} and "
                         f"{tuple(p_teacher.shape)}")
    p_student = at_least_float32(p_student)
    p_teacher = at_least_float32(p_teacher)

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


def temporal_similarity(z):
    """C, Eq. 5: z (B, n, d), n >= 2 clips of each of B videos -> (B, n, n), the cosine of each pair
    of clips. ValueError for other shapes or types."""
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"expected z (B, n, d), n 2 or more; found {tuple(z.shape)}")
    return pairwise_cosine(z, z)


def similarity_score(c_inv, c_dist):
    """s, Eq. 6: both teachers' C, (B, n, n) -> (B,), the mean of their off-diagonal elements.

    Clamped to [0, 1]: a mean cosine can be negative, a weight cannot. The paper leaves this open.
    ValueError for other shapes."""
    n = c_inv.shape[-1]
    if c_inv.shape != c_dist.shape or c_inv.shape[1:] != (n, n) or n < 2:
        raise ValueError(f"expected two (B, n, n), n 2 or more; found {tuple(c_inv.shape)} and "
                         f"{tuple(c_dist.shape)}")
    diagonal = torch.eye(n, dtype=torch.bool, device=c_inv.device)
    total = (at_least_float32(c_inv) + at_least_float32(c_dist)).masked_fill(diagonal, 0)
    return (total.sum((1, 2)) / (2 * n * (n - 1))).clamp(0, 1)


def combine_teachers(p_inv, p_dist, score):
    """p_T, Eq. 7: two (B, C) of probabilities, weighted by score (B,) and 1 - score -> (B, C).
    ValueError for other shapes."""
    if p_inv.ndim != 2 or p_inv.shape != p_dist.shape or score.shape != p_inv.shape[:1]:
        raise ValueError(f"expected (B, C), (B, C) and (B,); found {tuple(p_inv.shape)}, "
                         f"{tuple(p_dist.shape)} and {tuple(score.shape)}")
    s = at_least_float32(score)[:, None]
    return s * p_inv + (1 - s) * p_dist


def score_videos(names, c_inv, c_dist):
    """s of every video in `names`: (N,). c_inv, c_dist: {name: C}, C (n, n), by either teacher.

    A video that one of them lacks gets 0.5, so the plain mean. ValueError if their n differ."""
    known = [k for k, name in enumerate(names) if name in c_inv and name in c_dist]
    score = torch.full((len(names),), 0.5)
    if known:
        c_inv, c_dist = (torch.stack([c[names[k]] for k in known]) for c in (c_inv, c_dist))
        score[known] = similarity_score(c_inv, c_dist).to(score)
    return score


# ==== Models and public weights ===================================================================
class Backbone(nn.Module):
    """What both networks share: list_blocks(), the stem and the residual blocks in their order."""
    checkpointing = False  # recompute each block's activations in the backward pass

    def features(self, x):
        """(B, 3, T, H, W) -> (B, D, T'), pooled over space only."""
        for block in self.list_blocks():
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False,
                               context_fn=lambda: (contextlib.nullcontext(),
                                                   frozen_statistics(block)))
            else:
                x = block(x)
        return x.mean((3, 4))

    def initialise(self, mean, std):
        """torchvision's and PyTorchVideo's initial weights; mean, std: of RGB in [0, 1]."""
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


@contextlib.contextmanager
def frozen_statistics(block):
    """The second pass of a checkpointed block: its BatchNorms have counted the batch already."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:  # torch leaves the second pass by an exception, as soon as it has what it needs
        for buffer, value in before:
            buffer.copy_(value)


class R3D(Backbone):
    """torchvision's r3d_18, same keys and shapes, but layer4 keeps the time axis.

    Its first convolution and its downsampling have no temporal stride, the convolution a temporal
    dilation of 2 instead: 16 frames leave T' = 4 time steps, which L_D2 needs. early: the first
    halving of time in the stem instead of layer2, which takes half the operations."""

    def __init__(self, num_classes, width=64, depth=2, early=False):
        super().__init__()

        def layer(dim_in, dim_out, stride):
            shortcut = None
            if dim_in != dim_out:
                shortcut = nn.Sequential(
                    nn.Conv3d(dim_in, dim_out, 1, stride, bias=False), nn.BatchNorm3d(dim_out))
            blocks = [BasicBlock(dim_in, dim_out, Conv3DSimple, stride, shortcut)]
            blocks += [BasicBlock(dim_out, dim_out, Conv3DSimple) for _ in range(depth - 1)]
            return nn.Sequential(*blocks)

        stem = nn.Conv3d(3, width, (3, 7, 7), (1 + early, 2, 2), (1, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, (2 - early, 2, 2))
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.layer4 = layer(4 * width, 8 * width, (1, 2, 2))
        conv = self.layer4[0].conv1[0]
        conv.dilation = conv.padding = (2, 1, 1)
        self.fc = nn.Linear(8 * width, num_classes)
        self.initialise(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))

    def list_blocks(self):
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
        self.branch2 = nn.Sequential(OrderedDict(
            conv_a=nn.Conv3d(dim_in, dim_inner, kernel, padding="same", bias=False),
            norm_a=nn.BatchNorm3d(dim_inner),
            act_a=nn.ReLU(inplace=True),
            conv_b=nn.Conv3d(dim_inner, dim_inner, (1, 3, 3), (1, stride, stride), (0, 1, 1),
                             bias=False),
            norm_b=nn.BatchNorm3d(dim_inner),
            act_b=nn.ReLU(inplace=True),
            conv_c=nn.Conv3d(dim_inner, dim_out, 1, bias=False),
            norm_c=nn.BatchNorm3d(dim_out)))
        self.activation = nn.ReLU(inplace=True)
        nn.init.zeros_(self.branch2.norm_c.weight)

    def forward(self, x):
        shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return self.activation(shortcut + self.branch2(x))


class SlowR50(Backbone):
    """PyTorchVideo's slow_r50 (the paper's 3D-ResNet-50), key for key, for any input size."""

    def __init__(self, num_classes):
        super().__init__()
        stem = nn.Sequential(OrderedDict(
            conv=nn.Conv3d(3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            norm=nn.BatchNorm3d(64),
            pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            activation=nn.ReLU(inplace=True)))  # before the pooling it gives the same, more slowly
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
        self.initialise(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))

    def list_blocks(self):
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
    """A classifier of clips with new weights: (B, 3, T, H, W) -> logits (B, num_classes). Its
    .features(x) -> (B, D, T').

    arch: r3d_18 (D = 512, T' = T / 4), slow_r50 (D = 2048, T' = T), or r3d_tiny, an r3d with a
    fifth of the width and half the depth (D = 96, T' = T / 4). The keys of the state dict are
    torchvision's or PyTorchVideo's. ValueError for other names."""
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: {', '.join(ARCHS)}")
    return ARCHS[arch](num_classes)


class ProjectionHead(nn.Sequential):
    """g, supplement B.1.2: (B, dim) clip features -> (B, 128), L2-normalised."""

    def __init__(self, dim):
        super().__init__(
            nn.Linear(dim, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 128, bias=False),
            nn.BatchNorm1d(128))

    def forward(self, x):
        return F.normalize(at_least_float32(super().forward(x)), dim=-1)


class Embedder(nn.Module):
    """g(f(x)), a backbone and its projection head, in one module for DistributedDataParallel. The
    backbone's classifier is frozen."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        for name, parameter in backbone.named_parameters():
            if name.startswith(CLASSIFIERS):
                parameter.requires_grad_(False)  # not used in stage 1
                if name.endswith("weight"):
                    self.head = ProjectionHead(parameter.shape[1])

    def forward(self, clips, num_long=0, slices=1):
        """(N, 3, T, H, W), of which the last `num_long` are long clips ->
        (N - num_long + num_long * slices, 128).

        First a row for each short clip, pooled over time, then `slices` rows for each long clip,
        one for each temporal slice of its features. All rows pass the head together, so that its
        BatchNorm sees one batch. ValueError if T' is no multiple of `slices`."""
        f = self.backbone.features(clips)  # (N, D, T')
        if f.shape[2] % slices:
            raise ValueError(f"cannot cut {f.shape[2]} time steps into {slices} equal slices")
        pooled, unpooled = f.split([len(f) - num_long, num_long])
        unpooled = unpooled.unflatten(2, (slices, -1)).mean(3)  # (num_long, D, slices)
        unpooled = unpooled.transpose(1, 2).flatten(0, 1)  # (num_long * slices, D)
        return self.head(torch.cat([pooled.mean(2), unpooled]))


def load_backbone(model, saved):
    """Load all weights except the classifier's from what torch.load returned, whichever program
    wrote it.

    Known public forms: torchvision's r3d_18 (a bare state dict), PyTorchVideo's slow_r50 (under
    "model_state"), TCLR's ("state_dict", of BGR frames). ValueError if a weight is missing."""
    saved = find_weights(saved)
    # What wrappers add to the names: "module.0." is TCLR's, "_orig_mod." torch.compile's.
    weights = {re.sub(r"^(module\.0\.|module\.|model\.|backbone\.)+", "",
                      name.replace("_orig_mod.", "")): w for name, w in saved.items()}
    own = {k: w for k, w in model.state_dict().items() if not k.startswith(CLASSIFIERS)}
    wrong = [k for k, w in own.items() if k not in weights or weights[k].shape != w.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(own)} tensors of the network are missing or of "
                         f"another shape, such as {wrong[0]}: another --arch?")
    fitting = {k: weights[k] for k in own}
    if "module.0.stem.0.weight" in saved:
        fitting["stem.0.weight"] = fitting["stem.0.weight"].flip(1)
    model.load_state_dict(fitting, strict=False)


def find_weights(saved):
    """{name: tensor} of what torch.load returned, wherever in it the state dict lies."""
    places = ("state_dict", "model_state", "model_state_dict", "model")
    weights = next((saved[k] for k in places if isinstance(saved.get(k), dict)), saved)
    return {name: w for name, w in weights.items() if torch.is_tensor(w)}


# ==== Video: decoding, clips, augmentation ========================================================
# Containers with an index, and the codecs of which every packet is one frame that is shown: there a
# seek is exact.
INTRA = {"mjpeg", "prores", "dnxhd", "dvvideo", "ffv1", "huffyuv", "rawvideo", "png"}
SEEKABLE = {
    "mov,mp4,m4a,3gp,3g2,mj2": {"h264", "hevc", "vp9", "av1", *INTRA},
    "matroska,webm": {"h264", "hevc", "vp9", "av1", *INTRA},
    "avi": {"h264", "mpeg4", *INTRA},
}
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)  # what a damaged file can raise
# HMDB51 has metadata that is not UTF-8, which PyAV below 19 takes for an error.
OPEN = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def open_video(path):
    """An open av container and its video stream, decoded in this thread: the first one marked as
    the default, else the first. Attached pictures do not count."""
    # "file:" keeps a name with a colon from being taken for a URL.
    container = av.open(f"file:{os.fspath(path)}", **OPEN)
    marks = av.stream.Disposition
    streams = [s for s in container.streams.video if not s.disposition & marks.attached_pic]
    streams.sort(key=lambda stream: not stream.disposition & marks.default)
    if not streams or streams[0].codec_context is None:
        container.close()
        raise ValueError("no decoder for its video stream" if streams else "no video stream")
    streams[0].thread_type = "NONE"  # the data loader's workers are the threads
    return container, streams[0]


def decode_frames(path, indices, short_side=None):
    """Decode frames of a video file by their index in presentation order.

    path: a file of any format that FFmpeg reads.
    indices: from 0, in any order, repeated or not; or a function from the count of frames to them.
        It is called with the count of packets, and again with the true count where a frame is
        missing (HMDB51's files hold a packet too many, truncated files more).
    short_side: scale frames down, never up, to this many pixels on their shorter side.

    Returns torch.uint8 (len(indices), H, W, 3), RGB, upright: what a full decode gives there. An
    orientation in EXIF and a clean aperture are not applied. IndexError for a frame past the end;
    av.FFmpegError, OSError or ValueError for a file that cannot be decoded. Memory: twice the
    frames returned, and a few hundred bytes a packet.

    Behind damage that costs a frame, a full decode counts all later frames one lower. Here they may
    be those that the intact file has at these indices."""
    container, stream = open_video(path)
    with container:
        timestamps, keyframes = list_packets(container, stream)
        if not timestamps:
            raise ValueError("no frame can be decoded")
        wanted = list(map(int, indices(len(timestamps)) if callable(indices) else indices))
        first, last = min(wanted, default=-1), max(wanted, default=-1)
        if first < 0:
            raise IndexError(f"frames {wanted} asked for")
        if keyframes:
            start = max(i for i in keyframes if i <= first)
            found = seek(container, stream, keyframes[start], timestamps[start:last + 1])
            with contextlib.suppress(av.FFmpegError, ValueError):
                frames, _ = pick_frames(found, start, wanted, short_side)
                if frames is not None:
                    return frames
    container, stream = open_video(path)
    with container:  # count from the start
        found = itertools.islice(decode(container.demux(stream), stream), last + 1)
        frames, count = pick_frames(found, 0, wanted, short_side)
    if frames is not None:
        return frames
    if not count:
        raise ValueError("no frame can be decoded")
    if callable(indices):
        return decode_frames(path, indices(count), short_side)
    raise IndexError(f"frame {last} asked for, the video has {count}")


def list_packets(container, stream):
    """(timestamps of the packets, {index: position in the file} of the key frames to seek to), in
    about 1 ms: only the first packet is decoded.

    After a seek a frame's index is the rank of its timestamp. So no key frame is listed unless
    every packet is whole, is one frame and has a timestamp of its own, and the first is a key frame
    and the earliest. Nor where B-frames are in AVI (timestamps out of order), as in HMDB51."""
    kind = container.format.name
    codec = stream.codec.canonical_name
    exact = codec in SEEKABLE.get(kind, ()) and not (
        kind == "avi" and stream.codec_context.has_b_frames)
    timestamps = []  # not the packets: they hold the data of the whole file
    positions = {}
    for packet in container.demux(stream):
        if exact and not timestamps and packet.size:
            with contextlib.suppress(av.error.InvalidDataError):
                packet.decode()  # it alone may bring tables, which the decoder keeps over a seek
        if not packet.size or packet.is_discard:
            continue
        not_coded = codec == "mpeg4" and packet.size <= 8  # a frame that the encoder left out
        if not_coded or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            exact = False
        timestamps.append(packet.pts)
        if packet.is_keyframe:
            positions[packet.pts] = packet.pos
    order = sorted(set(timestamps) - {None})
    if (exact and len(order) == len(timestamps)
            and timestamps[:1] == order[:1] == list(positions)[:1]):
        return order, {i: positions[t] for i, t in enumerate(order) if t in positions}
    return timestamps, {}


def seek(container, stream, position, timestamps):
    """The frames with these timestamps, from a key frame on. ValueError unless they prove the seek:
    the first comes from that very packet and is a key frame; each has the next timestamp, and is
    not interlaced (whose two fields may be two packets); nothing is damaged."""
    container.seek(timestamps[0], stream=stream)
    packets = itertools.dropwhile(lambda packet: packet.pos != position, container.demux(stream))
    frames = (frame for packet in packets for frame in packet.decode())
    frames = itertools.dropwhile(lambda frame: not frame.key_frame, frames)
    for timestamp, frame in zip(timestamps, frames):
        if frame.pts != timestamp or frame.is_corrupt or frame.interlaced_frame:
            raise ValueError("not the expected frame")
        yield frame


def decode(packets, stream):
    """All their frames. A damaged packet yields none and ends nothing, as in players. An empty one
    would end all: PyAV takes it for the end; Theora repeats a picture so."""
    for packet in packets:
        if packet.size:
            with contextlib.suppress(av.error.InvalidDataError):
                yield from packet.decode()
    with contextlib.suppress(av.error.InvalidDataError):
        yield from stream.decode()  # what the decoder still holds


def pick_frames(frames, start, wanted, short_side):
    """(uint8 (T, H, W, 3) of the wanted frames, None if one is missing; count of frames so far).
    start: index of the first frame."""
    pictures = {}  # by index
    needed = set(wanted)
    count = start
    # One for all frames: PyAV's default is one for each, 4 times slower.
    scaler = av.video.reformatter.VideoReformatter()
    for index, frame in enumerate(frames, start):
        count = index + 1
        if index in needed:
            if not pictures:  # the first frame settles size and orientation
                scale = min(1, (short_side or math.inf) / min(frame.height, frame.width))
                size = round(frame.width * scale), round(frame.height * scale)
                matrix = None
                with contextlib.suppress(ValueError):  # PyAV has no name for another kind: EXIF
                    matrix = frame.side_data.get("DISPLAYMATRIX")
            picture = scaler.reformat(frame, *size, "rgb24", threads=1).to_ndarray()
            pictures[index] = turn_upright(picture, matrix) if matrix else picture
    if len(pictures) < len(needed):
        return None, count
    return torch.from_numpy(np.stack([pictures[index] for index in wanted])), count


def turn_upright(picture, matrix):
    """Turn and mirror a picture (H, W, C) to the nearest quarter turn, as players do. Its display
    matrix maps (x, y) to (a x + c y, b x + d y)."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def clip_indices(count, frames, stride=1, position=0.5):
    """Indices of a clip of `frames` frames, `stride` apart, in a video of `count` frames. A shorter
    video is played whole, in slow motion: if it were looped, its last clip could repeat its first,
    and L_D could not tell them apart.

    position: from 0 (the clip begins with the video) to 1 (it ends with it). ValueError for a
    position beyond these, or if a number of frames is not whole or below 1."""
    whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in (count, frames, stride))
    if not whole or not 0 <= position <= 1:
        raise ValueError(f"no clip of {frames} frames, {stride} apart, lies at {position} of a "
                         f"video of {count} frames")
    slack = count - (frames - 1) * stride - 1
    if slack < 0:
        return np.arange(frames) * count // frames
    start = min(slack, int(position * (slack + 1)))
    return start + stride * np.arange(frames)


def rng(seed, *key):
    """A numpy Generator for a key of whole numbers, independent of process and order of calls."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def augment_clips(clips, size, rngs, flip=True, area=0.3, jitter=0.4, hue=0.1, jitter_prob=0.8,
                  grey_prob=0.2):
    """A random crop, flip, colour jitter and greyscale of each clip (Sec. 4.2), the same for all
    frames of a clip. The defaults are stage 1's.

    clips: N of uint8 (T, H, W, 3) on any device; T is the same for all. rngs: N numpy Generators,
    one for each clip. flip: mirror half of the clips. area: the crop keeps this share of the frame
    or more (a little less where it is longer than the frame). jitter: largest change of brightness,
    contrast and saturation, as a share. hue: largest hue shift, as a share of the colour circle.
    jitter_prob, grey_prob: probabilities. Returns uint8 (N, T, 3, size, size). ValueError for
    another number, shape or type."""
    if len({len(clip) for clip in clips}) != 1 or len(clips) != len(rngs):
        raise ValueError(f"{len(clips)} clips, {len(rngs)} generators, or clips differ in length")
    if any(clip.shape[3:] != (3,) or clip.dtype != torch.uint8 for clip in clips):
        raise ValueError("expected clips of uint8 (T, H, W, 3)")
    crops = []
    changes = np.tile([1.0, 1.0, 1.0, 0.0], (len(clips), 1))
    for clip, rng, change in zip(clips, rngs, changes):
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
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if rng.random() < 0.5 and flip else crop)
        if rng.random() < jitter_prob:
            change[:3] = rng.uniform(1 - jitter, 1 + jitter, 3)
            change[3] = rng.uniform(-hue, hue)
        if rng.random() < grey_prob:
            change[2] = 0
    return change_colours(torch.stack(crops), *changes.T)


def change_colours(x, brightness, contrast, saturation, hue):
    """One affine map of RGB for each clip: (N, T, 3, H, W) from 0 to 255 -> uint8.

    Each change is an array (N,): a factor of brightness, of contrast about mid-grey and of
    saturation (0: greyscale, luma of Rec. 601), and a share of a turn of hue about grey."""
    luma = np.array([0.299, 0.587, 0.114])
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # the grey axis x RGB
    angle, factor, gain = (v[:, None, None] for v in (2 * math.pi * hue, saturation,
                                                      brightness * contrast))
    turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * across
    matrix = gain * (turn @ (factor * np.eye(3) + (1 - factor) * luma))  # (N, 3, 3)
    offset = 127.5 * (1 - contrast)[:, None, None] + 0.5  # to round
    matrix, offset = (torch.from_numpy(v.astype(np.float32)).to(x.device, non_blocking=True)
                      for v in (matrix, offset))
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for clips, m, o, into in zip(*(v.split(32) for v in (x, matrix, offset, out))):
        rgb = clips.transpose(1, 2).flatten(2).float()  # (32, 3, T * H * W)
        rgb = torch.baddbmm(o, m, rgb).clamp_(0, 255)
        into.copy_(rgb.view(clips.transpose(1, 2).shape).transpose(1, 2))
    return out


def centre_crop(clip, size, scale=1.0):
    """The central square whose side is `scale` times the shorter side of the frames, resized:
    uint8 (T, H, W, 3) -> uint8 (T, 3, size, size). ValueError for another shape, type or scale."""
    if clip.shape[3:] != (3,) or clip.dtype != torch.uint8 or not 0 < scale <= 1:
        raise ValueError(f"expected uint8 (T, H, W, 3) and a scale in (0, 1]; found {clip.dtype} "
                         f"{tuple(clip.shape)} and {scale}")
    clip = clip.permute(0, 3, 1, 2)
    side = max(1, round(scale * min(clip.shape[2:])))
    return TF.resize(TF.center_crop(clip, [side, side]), [size, size], antialias=True)


def to_input(clips, model):
    """The network's input: uint8 (N, T, 3, H, W) -> (N, 3, T, H, W), channels_last_3d, normalised
    by model.mean and model.std. Its dtype is model.mean's, inside autocast autocast's. ValueError
    for another shape or type."""
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.dtype != torch.uint8:
        raise ValueError(f"expected uint8 (N, T, 3, H, W); found {clips.dtype} "
                         f"{tuple(clips.shape)}")
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


# ==== Data sets, labelled subset, toy videos ======================================================
class UserError(Exception):
    """A mistake in arguments or input, see command()."""


SUFFIXES = tuple("""
    .3g2 .3gp .asf .avi .dav .divx .dv .f4v .flv .gif .h264 .hevc .m2t .m2ts .m2v .m4v .mjpeg .mjpg
    .mkv .mod .mov .mp4 .mpe .mpeg .mpg .mts .mxf .ogm .ogv .qt .rm .rmvb .tod .ts .vob .webm .wmv
    """.split())  # what cameras and the web write, and FFmpeg reads
HIDDEN = (".", "@", "#recycle", "$RECYCLE", "__MACOSX")  # how such names begin
TREES = {  # videos, and lists or test videos, under --root
    "ucf101": ("UCF-101/<Class>/*.avi", "ucfTrainTestlist/*.txt"),
    "hmdb51": ("hmdb51_org/<class>/*.avi", "testTrainMulti_7030_splits/*.txt"),
    "kinetics400": ("train/<class>/*", "val/<class>/*"),
    "folder": ("train/<class>/*", "test/<class>/*"),
}
TREES["toy"] = TREES["ucf101"]


class Videos:
    """A data set, by id from 0: names (paths below `folder`), labels (N,) (-1: none), classes."""

    def __init__(self, folder, names, labels, classes):
        self.folder = folder
        self.names = list(names)
        self.labels = np.array(labels, np.int64)
        self.classes = classes

    def __len__(self):
        return len(self.labels)

    def path(self, i):
        return os.path.join(self.folder, self.names[i])

    def mask_labels(self, keep=()):
        """The label firewall: all labels but those of `keep` become -1, so no code reads them."""
        self.labels[np.setdiff1d(np.arange(len(self)), keep)] = -1


def read_videos(data, root, train, split=1, pool="train"):
    """The training or test videos of a data set as it lies on disk (TREES), all labels known.

    pool: of hmdb51's training videos, "train" for those of the split, "all" for every one that is
    not a test video. Of `folder`, what lies under unlabeled/ is among the training videos, with
    label -1. UserError if the lists or over 5 % of the videos that they name are missing."""
    root = Path(root)
    expected = f"expected {' and '.join(TREES[data])}"
    for part in TREES[data][:1 if train and data in ("kinetics400", "folder") else 2]:
        if not os.path.isdir(root / part.split("/")[0]):
            raise UserError(f"{root}: no {part.split('/')[0]}; {expected}")
    if data == "hmdb51":
        folder, classes, class_of = read_hmdb51(root, train, split, pool)
    elif data in ("ucf101", "toy"):
        folder, classes, class_of = read_ucf101(root, train, split)
    else:
        folder, classes, class_of = read_folders(data, root, train)
    if not class_of:
        raise UserError(f"{root}: no {'training' if train else 'test'} videos; {expected}")
    if data in ("hmdb51", "ucf101", "toy"):
        if missing := sorted(class_of.keys() - list_videos(folder)):
            problem = (f"{len(missing)} of {len(class_of)} listed videos are not in {folder}, such "
                       f"as {missing[0]}")
            if len(missing) > 0.05 * len(class_of):
                raise UserError(f"{root}: {problem}; {expected}")
            warnings.warn(problem)
        class_of = {name: c for name, c in class_of.items() if name not in missing}
    number = {None: -1} | {c: k for k, c in enumerate(classes)}
    if unknown := sorted(set(class_of.values()) - number.keys()):
        raise UserError(f"{root}: videos of {unknown[0]} are listed, but not this class")
    return Videos(folder, class_of, [number[c] for c in class_of.values()], classes)


def read_ucf101(root, train, split):
    """Folder of the videos, classes, {name: class}: by the official lists."""
    lists = root / "ucfTrainTestlist"
    classes = [line.split()[-1] for line in read_lines(lists / "classInd.txt")]
    rows = read_lines(lists / f"{'train' if train else 'test'}list0{split}.txt")
    names = [row.split()[0] for row in rows]
    return root / "UCF-101", classes, {name: os.path.dirname(name) for name in names}


def read_hmdb51(root, train, split, pool):
    """The same as read_ucf101; a list for each class, rows end in 1 (train), 2 (test) or 0."""
    lists = root / "testTrainMulti_7030_splits"
    ending = f"_test_split{split}.txt"
    codes = "2" if not train else "1" if pool == "train" else "01"
    classes = [path.name.removesuffix(ending) for path in sorted(lists.glob(f"*{ending}"))]
    class_of = {}
    for c in classes:
        for row in read_lines(lists / (c + ending)):
            file, code = row.rsplit(maxsplit=1)
            if code in codes:
                class_of[f"{c}/{file}"] = c
    return root / "hmdb51_org", classes, class_of


def read_folders(data, root, train):
    """The same as read_ucf101, by folders at any depth; unlabeled videos have class None."""
    def read_classes(part):
        names = sorted(f"{part}/{name}" for name in list_videos(root / part))
        return {name: name.split("/")[1] if name.count("/") > 1 else None for name in names}

    class_of = read_classes("train")
    classes = sorted(set(class_of.values()) - {None})
    if not train:
        class_of = read_classes("val" if data == "kinetics400" else "test")
    if ignored := [name for name, c in class_of.items() if c not in classes]:
        warnings.warn(f"{len(ignored)} videos are in no class of train/, such as "
                      f"{root / ignored[0]}: ignored")
    class_of = {name: c for name, c in class_of.items() if c in classes}
    if train and data == "folder":
        if os.path.isdir(root / "unlabeled"):
            class_of |= dict.fromkeys(read_classes("unlabeled"))
        warn_of_folders(root, class_of)
    return root, classes, class_of


def warn_of_folders(root, names):
    """Warn of folders that --data folder does not read, and of test videos among the training
    videos `names`: those of the same file name and size."""
    for folder in sorted(os.listdir(root)):
        found = (file for _, _, files in os.walk(root / folder) for file in files)
        if folder not in ("train", "test", "unlabeled") and not folder.startswith(HIDDEN) and any(
                file.lower().endswith(SUFFIXES) for file in found):
            warnings.warn(f"{root / folder} is not read: only train/, test/ and unlabeled/ are")
    tests = {}  # of each file name the sizes
    with contextlib.suppress(UserError):  # training does without them
        for name in list_videos(root / "test"):
            tests.setdefault(os.path.basename(name), set()).add(size_of(root / "test" / name))
    if twice := [name for name in names if os.path.basename(name) in tests
                 and size_of(root / name) in tests[os.path.basename(name)]]:
        warnings.warn(f"{len(twice)} training videos are test videos, too, by file name and size, "
                      f"such as {root / twice[0]}: accuracies will be too high")


def size_of(path):
    """Bytes of a file, 0 of a broken link."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def list_videos(folder):
    """The set of the paths below a folder of all its video files, at any depth, without hidden
    ones. Linked folders are followed, but none is read twice. UserError if one cannot be read."""
    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}")

    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    videos = set()
    others = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                videos.add(os.path.relpath(os.path.join(here, name), folder))
            elif not name.startswith("."):
                others.append(os.path.splitext(name)[1])
    if videos and others:
        warnings.warn(f"{folder}: {len(others)} files of other endings left out: "
                      + ", ".join(sorted(set(others))[:9]))
    return videos


def read_lines(path):
    """The lines of a text file, without white space around them and without the empty ones."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def labeled_subset(names, labels, percent=100, seed=0, per_class=None):
    """The deterministic labelled fraction: of each class max(1, round(percent / 100 * its videos)),
    or per_class -> sorted ids.

    names, labels: of the training videos, in any order; label -1 is no class. Within a class those
    come first whose sha256 of "<seed> <name>" is smallest, so a smaller fraction is part of a
    larger one. ValueError if labels are not as many as names, or percent is not in (0, 100]."""
    labels = np.asarray(labels)
    if labels.shape != (len(names),) or not 0 < percent <= 100:
        raise ValueError(f"{len(names)} names, labels of shape {labels.shape}, {percent} per cent: "
                         "expected a label for each name, and a share in (0, 100]")
    chosen = []
    for c in np.unique(labels[labels >= 0]):
        members = sorted(np.flatnonzero(labels == c), key=lambda i: hashlib.sha256(
            os.fsencode(f"{seed} {names[i]}")).digest())
        chosen += members[:per_class or max(1, round(percent / 100 * len(members)))]
    return np.array(sorted(chosen), np.int64)


def read_labeled_list(path, videos):
    """The videos of a published list of labelled videos -> sorted ids.

    A row is a path and up to two numbers, which are ignored: lists number classes in different
    ways. It names the video with the same folder, but for case, blanks and underscores, and the
    same file name, but for its ending. UserError if a row fits two videos."""
    def key_of(name):
        folder, file = os.path.split(name)
        folder = os.path.basename(folder).replace(" ", "").replace("_", "").lower()
        return folder, os.path.splitext(file)[0] if file.lower().endswith(SUFFIXES) else file

    ids_of = {}
    for i in np.flatnonzero(videos.labels >= 0).tolist():
        ids_of.setdefault(key_of(videos.names[i]), []).append(i)
    chosen = set()
    absent = []
    for row in read_lines(path):
        readings = [row.rsplit(maxsplit=n) for n in range(3)]  # a number may belong to the name
        names = [name for name, *numbers in readings if all(map(str.isdecimal, numbers))]
        fits = sorted({i for name in names for i in ids_of.get(key_of(name), ())})
        if len(fits) > 1:
            raise UserError(f"{path}: {row} fits {' and '.join(videos.names[i] for i in fits)}")
        chosen.update(fits)
        if not fits:
            absent.append(row)
    if absent:
        warnings.warn(f"{path}: {len(absent)} rows name no training video, such as {absent[0]}")
    if not chosen:
        raise UserError(f"{path}: names no video of this data set")
    return np.array(sorted(chosen), np.int64)


def set_digest(names):
    """Eight hexadecimal digits that tell one set of names from another."""
    return hashlib.sha256(os.fsencode("\n".join(sorted(names)))).hexdigest()[:8]


def video_digest(videos):
    """set_digest of the names of all videos and of the sizes of up to 1,000 of the files."""
    sample = range(0, len(videos), math.ceil(len(videos) / 1000))
    return set_digest([*videos.names, *(f"{i} {size_of(videos.path(i))}" for i in sample)])


def weight_digest(saved):
    """Eight hexadecimal digits that tell one network from another, of what torch.load returned."""
    digest = hashlib.sha256()
    for weight in find_weights(saved).values():
        digest.update(weight.detach().float().numpy().tobytes())
    return digest.hexdigest()[:8]


TOY_COLOURS = np.array([(220, 60, 50), (60, 190, 80), (60, 90, 220), (230, 200, 60)], np.uint8)
TOY_PATTERNS = {  # of the object, over u, v in [-1, 1]
    "Stripes": lambda u, v: np.floor(2 * (u + 1)) % 2 == 0,
    "Checker": lambda u, v: (u > 0) == (v > 0),
    "Ring": lambda u, v: np.maximum(np.abs(u), np.abs(v)) > 0.5,
    "Bars": lambda u, v: np.floor(2 * (v + 1)) % 2 == 0,
}
# Up and down have the same frames, grow and shrink, too: only their order tells. Each movement is
# in two classes, so a network with equal features for all clips of a video cannot tell the four
# classes apart. A movement: what changes of the object, its middle value, half of its change.
UP, DOWN = ("y", 20, -18), ("y", 20, 18)
GROW, SHRINK = ("radius", 12, 7), ("radius", 12, -7)
TOY_MOVES = {
    "UpGrow": (UP, GROW),
    "GrowDown": (GROW, DOWN),
    "DownShrink": (DOWN, SHRINK),
    "ShrinkUp": (SHRINK, UP),
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
        moves = [None]
        lengths = [count]
    else:
        pattern = patterns[rng.integers(len(patterns))]
        moves = list(TOY_MOVES.values())[label - len(patterns)]
        cut = int(count * rng.uniform(0.4, 0.6))
        lengths = [cut, count - cut]
    scene = rng.integers(2)
    colours = rng.permutation(TOY_COLOURS)
    video = []
    for k, (move, length) in enumerate(zip(moves, lengths)):
        square = {"x": rng.uniform(24, 32), "y": rng.uniform(17, 23), "radius": 11 if move else 15}
        if move:
            changing, middle, reach = move
            square[changing] = middle + reach * np.linspace(-1, 1, length)
        else:
            period = rng.choice([8, 16])  # frames
            swing = 6 * np.sin(2 * np.pi * (np.arange(length) / period + rng.random()))
            square[rng.choice(["x", "y"])] += swing
        video.append(paint_toy(square, length, pattern, colours[k], (scene + k) % 2))
    return np.concatenate(video)


def paint_toy(square, length, pattern, colour, scene):
    """Frames, uint8 (length, 40, 56, 3), of a square object in one of two scenes.

    square: x, y and radius in pixels, each a number or one for each frame."""
    v, u = np.mgrid[:40, :56]
    ground = 110 + 30 * (u // 8 % 2) if scene else 60 + v
    x, y, radius = (np.broadcast_to(square[key], length)[:, None, None]
                    for key in ("x", "y", "radius"))
    du = (u - x) / radius
    dv = (v - y) / radius
    inside = (np.maximum(np.abs(du), np.abs(dv)) < 1)[..., None]
    figure = np.where(pattern(du, dv)[..., None], colour, np.uint8(245))
    return np.where(inside, figure, ground[..., None].astype(np.uint8))


def render_toy(root, train=400, test=200):
    """Write the toy videos in UCF101's layout, unless they are there. UserError for other files."""
    root = Path(root)
    version = 2
    if os.path.exists(root / "toy.json"):
        if json.loads((root / "toy.json").read_text())["version"] != version:
            raise UserError(f"{root} holds toy videos of another version: choose another --root")
        return
    if os.path.exists(root) and os.listdir(root):
        raise UserError(f"{root} is not empty: toy videos need a new --root (is --data missing?)")
    part = root.with_name(f"{root.name}.part")  # renamed when it is complete
    classes = [*TOY_PATTERNS, *TOY_MOVES]
    rows = []  # of the lists, the test videos first
    for i in tqdm(range(train + test), desc=f"rendering toy videos into {root}", disable=None):
        k, label = divmod(i, len(classes))
        c = classes[label]
        name = f"{c}/v_{c}_g{k // 4 + 1:02}_c{k % 4 + 1:02}.avi"
        path = part / "UCF-101" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="avi") as container:  # as UCF101's files are
            stream = container.add_stream("mpeg4", rate=25, options={"threads": "1"})
            stream.width, stream.height = 56, 40
            stream.pix_fmt = "yuv420p"
            for frame in toy_clip(label, rng(0, int.from_bytes(name.encode(), "big"))):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
        rows.append(f"{name}\n" if i < test else f"{name} {label + 1}\n")
    lists = part / "ucfTrainTestlist"
    lists.mkdir(exist_ok=True)
    (lists / "classInd.txt").write_text("".join(f"{k} {c}\n" for k, c in enumerate(classes, 1)))
    (lists / "testlist01.txt").write_text("".join(rows[:test]))
    (lists / "trainlist01.txt").write_text("".join(rows[test:]))
    (part / "toy.json").write_text(json.dumps({"version": version, "train": train, "test": test}))
    part.rename(root)


# ==== Training: processes, Batches, State, checkpoints ============================================
def command(main):
    """Make main(argv=None) a command: a UserError is one line on stderr and exit status 2, Ctrl-C
    is one line and exit status 1."""
    script = os.path.basename(main.__code__.co_filename)

    @functools.wraps(main)
    def run(argv=None):
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
        try:
            main(argv)
        except (UserError, PermissionError) as error:
            print(f"{script}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            goes_on = "; the same command, without --restart, goes on from the last checkpoint"
            print(f"{script}: interrupted" + goes_on * (script != "evaluate.py"), file=sys.stderr)
            sys.exit(1)
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


def print0(*text, everywhere=False):
    """Print above a bar, in torchrun's first process only, or everywhere."""
    if everywhere or rank() == 0:
        tqdm.write(" ".join(map(str, text)))
        sys.stdout.flush()  # a file or a pipe has the line at once, too


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_gather(z):
    """(B, ...) of each process -> (processes * B, ...), in the order of ranks, on every process,
    with gradient for its own rows.

    Every process computes the same loss of all rows. It sends back the gradient of its own rows,
    times the number of processes, since DistributedDataParallel averages."""
    if world_size() == 1:
        return z
    rows = [torch.empty_like(z) for _ in range(world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    own = z.view_as(z)
    own.register_hook(lambda gradient: gradient * world_size())
    rows[rank()] = own
    return torch.cat(rows)


def distribute(net, clips, args, device):
    """The network to train, on all processes. net: a classifier or an Embedder, on the device.
    clips: of a step, over all processes. UserError if torch's kernels cannot count so many."""
    clips //= world_size()
    # The largest activations: behind the stem and its pooling, where there is one.
    if device.type == "cuda" and clips * 64 * args.frames * (args.size // 2) ** 2 > 2**31:
        raise UserError(f"{clips} clips of {args.frames} x {args.size} x {args.size} a GPU are "
                        "more than torch's kernels count, 2^31 elements: a smaller --batch, or "
                        "more GPUs")
    if world_size() > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    backbone = getattr(net, "backbone", net)
    backbone.checkpointing = args.checkpointing
    if args.compile:
        # The blocks differ in shape, the steps do not: as many variants as there are blocks.
        torch._dynamo.config.recompile_limit = 64
        for block in backbone.list_blocks():
            block.compile(dynamic=False)
    return nn.parallel.DistributedDataParallel(net) if world_size() > 1 else net


def seed_of(stage, seed):
    """The seed of one stage's weights and draws. With one seed for all stages, both teachers would
    share the same initialisation (Algorithm 1, line 6) and see the same crops."""
    return int(rng(seed, *stage.encode()).integers(2**62))


WEAK = dict(area=0.5, jitter=0.2, hue=0.05, jitter_prob=0.5, grey_prob=0.1)  # stages 2 and 3


def warm_up(optimizer, lr, epoch, warmup):
    """The learning rate rises linearly in the first `warmup` epochs (supplement B.2)."""
    if epoch < warmup:
        for group in optimizer.param_groups:
            group["lr"] = lr * (epoch + 1) / warmup


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


class Frames(Dataset):
    """Item (key, ids, positions): (key, i, the clips at these positions, concatenated, bad). i is
    the first of the ids whose video can be decoded, bad is {id: reason} of those before it. If none
    can, there is None in place of the clips. size: of the network's input."""

    def __init__(self, videos, frames, stride, size):
        self.videos = videos
        self.frames = frames
        self.stride = stride
        self.short_side = round(1.25 * size)

    def __getitem__(self, item):
        key, ids, positions = item

        def indices(count):
            return np.concatenate([clip_indices(count, self.frames, self.stride, position)
                                   for position in positions])

        bad = {}
        for i in ids:
            try:
                return key, i, decode_frames(self.videos.path(i), indices, self.short_side), bad
            except DECODE_ERRORS as error:
                bad[i] = f"{type(error).__name__}: {error}"
        return key, ids[0], None, bad

    def loader(self, items, workers, device, ahead=2):
        """An iterator over the items, in order. Each worker decodes `ahead` of them in advance."""
        return iter(DataLoader(
            self, batch_size=None, sampler=items, num_workers=workers,
            prefetch_factor=ahead if workers else None, pin_memory=device.type == "cuda",
            worker_init_fn=leave_ctrl_c_to_parent))


def leave_ctrl_c_to_parent(_worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Videos that a batch draws from: their ids, and how many of them are in a batch, over all
# processes. If cycle, they are reshuffled whenever all were used, and a batch may hold one twice;
# if not, an epoch is one pass over them, and its remainder is dropped.
Pool = namedtuple("Pool", "ids batch cycle")

# The frames of each video, uint8 (T, H, W, 3) on the device; its id; and its key (pool, lap, id).
# The key and the seed determine all random draws for the video.
Batch = namedtuple("Batch", "videos ids keys")


@functools.lru_cache(maxsize=8)
def shuffled(seed, pool, lap, count):
    return rng(seed, pool, lap).permutation(count)


class Batches:
    """The videos of each training step. They depend only on (seed, epoch, step), so any number of
    workers gives the same videos, and a run that resumes needs no state.

    steps: of an epoch. frames: of each video. In place of a video that cannot be decoded comes the
    next of its pool, with its key. UserError if ten in a row cannot, or if there is no step."""

    def __init__(self, videos, pools, steps, frames, seed, args, device):
        self.videos = videos
        self.pools = pools
        self.seed = seed
        self.workers = args.workers
        self.device = device
        self.unreadable = set()  # ids
        if not steps:
            raise UserError(f"--batch {args.batch} is more than the unlabelled videos of a pass")
        print0(f"{steps} steps an epoch")
        self.steps = steps
        self.share = sum(pool.batch for pool in pools) // world_size()
        self.dataset = Frames(videos, frames, args.stride, args.size)

    def items(self, first, last):
        """This process's (key, [id and those that may replace it], [random position]) of the steps
        from `first` to before `last`: a consecutive part of each pool's batch."""
        for step in range(first, last):
            for k, (ids, batch, cycle) in enumerate(self.pools):
                length = len(ids) if cycle else self.steps * batch
                share = batch // world_size()
                start = step * batch + rank() * share
                for p in range(start, start + share):
                    lap, place = divmod(p, length)
                    i = shuffled(self.seed, k, lap, len(ids))[place]
                    ids_to_try = [int(ids[(i + n) % len(ids)]) for n in range(10)]
                    key = k, lap, ids_to_try[0]
                    yield key, ids_to_try, [rng(self.seed, *key).random()]

    def stream(self, first, last):
        """This process's Batch of each step of the run, from `first` to before `last`."""
        ahead = max(2, math.ceil(2 * self.share / max(1, self.workers)))  # two batches
        loader = self.dataset.loader(self.items(first, last), self.workers, self.device, ahead)
        for step in range(first, last):
            batch = Batch([], [], [])
            for key, i, frames, bad in itertools.islice(loader, self.share):
                for j in bad.keys() - self.unreadable:
                    self.unreadable.add(j)
                    print(f"warning: {self.videos.path(j)}: {bad[j]}; another video replaces it",
                          file=sys.stderr)
                if frames is None:
                    raise UserError(f"{self.videos.path(i)} and the next {len(bad) - 1} cannot be "
                                    "decoded: repair or remove them")
                batch.videos.append(frames.to(self.device, non_blocking=True))
                batch.ids.append(i)
                batch.keys.append(tuple(key))  # data loaders make lists of tuples
            place = divmod(step, self.steps)
            torch.manual_seed(rng(self.seed, *place, rank()).integers(2**63))  # of dropout
            yield batch


FREE_ARGUMENTS = {  # those that may change between a run and its continuation
    "out", "root", "pretrained", "epochs", "workers", "device", "checkpointing", "compile",
    "restart", "save_every"}

# While weights change, BatchNorm's running statistics lag behind. On dark videos a network
# had 71 % accuracy in train mode and 25 % in eval mode. So weights are frozen at the end.
RECALIBRATION = 30  # steps, but at most a tenth of the run


class State:
    """What the checkpoint OUT/NAME.pt of a run holds. Where it exists, the run resumes from it.

    made_from: {name: content} of the checkpoints with which the run starts. labeled: ids. modules:
    by their names in the checkpoint, what has a state_dict: model, optimizer, scheduler and, in
    stage 1, head. UserError if another command made the checkpoint, or if what it was made from has
    changed."""

    def __init__(self, stage, args, batches, made_from, labeled=(), **modules):
        self.args = args
        self.batches = batches
        self.modules = modules
        self.path = Path(args.out) / f"{args.name}.pt"
        labeled_names = [batches.videos.names[i] for i in labeled]
        self.metadata = {
            "stage": stage,
            "arch": args.arch,
            "classes": batches.videos.classes,
            "labeled": labeled_names,
            "made_from": {
                "the set of classes": set_digest(batches.videos.classes),
                "the set of labelled videos": set_digest(labeled_names),
                "the set of training videos": video_digest(batches.videos),
                **{name: weight_digest(saved) for name, saved in made_from.items()},
            },
        }
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the current epoch
        self.sums = Counter()  # of the numbers of these steps, on the device
        self.log = [json.dumps(describe_command())]  # lines of OUT/NAME.log
        self.finished = False
        self.steps_in_run = args.epochs * batches.steps
        self.recalibration = min(RECALIBRATION, self.steps_in_run // 10)
        self.saved_at = self.file_time()
        # torchrun gives a run that it restarts the same arguments.
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        for name in made_from:
            if self.path.exists() and os.path.exists(name) and os.path.samefile(name, self.path):
                raise UserError(f"--init {name} is the file that this run writes: another --out")
        if self.path.exists() and not (args.restart and first_start):
            self.resume()
        self.stream = batches.stream(self.steps_done(), self.steps_in_run)

    def resume(self):
        saved = read_checkpoint(self.path, finished=False)
        made_with = {"stage": saved.get("stage"), **saved.get("args", {})}
        for key, value in {"stage": self.metadata["stage"], **vars(self.args)}.items():
            if key not in FREE_ARGUMENTS and made_with.get(key) != value:
                raise UserError(f"{self.path} was made with {key} {made_with.get(key)}, not "
                                f"{value}: give the same, --restart or another --out")
        for name, digest in self.metadata["made_from"].items():
            if digest != saved["made_from"].get(name):
                raise UserError(f"{name} has changed since {self.path} was begun: --restart, or "
                                "another --out")
        self.epoch = saved["epoch"]
        self.step = saved["step"]
        least = self.epoch + math.ceil((self.step + RECALIBRATION) / self.batches.steps)
        least = min(least, saved["args"]["epochs"])
        if self.args.epochs < least and self.steps_left() < self.recalibration:
            raise UserError(f"--epochs {self.args.epochs}: {self.path} has {self.epoch} epochs, "
                            f"give {least} or more (the last steps freeze the weights)")
        for name, module in self.modules.items():
            module.load_state_dict(saved[name])
        self.sums = Counter(saved["sums"])
        self.log = saved["log"]
        self.finished = saved["finished"] and self.epoch == self.args.epochs
        print0(f"{self.path}: " + ("finished" if self.finished else "resuming"),
               f"at epoch {self.epoch}, step {self.step}")

    def steps_done(self):
        return self.epoch * self.batches.steps + self.step

    def steps_left(self):
        return self.steps_in_run - self.steps_done()

    def steps(self):
        """The batches that are left of the current epoch. A bar shows the time left of the run."""
        if not self.steps_done():
            self.write_log()  # so that a folder that cannot be written is found before training
            if self.args.restart:
                self.save()  # so that the same command without --restart goes on from here
        self.since = time.perf_counter()
        with tqdm(total=self.steps_in_run, initial=self.steps_done(), leave=False,
                  desc=f"{self.args.name}: epoch {self.epoch + 1}/{self.args.epochs}",
                  disable=True if rank() else None) as bar:
            while self.step < self.batches.steps:
                begin = time.perf_counter()
                batch = next(self.stream)
                self.sums["waiting"] += time.perf_counter() - begin
                self.sums["unreadable"] += sum(
                    i != key[-1] for i, key in zip(batch.ids, batch.keys))
                self.step += 1
                yield batch
                bar.update()

    def add(self, clips, **terms):
        """Note a step's number of clips and its loss terms, scalars. They stay on the device."""
        self.sums["clips"] += clips
        for name, term in terms.items():
            self.sums[name] += term.detach().double()

    def read_sums(self):
        """Average the sums over the processes, as numbers. Stops the run if one is not finite."""
        self.sums["seconds"] += time.perf_counter() - self.since
        self.since = time.perf_counter()
        device = self.batches.device
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device)
                              for value in self.sums.values()]) / world_size()
        if world_size() > 1:
            dist.all_reduce(values)
        self.sums = Counter(dict(zip(self.sums, values.tolist())))
        if not values.isfinite().all():
            keep = f"--init {self.path} and another --out in stage 1, or "
            sys.exit(f"a loss is not finite in epoch {self.epoch + 1}: a smaller --lr or "
                     f"--precision fp32 with {keep * self.path.exists()}--restart")

    def end_epoch(self):
        """Print and log the means of an epoch's numbers -> those of the loss terms."""
        self.read_sums()
        clips, waiting, seconds, unreadable = (
            self.sums.pop(name) for name in ("clips", "waiting", "seconds", "unreadable"))
        means = {name: value / self.step for name, value in self.sums.items()}
        self.epoch += 1
        self.step = 0
        self.sums = Counter()
        line = {
            "epoch": self.epoch,
            **{name: round(value, 6) for name, value in means.items()},
            "lr": self.modules["optimizer"].param_groups[0]["lr"],
            "seconds": round(seconds, 2),
            "clips_per_s": round(clips * world_size() / seconds, 2),
            "waiting_share": round(waiting / seconds, 4),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "unreadable": round(unreadable * world_size()),
        }
        print0(f"{self.args.name}:", ", ".join(f"{k} {v:.4g}" for k, v in line.items()))
        self.log.append(json.dumps(line))
        self.write_log()
        return means

    def write_log(self):
        write_text(self.path.with_suffix(".log"), "\n".join(self.log) + "\n")

    def save(self):
        """Write the checkpoint. UserError if another run has written it meanwhile."""
        if self.step:
            self.read_sums()
        if rank() == 0:
            content = {
                **self.metadata,
                "args": vars(self.args),
                "epoch": self.epoch,
                "step": self.step,
                "sums": dict(self.sums),
                "log": self.log,
                "finished": self.finished,
                **{name: module.state_dict() for name, module in self.modules.items()},
            }
            path = self.path
            if self.file_time() not in (None, self.saved_at):
                path = path.with_suffix(".pt.other")
            write_atomically(path, lambda file: torch.save(content, file))
            if path != self.path:
                raise UserError(f"another run writes {self.path}: the state of this one is in "
                                f"{path}, give each its own --out")
            self.saved_at = self.file_time()
        barrier()

    def file_time(self):
        return self.path.stat().st_mtime_ns if self.path.exists() else None

    def finish(self, **passed_on):
        """Write the checkpoint that the next stage reads, with what else it needs."""
        self.metadata |= passed_on
        self.finished = True
        self.save()
        print0(f"wrote {self.path}")


def describe_command():
    """The first line of a log: the command, the commit of this code, versions."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):  # without git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, av, np)}
    return {"command": " ".join(sys.argv), "commit": commit, **versions}


def write_atomically(path, write):
    """Call write(file) on a new file that then, whole, takes the place of `path`, or UserError."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written, the old file is unchanged: {error}") from error


def write_text(path, text):
    """write_atomically for text, in the first process only."""
    if rank() == 0:
        write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def read_checkpoint(path, folder="", stages=(), finished=True):
    """What torch.save has written to a file: a dict, tensors on the CPU. No code of it runs.

    path: a file name is looked up in `folder`. stages: those that may have written it (None:
    another program). UserError if it is damaged, of another stage, or not `finished`."""
    if not os.path.dirname(path):
        path = os.path.join(folder, path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        stage = saved.get("stage")
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # bytes that are no checkpoint make torch raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: damaged, or no checkpoint ({reason})") from None
    if stages and stage not in stages:
        raise UserError(f"{path}: found a checkpoint of {stage or 'another program'}, expected one "
                        f"of {' or '.join(filter(None, stages))}")
    if stage and not {"made_from", "args"} <= saved.keys():
        raise UserError(f"{path}: made by another version of this code")
    if stage and finished and not saved["finished"]:
        raise UserError(f"{path}: unfinished (epoch {saved['epoch']} of {saved['args']['epochs']}),"
                        " the command that began it goes on")
    return saved


def order_teachers(teachers):
    """Teachers' checkpoints, {name: content}, the invariant one first, whatever their names."""
    return dict(sorted(teachers.items(),
                       key=lambda item: item[1].get("pretrained_by") != "pretrain_inv"))


def fit_tstr(teachers):
    """Whether the checkpoints are an invariant and a distinctive teacher's, in this order."""
    kinds = [saved.get("pretrained_by") for saved in teachers.values()]
    return kinds == ["pretrain_inv", "pretrain_dist"]


def start_from(model, path, saved):
    """Give a model the weights of a checkpoint's content, all but the classifier's."""
    try:
        load_backbone(model, saved)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    print0(f"initial weights from {path}")


def load_classifier(saved, device):
    """The classifier of a checkpoint's content, in eval mode, without gradient."""
    model = build_model(saved["arch"], len(saved["classes"]))
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last_3d).requires_grad_(False).eval()


# ==== Passes over videos, and arguments ===========================================================
def training_videos(args):
    """The training videos of --data, all labels hidden."""
    videos = read_training_videos(args)
    videos.mask_labels()
    return videos


def labeled_and_all_videos(args, teachers={}):
    """Sorted ids of the labelled videos, and all training videos, with no label but theirs.

    teachers: {name: content} of the checkpoints that were fine-tuned on them."""
    videos = read_training_videos(args)
    if teachers:
        labeled = find_labeled(videos, teachers)
    elif args.labeled_list:
        labeled = read_labeled_list(args.labeled_list, videos)
    else:
        labeled = labeled_subset(videos.names, videos.labels, args.percent or 100,
                                 args.subset_seed, args.per_class)
    if not len(labeled):
        raise UserError(f"{videos.folder}: no video has a class, so none can have a label")
    videos.mask_labels(keep=labeled)
    counts = np.bincount(videos.labels[labeled], minlength=len(videos.classes))
    digest = set_digest([videos.names[i] for i in labeled])
    print0(f"{len(labeled)} of {len(videos)} training videos have a label: {counts.min()} to "
           f"{counts.max()} in each of {len(counts)} classes, set {digest}")
    return labeled, videos


def read_training_videos(args):
    """The training videos with all labels, for this file alone. Renders toy if it is missing."""
    if args.data == "toy":
        if rank() == 0:
            render_toy(args.root)
        barrier()
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
    ids = {name: i for i, name in enumerate(videos.names)}
    if absent := [name for name in names if name not in ids]:
        raise UserError(f"{videos.folder}: without {len(absent)} of the teachers' labelled videos, "
                        f"such as {absent[0]}")
    return np.array([ids[name] for name in names])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def map_videos(function, dataset, positions, workers, device, title, show=None):
    """Apply a function to the clips at `positions` of each video of a Frames, concatenated: uint8
    (T, H, W, 3) on the device. Each process takes its share of the videos.

    show(id, result) is called for each of this process's videos as soon as it is done; result is
    None if the video cannot be decoded. Returns {id: result} of all others, on the CPU."""
    videos = dataset.videos
    ids = range(rank(), len(videos), world_size())
    items = dataset.loader([(None, [i], positions) for i in ids], workers, device)
    results = {}
    for _, i, frames, bad in tqdm(items, desc=title, total=len(ids), leave=False,
                                  disable=True if rank() else None):
        if frames is not None:
            results[i] = function(frames.to(device)).cpu()
        elif show:  # else it was named before
            tqdm.write(f"warning: {videos.path(i)}: {bad[i]}", file=sys.stderr)
        if show:
            show(i, results.get(i))
    if world_size() > 1:
        # One tensor per process: pickling one for each of 240,000 videos takes most of a minute.
        everyone = [None] * world_size()
        stacked = torch.stack(list(results.values())) if results else ()
        dist.all_gather_object(everyone, (list(results), stacked))
        results = {i: row for numbers, rows in everyone for i, row in zip(numbers, rows)}
    return dict(sorted(results.items()))


def matrices_for_tstr(embedder, videos, args, device):
    """What stage 1 passes on to stage 3: C of the training videos, by compare_clips."""
    if world_size() > 1:
        for buffer in embedder.buffers():  # on CPUs each process has its own BatchNorm statistics
            dist.broadcast(buffer, 0)
    rows = compare_clips(embedder, videos, args, device)
    if absent := [name for i, name in enumerate(videos.names) if i not in rows]:
        print0(f"{len(absent)} videos cannot be decoded, such as {absent[0]}: they get s = 0.5")
    return {
        "similarity_names": [videos.names[i] for i in rows],
        "similarity": torch.stack(list(rows.values())),
    }


def compare_clips(embedder, videos, args, device):
    """C of Eq. 5 of each video, {id: (n, n)}, by a network of stage 1 before fine-tuning (Algorithm
    1, line 16), from args.clips consecutive clips in its middle, centre crop, eval mode."""
    def similarity(video):
        clips = [centre_crop(clip, args.size) for clip in video.split(args.frames)]
        with autocast(args, device):
            z = embedder(to_input(torch.stack(clips), embedder.backbone))  # (n, 128)
        return temporal_similarity(z[None])[0]

    embedder.eval()
    dataset = Frames(videos, args.clips * args.frames, args.stride, args.size)
    return map_videos(similarity, dataset, [0.5], args.workers, device, "similarity")


def recipe(data, stage):
    """The defaults that depend on the stage, by its name in the checkpoint, or on the data set."""
    ssl = stage.startswith("pretrain")
    settings = {
        "data": data,
        "root": f"data/{data}",
        "percent": {"ucf101": 5, "hmdb51": 40, "toy": 6, "folder": 100}.get(data, 10),
        "frames": 16 if ssl else 8,
        "stride": 1 if ssl else 2,
        "epochs": 150 if not ssl else 100 if data == "kinetics400" else 250,
        "batch": 40 if ssl else 16,
    }
    if data == "toy":
        settings |= {
            "frames": 16,
            "stride": 1,
            "size": 24,
            "arch": "r3d_tiny",
            "epochs": {"pretrain_inv": 14, "pretrain_dist": 5, "student": 13}.get(stage, 150),
            "batch": 10 if ssl else 16,
            "lr": 3e-3 if ssl else 1e-3,
            "warmup": 2,
            "patience": 25,  # an epoch has few steps
            "precision": "fp32",  # measured faster than bf16 on a CPU with AMX, at this size
        }
    return settings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is, and the default of each flag that has one."""

    def _get_help_string(self, action):
        unknown = action.default is None or action.default is False
        return action.help if unknown else super()._get_help_string(action)


def new_parser(description):
    """With the flags of all five scripts. A mistake is one line: no usage before it."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter,
                                     usage=argparse.SUPPRESS)
    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=ranged(int, 0), default=min(16, max(1, cores - 1)),
        help="processes that decode videos")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--precision", choices=("bf16", "fp32"),
        help="bf16 autocast or float32; if not given, bf16 where the hardware has it")
    return parser


def stage_parser(stage, description):
    """The flags of all training stages, with the paper's settings; recipe() has the others."""
    ssl = stage.startswith("pretrain")
    count = ranged(int, 1)
    from_0 = ranged(int, 0)
    parser = new_parser(description)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", choices=TREES, help="data set; toy is rendered if it is missing")
    add("--root", metavar="DIR", help="folder of the data set")
    add("--split", type=ranged(int, 1, 3), default=1, help="official split of ucf101 and hmdb51")
    add("--pool", choices=("train", "all"), default="train",
        help="training videos of hmdb51: the split's, or all but the test videos")
    if not ssl:
        add_one = data.add_mutually_exclusive_group().add_argument
        add_one("--percent", type=ranged(float, 1e-3, 100), metavar="P",
                help="labelled share of each class in %%")
        add_one("--per-class", type=count, metavar="N",
                help="labelled videos of each class, instead of --percent")
        add_one("--labeled-list", metavar="FILE",
                help="a published list of the labelled videos, instead of --percent")
        add("--subset-seed", type=from_0, default=0,
            help="chooses which videos are labelled; --seed does not")

    add = parser.add_argument_group("clips").add_argument
    if ssl:
        add("--clips", type=ranged(int, 2), default=4, metavar="N",
            help="consecutive clips per video, n")
    add("--frames", type=count, help="frames per clip")
    add("--stride", type=count, help="distance of two frames of a clip, in frames of the video")
    add("--size", type=ranged(int, 16), default=224, metavar="PIXELS",
        help="width and height of the network's input")
    add("--no-flip", action="store_true",
        help="do not mirror clips: for classes that differ by left and right")

    add = parser.add_argument_group("training").add_argument
    add("--arch", choices=ARCHS, default="slow_r50", help="network")
    add("--epochs", type=count, help="passes over the videos")
    add("--batch", type=count, metavar="VIDEOS", help="videos per step, over all processes (in "
        "stage 3: labelled ones, and as many unlabelled ones)")
    add("--lr", type=ranged(float, 0), default=1e-3, help="learning rate of Adam")
    add("--warmup", type=from_0, default=10, metavar="EPOCHS",
        help="first epochs, in which the learning rate rises linearly to --lr")
    add("--patience", type=from_0, default=5, metavar="EPOCHS",
        help="the learning rate is halved after more than so many epochs without a lower loss")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="folder of checkpoints and logs")
    add("--seed", type=from_0, default=0,
        help="seed of initial weights, order of videos and augmentation")
    add("--save-every", type=count, default=500, metavar="STEPS",
        help="steps between two checkpoints")
    add("--restart", action="store_true", help="start from scratch, even if there is a checkpoint")
    add("--checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, up to a third more time")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster on GPUs")
    return parser


# What stages 2 and 3 take from the checkpoints they read, if no flag says otherwise.
INHERITED = {"finetune": ("data", "root", "split", "pool", "arch", "size", "no_flip")}
SUBSET = ("percent", "per_class", "labeled_list")  # one of them chooses the labelled videos
INHERITED["student"] = (*INHERITED["finetune"], "frames", "stride", *SUBSET, "subset_seed")


def start(parser, stage, argv, earlier=None):
    """Parse the flags and join torchrun's processes -> args, device and {name: content} of the
    checkpoints from which the stage starts.

    A setting is what its flag says, else these checkpoints, else recipe(), else the parser's
    default. earlier: from the flags and OUT to the checkpoints' names, their folder and the stages
    that may have written them. UserError if a flag contradicts a checkpoint that cannot follow."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    words = [word for word in argv if word not in ("-h", "--help")]
    args = parser.parse_args(words)
    device = prepare(args)
    out = args.out or f"runs/{args.data or 'toy'}"
    checkpoints = {}
    if earlier and words == argv:
        names, folder, stages = earlier(args, out)
        checkpoints = {name: read_checkpoint(name, folder, stages)
                       for name in names if name != "none"}
    # Of each checkpoint of ours, its settings that go on to this stage.
    made_with = {name: {k: v for k, v in saved["args"].items() if k in INHERITED[stage]}
                 for name, saved in checkpoints.items() if saved.get("stage")}
    taken = {key: value for made in made_with.values() for key, value in made.items()}
    defaults = {"precision": default_precision(args.device)}
    defaults |= recipe(args.data or taken.get("data", "toy"), stage) | taken | {"out": out}
    if any(getattr(args, key, None) for key in SUBSET):
        defaults = {key: value for key, value in defaults.items() if key not in SUBSET}
    parser.set_defaults(**{key: value for key, value in defaults.items() if key in args})
    args = parser.parse_args(argv)  # --help ends here

    for name, made in made_with.items():
        for key in INHERITED[stage]:
            if key in made and getattr(args, key) not in (None, made[key]):
                flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
                if key in ("arch", *SUBSET, "subset_seed"):
                    raise UserError(f"{flag} contradicts {name}, made with {made[key]}")
                print0(f"{flag} in place of {made[key]}, of {name}")
    large_r3d = args.arch.startswith("r3d") and args.size > 112
    if args.device == "cpu" and args.precision == "bf16" and (
            large_r3d or default_precision("cpu") == "fp32"):
        raise UserError(f"{args.arch} at --size {args.size} needs --precision fp32 on this CPU: "
                        "oneDNN's gradients in bf16 are wrong there")
    if args.batch % world_size():
        raise UserError(f"--batch {args.batch} cannot be shared among {world_size()} processes: "
                        "choose a multiple")
    words = []
    for key, value in vars(args).items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value] * (value is not True)
            words += ["--" + key.replace("_", "-"), *map(str, values)]
    print0("settings:", shlex.join(words))
    return args, device, checkpoints


def prepare(args):
    """Join torchrun's processes, if there are any -> device."""
    # glibc returns large blocks and faults them in again in every step: it should keep them.
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        store, place, size = next(dist.rendezvous("env://"))
        # After a restart the store still holds the addresses of the dead processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        # Processes wait for the slowest one's part of a pass over all videos, and for rank 0.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=place, world_size=size,
            timeout=timedelta(hours=2), device_id=device if device.type == "cuda" else None)
        if place:
            warnings.simplefilter("ignore")  # the first process tells them
    return device


def default_precision(device):
    """bf16 where the hardware has it, rather than emulates it, and is right (of CPUs those with
    AMX, docs/performance.md), else fp32."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def ranged(kind, least, most=math.inf):
    """An argparse type: an int or a float, from `least` to `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {least} to {most}")
    return parse
