"""TimeBalance (Dave et al., CVPR 2023, arXiv 2303.16268): what the five stages share.

Losses - TSTR - models - data - toy videos - distributed - optimisation - checkpoints - evaluation - arguments.
The method comes first and takes tensors, paths and plain numbers alone: any function or class above "distributed" can
be copied into other code with the few names that it calls."""

import argparse
import contextlib
import functools
import hashlib
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
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ---- Losses ----------------------------------------------------------------------------------------------------------
def cosine_similarity(a, b):
    """Sim(., .) of Eq. 5 and tau * log h(., .) of Eq. 1-3 for all pairs: (..., n, d), (..., m, d) -> (..., n, m).

    In float32 inside autocast too: in bfloat16 a cosine of 0.9 is off by 0.002, which 1 / tau multiplies by ten."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)


def check_clips(z, other=None):
    """ValueError unless z is (B, n >= 2, d) and `other`, where given, of the same shape."""
    shapes = [tuple(t.shape) for t in (z, other) if t is not None]
    if len(set(shapes)) > 1 or z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"expected (videos, clips >= 2, dimensions), one shape, got {shapes}")


def invariant_loss(z, temperature=0.1):
    """L_I, Eq. 1: clips of one video agree, clips of different videos do not.

    z: (B, n, d), n >= 2 clips of each of B >= 2 videos, of any norm. Returns a scalar: the mean over the ordered pairs
    of clips of one video, which is the paper's sum up to a factor B * n * (n - 1). ValueError for other shapes.

    Eq. 1 as printed: the indicator covers the first term of the denominator alone. So the anchor z[i, t1] meets clip t1
    of the other videos, and clip t2 of every video; the latter's j = i is the positive."""
    check_clips(z)
    B, n, _ = z.shape
    if B < 2:
        raise ValueError("Eq. 1 takes its negatives from other videos: a batch needs at least two")
    logits = cosine_similarity(z.flatten(0, 1), z.flatten(0, 1)).view(B, n, B, n) / temperature  # i, t1, j, t2
    same_video = torch.eye(B, dtype=torch.bool, device=z.device)
    same_clip = torch.eye(n, dtype=torch.bool, device=z.device)
    positive = logits.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # i, t1, t2
    at_t1 = logits.diagonal(dim1=1, dim2=3).masked_fill(same_video[:, :, None], -torch.inf).logsumexp(1)  # i, t1
    at_t2 = logits.logsumexp(2)  # i, t1, t2
    loss = torch.logaddexp(at_t1[:, :, None], at_t2) - positive
    return loss.masked_fill(same_clip, 0).sum() / (B * n * (n - 1))


def distinctive_loss(z, z_aug, temperature=0.1):
    """L_D1, Eq. 3: a clip agrees with its other augmentation, not with the video's other clips.

    z, z_aug: (B, n, d), the same n >= 2 clips of B videos under two augmentations, of any norm. Returns a scalar: the
    mean over the 2 * B * n anchors. ValueError for other shapes.

    The negatives of an anchor are the other timestamps of its own video in both augmentations. Two readings of Eq. 3:
    its denominator also holds the positive (as printed, without it, the loss has no lower bound), and a clip of either
    augmentation serves as anchor."""
    check_clips(z, z_aug)
    B, n, _ = z.shape
    views = torch.cat([z, z_aug], 1)  # (B, 2n, d)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (cosine_similarity(views, views) / temperature).masked_fill(itself, -torch.inf)
    positive = torch.arange(2 * n, device=z.device).roll(n)  # the same clip in the other augmentation
    return F.cross_entropy(logits.flatten(0, 1), positive.repeat(B))


def unpooled_distinctive_loss(z_local, z_global, temperature=0.1):
    """L_D2, supplement D.2 (the local-global loss of TCLR): short clip t agrees with slice t of the long clip.

    z_local: (B, n, d), the n >= 2 short clips of B videos, pooled over time. z_global: (B, n, d), the n temporal slices
    of the long clip that spans them. Of any norm. Returns a scalar: InfoNCE over the video's n slices for each clip and
    over its n clips for each slice, mean over both and over videos. ValueError for other shapes."""
    check_clips(z_local, z_global)
    B, n, _ = z_local.shape
    logits = cosine_similarity(z_local, z_global) / temperature  # B, clip, slice
    aligned = torch.arange(n, device=logits.device).expand(B, n)
    return (F.cross_entropy(logits, aligned) + F.cross_entropy(logits.transpose(1, 2), aligned)) / 2


def distillation_loss(p_student, p_teacher, kind="l2"):
    """L_unsup, Eq. 8 ("l2"), and the two other teacher losses of supplement C.1, in natural logarithms.

    p_student, p_teacher: (B, C) probabilities. Returns a scalar: the sum over classes of the squared difference ("l2"),
    KL(teacher || student) ("kl") or the Jensen-Shannon divergence ("js"), mean over the batch. Probabilities under 1e-8
    count as 1e-8 inside logarithms: one-hot vectors have finite gradients. ValueError for other shapes or kinds."""
    if p_student.ndim != 2 or p_student.shape != p_teacher.shape:
        raise ValueError(f"expected two (B, C), got {tuple(p_student.shape)} and {tuple(p_teacher.shape)}")
    p_student, p_teacher = p_student.float(), p_teacher.float()

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


# ---- Temporal similarity based teacher reweighting (TSTR, Sec. 3.2) --------------------------------------------------
def temporal_similarity(z):
    """C, Eq. 5: (B, n, d) representations of n clips of B videos -> (B, n, n) cosine similarities between the clips."""
    check_clips(z)
    return cosine_similarity(z, z)


def similarity_score(c_inv, c_dist):
    """s, Eq. 6: the mean of the off-diagonal elements of both teachers' (B, n, n) matrices -> (B,), clamped to [0, 1].

    A cosine can be negative, a weight cannot: hence the clamp, which the paper leaves open."""
    check_clips(c_inv, c_dist)
    n = c_inv.shape[1]
    diagonal = torch.eye(n, dtype=torch.bool, device=c_inv.device)
    total = (c_inv.float() + c_dist.float()).masked_fill(diagonal, 0).sum((1, 2))
    return (total / (2 * n * (n - 1))).clamp(0, 1)


def combine_teachers(p_inv, p_dist, score):
    """p_T, Eq. 7: (B, C) and (B, C) class probabilities weighted by score (B,) and 1 - score -> (B, C)."""
    if p_inv.ndim != 2 or p_inv.shape != p_dist.shape or score.shape != p_inv.shape[:1]:
        raise ValueError(f"expected (B, C), (B, C), (B,), got {[tuple(t.shape) for t in (p_inv, p_dist, score)]}")
    return score[:, None] * p_inv + (1 - score)[:, None] * p_dist


# ---- Models ----------------------------------------------------------------------------------------------------------
class Backbone(nn.Module):
    """What both networks share: their parts(), stem and residual blocks one after the other, make the features."""

    def features(self, x):
        """(B, 3, T, H, W) -> (B, D, T'), pooled over space only."""
        for part in self.parts():
            x = part(x)
        return x.mean((3, 4))

    def initialise(self, mean, std):
        """torchvision's and PyTorchVideo's initial weights; mean, std: theirs expect RGB in [0, 1] so normalised."""
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


class R3D(Backbone):
    """torchvision's r3d_18, key for key and shape for shape, except that layer4 keeps the time axis.

    Its first convolution and its downsampling have no temporal stride, the convolution a temporal dilation of 2
    instead: 16 frames leave T' = 4 time steps, which L_D2 needs. r3d_18 has width 64 and 2 blocks a layer."""

    def __init__(self, num_classes, width=64, depth=2):
        super().__init__()

        def layer(dim_in, dim_out, stride):
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv3d(dim_in, dim_out, 1, stride, bias=False), nn.BatchNorm3d(dim_out))
            first = BasicBlock(dim_in, dim_out, Conv3DSimple, stride, shortcut)
            return nn.Sequential(first, *(BasicBlock(dim_out, dim_out, Conv3DSimple) for _ in range(depth - 1)))

        stem = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.layer4 = layer(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)
        conv, shortcut = self.layer4[0].conv1[0], self.layer4[0].downsample[0]
        conv.stride, conv.dilation, conv.padding, shortcut.stride = (1, 2, 2), (2, 1, 1), (2, 1, 1), (1, 2, 2)
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
        padding = temporal_kernel // 2
        self.branch2 = nn.Sequential(OrderedDict(
            conv_a=nn.Conv3d(dim_in, dim_inner, (temporal_kernel, 1, 1), padding=(padding, 0, 0), bias=False),
            norm_a=nn.BatchNorm3d(dim_inner), act_a=nn.ReLU(inplace=True),
            conv_b=nn.Conv3d(dim_inner, dim_inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            norm_b=nn.BatchNorm3d(dim_inner), act_b=nn.ReLU(inplace=True),
            conv_c=nn.Conv3d(dim_inner, dim_out, 1, bias=False), norm_c=nn.BatchNorm3d(dim_out)))
        nn.init.zeros_(self.branch2.norm_c.weight)

    def forward(self, x):
        shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return F.relu(shortcut + self.branch2(x))


class SlowR50(Backbone):
    """PyTorchVideo's slow_r50 (3D-ResNet-50 of the paper), key for key and number for number, for any input size.

    No temporal stride anywhere, temporal kernels of 3 in the last two stages only."""

    def __init__(self, num_classes):
        super().__init__()
        stem = nn.Sequential(OrderedDict(
            conv=nn.Conv3d(3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), norm=nn.BatchNorm3d(64),
            activation=nn.ReLU(inplace=True), pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))))
        stages, dim_in = [], 64
        for depth, inner, kernel, stride in [(3, 64, 1, 1), (4, 128, 1, 2), (6, 256, 3, 2), (3, 512, 3, 2)]:
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(Bottleneck(dim_in, inner, 4 * inner, kernel, stride if i == 0 else 1))
                dim_in = 4 * inner
            stages.append(nn.Sequential(OrderedDict(res_blocks=blocks)))
        head = nn.Sequential(OrderedDict(dropout=nn.Dropout(0.5), proj=nn.Linear(dim_in, num_classes)))
        self.blocks = nn.Sequential(stem, *stages, head)
        self.initialise(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))

    def parts(self):
        return [self.blocks[0], *(block for stage in self.blocks[1:-1] for block in stage.res_blocks)]

    def forward(self, x):
        return self.blocks[-1](self.features(x).mean(2))


ARCHS = {"r3d_18": R3D, "slow_r50": SlowR50, "r3d_tiny": functools.partial(R3D, width=16, depth=1)}
CLASSIFIERS = ("fc.", "blocks.5.proj.")  # the keys under which the classifier's weights lie


def build_model(arch, num_classes):
    """A classifier of clips, (B, 3, T, H, W) -> logits (B, num_classes), with .features(x) -> (B, D, T').

    arch: r3d_18 (D = 512, T' = T / 4), slow_r50 (D = 2048, T' = T), or r3d_tiny, an r3d of a quarter of the width and
    half the depth (D = 128). The state dict has torchvision's or PyTorchVideo's keys. ValueError for other names."""
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: {', '.join(ARCHS)}")
    return ARCHS[arch](num_classes)


class ProjectionHead(nn.Sequential):
    """g, supplement B.1.2: (B, dim) clip features -> (B, 128) of unit length."""

    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True),
                         nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128))

    def forward(self, x):
        return F.normalize(super().forward(x).float(), dim=-1)


class Embedder(nn.Module):
    """g(f(x)): a backbone of build_model and its projection head in one module, as DistributedDataParallel needs it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        classifier, = (p for name, p in backbone.named_parameters() if name.startswith(CLASSIFIERS) and p.ndim == 2)
        self.head = ProjectionHead(classifier.shape[1])
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(not name.startswith(CLASSIFIERS))  # no part of the self-supervised stage

    def forward(self, clips, num_long=0, slices=1):
        """clips: (N, 3, T, H, W), the last `num_long` of them long clips -> (N - num_long + num_long * slices, 128).

        A row for each clip, pooled over time, then `slices` rows for each long clip, one for each temporal slice of its
        features. All pass the head together, so its BatchNorm sees one batch."""
        f = self.backbone.features(clips)  # (N, D, T')
        pooled, unpooled = f.split([len(f) - num_long, num_long])
        unpooled = unpooled.unflatten(2, (slices, -1)).mean(3).transpose(1, 2).flatten(0, 1)  # (num_long * slices, D)
        return self.head(torch.cat([pooled.mean(2), unpooled]))


# ---- Data: exact frames of real files --------------------------------------------------------------------------------
SEEKABLE = {"avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}  # formats with an index, where seeking is exact
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)  # what a damaged file can raise


def open_video(path):
    """An open av container and its first video stream that is not an attached picture, decoded in this thread."""
    # "file:" keeps a name with a colon from being taken for a URL; HMDB51 has metadata that is not UTF-8.
    container = av.open(f"file:{os.fspath(path)}", metadata_errors="ignore")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "NONE"  # the data loader's workers are the threads
            return container, stream
    container.close()
    raise ValueError("no video stream")


def decode_frames(path, indices, short_side=None):
    """Decode frames of a video file by their number in presentation order.

    path: a file of any format that FFmpeg reads.
    indices: frame numbers from 0, in any order, repeated or not; or a function from the number of frames to them. Files
        do not know their number of frames: the function is called with the number of packets, and again with the true
        number where fewer frames come out (HMDB51's files hold a packet too many, truncated files more).
    short_side: scale frames down, never up, to this many pixels on their shorter side.

    Returns torch.uint8 (len(indices), H, W, 3), RGB, upright: what a full decode gives at these numbers. IndexError for
    a frame past the end; av.FFmpegError, OSError or ValueError for a file that cannot be decoded."""
    container, stream = open_video(path)
    with container:
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]  # about 1 ms, decodes nothing
        wanted = [int(i) for i in (indices(len(packets)) if callable(indices) else indices)]
        if min(wanted, default=-1) < 0:
            raise IndexError(f"frames {wanted} asked for")
        # A frame's number is the rank of its timestamp. Not so in AVI with B-frames (XviD and DivX, so much of UCF101
        # and all of HMDB51), whose timestamps are not in order, nor where the file begins in the middle of a group.
        pts = [p.pts for p in packets]
        b_frames_in_avi = container.format.name == "avi" and stream.codec_context.has_b_frames
        starts_clean = packets and None not in pts and packets[0].is_keyframe and pts[0] == min(pts)
        if container.format.name in SEEKABLE and starts_clean and not b_frames_in_avi:
            number = {t: i for i, t in enumerate(sorted(pts))}
            container.seek(max(p.pts for p in packets if p.is_keyframe and number[p.pts] <= min(wanted)), stream=stream)
            frames, _ = pick_frames(((number.get(f.pts), f) for f in decode(container, stream)), wanted, short_side)
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
    """All frames from the current position on. A damaged packet yields none and ends nothing, as in video players."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


def pick_frames(numbered_frames, wanted, short_side):
    """Of (number, frame) pairs in rising order the wanted ones: (uint8 (T, H, W, 3), None if one is missing; count).

    Stops behind the last wanted frame, and at a gap in the numbers: they would not be those of a full decode."""
    places = {}
    for place, number in enumerate(wanted):
        places.setdefault(number, []).append(place)
    out, count, last = None, 0, max(wanted)
    scaler = av.video.reformatter.VideoReformatter()  # for all frames: PyAV's default is one for each, 4 times slower
    for number, frame in numbered_frames:
        if number is None or (count and number != count):
            return None, 0
        count = number + 1
        if number in places:
            if out is None:  # the first frame settles the size, should it change within the file
                height, width, turns = frame.height, frame.width, round(frame.rotation / 90) % 4
                scale = min(1, short_side / min(height, width)) if short_side else 1
                height, width = round(height * scale), round(width * scale)
                out = np.empty((len(wanted), *((width, height) if turns % 2 else (height, width)), 3), np.uint8)
            rgb = scaler.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
            out[places.pop(number)] = np.rot90(rgb, turns) if turns else rgb  # the call takes a tenth of the decoding
        if number == last:
            break
    return (None if places else torch.from_numpy(out)), count


def clip_indices(count, frames, stride=1, position=0.5):
    """Frame numbers of a clip of `frames` frames, `stride` apart, in a video of `count`, looped where it is shorter.

    position: from 0 (the clip begins with the video) to 1 (it ends with it)."""
    slack = max(0, count - (frames - 1) * stride - 1)
    start = min(slack, int(position * (slack + 1)))
    return (start + stride * np.arange(frames)) % count


# ---- Data: the lists of videos, and which of them have labels --------------------------------------------------------
SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


class Videos:
    """The videos of a data set by number: name(i) (its path below `folder`), labels (N,) (-1: not known), classes."""

    def __init__(self, folder, names, labels, classes):
        self.folder, self.labels, self.classes = str(folder), np.array(labels, np.int64), list(classes)
        # One block of bytes. A list of strings would be copied into every worker, as its reference counts change.
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
        """The label firewall: overwrites the labels of all videos but `keep`, so that no later code can read them."""
        self.labels[np.setdiff1d(np.arange(len(self)), keep)] = -1


def list_folder(folder):
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder (--root must hold the data set as the README shows it)")
    return sorted(os.listdir(folder))


def read_lines(path):
    """The lines of a text file, without white space around them and without the empty ones."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_videos(data, root, train, split=1, pool="train"):
    """The training or test videos of a data set as it lies on disk (the README shows the trees), all labels known.

    pool: of hmdb51's training videos, "train" for those of the split, "all" for every one that is not a test video.
    Of `folder`, what lies under unlabeled/ is among the training videos, with label -1. UserError if the lists or over
    5 % of the videos that they name are missing."""
    root = Path(root)
    if data in ("kinetics400", "folder"):
        folder, part = root, "train" if train else "val" if data == "kinetics400" else "test"
        classes = [c for c in list_folder(root / "train") if (root / "train" / c).is_dir()]
        names = [f"{part}/{c}/{file}" for c in classes for file in list_videos(root / part / c)]
        if not train and (odd := {c for c in list_folder(root / part) if (root / part / c).is_dir()} - set(classes)):
            print0(f"warning: {root / part} has classes that {root / 'train'} has not, left out: {', '.join(odd)}")
        if data == "folder" and train:
            names += [os.path.relpath(path, root) for path in walk_videos(root / "unlabeled")]
    elif data == "hmdb51":
        folder, lists, ending = root / "hmdb51_org", root / "testTrainMulti_7030_splits", f"_test_split{split}.txt"
        codes = "2" if not train else "1" if pool == "train" else "01"
        classes = [file.removesuffix(ending) for file in list_folder(lists) if file.endswith(ending)]
        rows = [(c, *line.rsplit(maxsplit=1)) for c in classes for line in read_lines(lists / (c + ending))]
        names = [f"{c}/{file}" for c, file, code in rows if code in codes]
    else:  # ucf101 and toy
        folder, lists = root / "UCF-101", root / "ucfTrainTestlist"
        classes = [line.split()[-1] for line in read_lines(lists / "classInd.txt")]
        names = [line.split()[0] for line in read_lines(lists / f"{'train' if train else 'test'}list0{split}.txt")]
    there = {c: set(os.listdir(folder / c)) for c in {n.rpartition("/")[0] for n in names} if (folder / c).is_dir()}
    missing = [name for name in names if name.rpartition("/")[2] not in there.get(name.rpartition("/")[0], ())]
    if missing:
        report = f"{len(missing)} of {len(names)} listed videos are not in {folder}, such as {', '.join(missing[:3])}"
        if len(missing) > 0.05 * len(names):
            raise UserError(report)
        print0(f"warning: {report}")
        names = sorted(set(names) - set(missing))
    if not names:
        raise UserError(f"{folder}: no {'training' if train else 'test'} videos")
    number = {c: i for i, c in enumerate(classes)}
    labels = [-1 if name.startswith("unlabeled/") else number.get(os.path.basename(os.path.dirname(name)), -1)
              for name in names]
    if data != "folder" and -1 in labels:
        raise UserError(f"{names[labels.index(-1)]}: listed, but its class is not in {lists / 'classInd.txt'}")
    return Videos(folder, names, labels, classes)


def list_videos(folder):
    """The names of the video files in a folder, sorted; none if there is no such folder."""
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file())


def walk_videos(folder):
    """The paths of the video files in a folder and below it, sorted."""
    return sorted(os.path.join(top, name) for top, _, _ in os.walk(folder) for name in list_videos(top))


def labeled_subset(names, labels, percent, seed=0):
    """The deterministic labelled fraction: of each class max(1, round(percent / 100 * its videos)) -> sorted numbers.

    names, labels: of the training videos, in any order; label -1 is no class. Within a class those come first whose
    sha256 of "<seed> <name>" is smallest, so a smaller fraction is part of a larger one."""
    labels, chosen = np.asarray(labels), []
    for c in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == c)
        ranked = sorted(members, key=lambda i: hashlib.sha256(os.fsencode(f"{seed} {names[i]}")).digest())
        chosen += ranked[:max(1, round(percent / 100 * len(members)))]
    return np.array(sorted(chosen), np.int64)


def read_labeled_list(path, videos):
    """The videos of a published list of labelled videos -> sorted numbers.

    A line is a path, perhaps without its ending, and up to two numbers behind it (frames, label). Class and file come
    from the path: classes compare without blanks and underscores, files without their endings. Labels are not trusted,
    lists number classes in different ways; rows that contradict the rest of their class's are counted."""
    def key(name):
        folder, _, file = name.rpartition("/")
        stem = file[:file.rfind(".")] if file.lower().endswith(SUFFIXES) else file
        return folder.rpartition("/")[2].translate({ord(" "): None, ord("_"): None}).lower(), stem

    known = {key(videos.name(i)): i for i in np.flatnonzero(videos.labels >= 0)}
    found, absent, given = set(), [], {}
    for line in read_lines(path):
        splits = [line.rsplit(maxsplit=numbers) for numbers in (2, 1, 0)]
        matches = [s for s in splits if key(s[0]) in known and all(n.isdecimal() for n in s[1:])]
        if matches:
            video = known[key(matches[0][0])]
            found.add(int(video))
            given.setdefault(videos.labels[video], []).append(matches[0][-1] if len(matches[0]) > 1 else None)
        else:
            absent.append(line)
    odd = sum(len(values) - Counter(values).most_common(1)[0][1] for values in given.values())
    if odd:
        print0(f"warning: {path}: the label of {odd} rows contradicts the other rows of their class; paths are used")
    if absent:
        print0(f"warning: {path}: {len(absent)} rows name no training video, such as {absent[0]}")
    if not found:
        raise UserError(f"{path}: names no video of this data set")
    return np.array(sorted(found), np.int64)


def training_videos(args):
    """The training videos of --data, all labels known; those of toy are rendered first where they are missing."""
    if args.data == "toy":
        if rank() == 0:
            render_toy(args.root)
        broadcast(None)  # the others wait for it
    videos = read_videos(args.data, args.root, True, args.split, args.pool)
    print0(f"{len(videos)} training videos of {len(videos.classes)} classes in {videos.folder}")
    return videos


def labeled_of_teachers(teachers, videos):
    """The labelled videos that teachers were fine-tuned on, all others' labels hidden -> sorted numbers."""
    number = {name: i for i, name in enumerate(videos.names())}
    names = next(iter(teachers.values()))["labeled"]
    for name, saved in teachers.items():
        if saved["classes"] != videos.classes or saved["labeled"] != names:
            raise UserError(f"{name} was fine-tuned on different labelled videos, or for other classes")
    if absent := [name for name in names if name not in number]:
        raise UserError(f"{videos.folder}: without {len(absent)} of the teachers' labelled videos, such as {absent[0]}")
    labeled = np.array([number[name] for name in names])
    videos.hide_labels(keep=labeled)
    return labeled


def set_digest(names):
    """Eight hexadecimal digits that tell one set of videos from another."""
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:8]


def choose_labeled(videos, args):
    """Draw or read the labelled videos, hide all other labels, write OUT/labeled.txt -> their sorted numbers."""
    if args.labeled_list:
        labeled = read_labeled_list(args.labeled_list, videos)
    else:
        labeled = labeled_subset(videos.names(), videos.labels, args.percent, args.subset_seed)
    videos.hide_labels(keep=labeled)
    counts = np.bincount(videos.labels[labeled], minlength=len(videos.classes))
    names = [videos.name(i) for i in labeled]
    print0(f"{len(labeled)} of {len(videos)} training videos have a label: {counts.min()} to {counts.max()} in each of "
           f"{len(counts)} classes, set {set_digest(names)}")
    if not counts.all():
        print0("warning: no labelled video of " + ", ".join(videos.classes[c] for c in np.flatnonzero(counts == 0)))
    write_atomically(Path(args.out) / "labeled.txt", lambda file: file.writelines(
        os.fsencode(f"{name} {label}\n") for name, label in zip(names, videos.labels[labeled])))
    return labeled


# ---- Data: the built-in set of toy videos ----------------------------------------------------------------------------
TOY_PATTERNS = {  # repetitive classes are told by what stays: the pattern of an object, of u, v in [-1, 1] over it
    "Stripes": lambda u, v: np.floor(2 * (u + 1)) % 2 == 0,
    "Checker": lambda u, v: (u > 0) == (v > 0),
    "Ring": lambda u, v: np.maximum(np.abs(u), np.abs(v)) > 0.5,
    "Dots": lambda u, v: np.hypot((u + 1) % 1 - 0.5, (v + 1) % 1 - 0.5) < 0.33,
}
TOY_MOVES = {  # composite classes are told by what changes: two movements, one after the other, in two scenes
    "AcrossGrow": ("across", "grow"), "UpSink": ("up", "sink"), "DownShrink": ("down", "shrink"),
    "RiseTurn": ("rise", "turn")}
TOY_COLOURS = np.array([(220, 60, 50), (60, 190, 80)])


def toy_clip(label, rng):
    """One toy video of class number `label` -> uint8 (64 to 96, 40, 56, 3)."""
    height, width, count = 40, 56, int(rng.integers(64, 97))
    patterns, composite = list(TOY_PATTERNS.values()), label >= len(TOY_PATTERNS)
    pattern = patterns[rng.integers(len(patterns)) if composite else label]
    moves = list(TOY_MOVES.values())[label - len(patterns)] if composite else ["swing"]
    cut = int(count * rng.uniform(0.4, 0.6)) if composite else count
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    grounds, scene, colour = [60 + 40 * v / height, 110 + 30 * (u // 8 % 2)], rng.integers(2), rng.integers(2)
    video = []
    for part, (move, length) in enumerate(zip(moves, [cut, count - cut])):
        way, side, turn = np.linspace(-1, 1, length), rng.choice([-1, 1]), np.zeros(length)
        x, y, r = (np.full(length, v) for v in (rng.uniform(20, 36), rng.uniform(16, 24), 11 if composite else 13))
        if move == "swing":
            swing = 8 * np.sin(2 * np.pi * (np.arange(length) / rng.uniform(8, 16) + rng.random()))
            x, y = (x + swing, y) if side > 0 else (x, y + swing)
        elif move in ("across", "rise", "sink"):
            x, y = 28 + 22 * way * side, {"across": y, "rise": 20 - 16 * way, "sink": 20 + 16 * way}[move]
        elif move in ("up", "down"):
            y = 20 + 18 * way * (-1 if move == "up" else 1)
        elif move in ("grow", "shrink"):
            r = 12 + 7 * way * (1 if move == "grow" else -1)
        else:
            turn = np.pi * way * side
        x, y, r, turn = (values[:, None, None] for values in (x, y, r, turn))
        du, dv = (u - x) / r, (v - y) / r
        du, dv = du * np.cos(turn) - dv * np.sin(turn), du * np.sin(turn) + dv * np.cos(turn)
        inside = (np.maximum(np.abs(du), np.abs(dv)) < 1)[..., None]
        figure = np.where(pattern(du, dv)[..., None], TOY_COLOURS[(colour + part) % 2], 245)
        video.append(np.where(inside, figure, grounds[(scene + part) % 2][..., None]))
    return np.concatenate(video).astype(np.uint8)


def render_toy(root, train=400, test=200, seed=0):
    """Write the toy videos as MPEG-4 files in UCF101's layout, unless toy.json says that all are there.

    The frames depend on the seed alone. Every file is complete or absent, so what was begun is finished."""
    root = Path(root)
    settings, done = {"version": 1, "train": train, "test": test, "seed": seed}, root / "toy.json"
    if done.exists():
        if json.loads(done.read_text())["version"] != settings["version"]:
            raise UserError(f"{root} holds toy videos of another version: remove it or choose another --root")
        return
    classes = [*TOY_PATTERNS, *TOY_MOVES]
    names = [f"{c}/v_{c}_g{k // 4 + 1:02}_c{k % 4 + 1:02}.avi" for k in range(train + test) for c in classes]
    videos = [(name, k % len(classes)) for k, name in enumerate(names[:train + test])]
    for name, label in tqdm(videos, desc=f"rendering toy videos into {root}", disable=None):
        path = root / "UCF-101" / name
        if not path.exists():
            frames = toy_clip(label, draw(seed, int.from_bytes(name.encode())))
            write_atomically(path, lambda file: encode_video(file, frames))
    text = {"classInd": [f"{i + 1} {c}" for i, c in enumerate(classes)],
            "testlist01": [name for name, _ in videos[:test]],
            "trainlist01": [f"{name} {label + 1}" for name, label in videos[test:]]}
    for name, lines in text.items():
        content = "".join(f"{line}\n" for line in lines).encode()
        write_atomically(root / "ucfTrainTestlist" / f"{name}.txt", lambda file: file.write(content))
    write_atomically(done, lambda file: file.write(json.dumps(settings).encode()))


def encode_video(file, frames, fps=25):
    """uint8 (T, H, W, 3) -> MPEG-4 in an AVI container, as UCF101's files are."""
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"qscale": "3", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode())


# ---- Data: from a video to the clips of a step -----------------------------------------------------------------------
def draw(seed, *key):
    """The random numbers that belong to a key of whole numbers, whoever asks, and whenever: a numpy Generator."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class Frames(Dataset):
    """Item (key, i): the frames of video i at indices(key, count), or the reason for which it cannot be decoded."""

    def __init__(self, videos, indices, short_side):
        self.videos, self.indices, self.short_side = videos, indices, short_side

    def __getitem__(self, item):
        key, i = item
        try:
            return decode_frames(self.videos.path(i), functools.partial(self.indices, key), self.short_side)
        except DECODE_ERRORS as error:
            return f"{type(error).__name__}: {error}"

    def loader(self, items, workers, ahead=2, pin_memory=False):
        """An iterator over the items, in their order, `ahead` of them decoded in advance by each worker process."""
        return iter(DataLoader(
            self, batch_size=None, sampler=items, num_workers=workers, prefetch_factor=ahead if workers else None,
            pin_memory=pin_memory, worker_init_fn=leave_signals_to_parent))


def leave_signals_to_parent(_worker):
    """Ctrl-C and a scheduler's SIGTERM reach the workers, too: they stay until the main process has ended its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # ends it then: Python waits at exit for those left


def random_span(key, count, seed, frames, stride):
    """Indices for Frames: one clip at a random place of the video, drawn from (seed, key)."""
    return clip_indices(count, frames, stride, draw(seed, *key).random())


def spaced_clips(key, count, clips, frames, stride):
    """Indices for Frames: uniformly spaced clips, one after the other; a single one lies in the middle of the video."""
    positions = np.linspace(0, 1, clips) if clips > 1 else [0.5]
    return np.concatenate([clip_indices(count, frames, stride, p) for p in positions])


# A role in a step's batch: which videos may take it, and how many do, over all ranks. The batch of a pool that cycles
# may hold a video twice and runs on into the next pass; the remainder of a pass of one that does not is dropped.
Pool = namedtuple("Pool", "videos batch cycle")


@functools.lru_cache(maxsize=8)
def shuffled(seed, role, turn, count):
    return draw(seed, role, turn).permutation(count)


def step_keys(pools, steps, seed, epoch, step):
    """Who is in a step: for each pool, the keys of its part of the global batch."""
    for role, (members, batch, cycle) in enumerate(pools):
        places = np.arange(batch) + (epoch * steps * cycle + step) * batch
        turns, places = np.divmod(places, len(members)) if cycle else (np.full(batch, epoch), places)
        yield [(role, int(turn), int(members[shuffled(seed, role, int(turn), len(members))[place]]))
               for turn, place in zip(turns, places)]


class VideoStream:
    """The batches of a training run, from where the run stands: an iterator over this rank's share of each, as lists.

    (frames, numbers, keys): of each video `frames` frames, uint8 (T, H, W, 3) on the device, its number, and its key
    (role, pass, video), which with the seed settles its draws. steps: per epoch; by default one pass of the first pool.
    Who is in a step is a function of (seed, epoch, step): no state to save, and any number of workers gives the same. A
    video that cannot be decoded is named, and another one of its pool, which is not in the batch, takes its place and
    its draws; over 10 % of a pool stops the run (UserError)."""

    def __init__(self, videos, pools, frames, args, device, run, steps=None):
        self.videos, self.pools, self.seed, self.device = videos, pools, args.seed, device
        self.unreadable = {}  # video: reason
        if steps is None:
            passes = len(pools[0].videos) / pools[0].batch
            steps = math.ceil(passes) if pools[0].cycle else int(passes)
        self.steps, seed, done = steps, args.seed, run.epoch * steps + run.step
        if not steps:
            raise UserError(f"--batch {pools[0].batch} is more than the {len(pools[0].videos)} videos")
        self.epoch, self.step = divmod(done, steps)
        print0(f"{steps} steps an epoch")
        span = functools.partial(random_span, seed=args.seed, frames=frames, stride=args.stride)
        self.dataset = Frames(videos, span, round(1.25 * args.size))
        share = sum(pool.batch for pool in pools) // world_size()
        ahead = max(2, math.ceil(2 * share / max(1, args.workers)))  # two batches
        # Not through self: a cycle of references would keep the workers alive until Python collects garbage.
        items = ((key, key[2]) for step in range(done, args.epochs * steps)
                 for keys in step_keys(pools, steps, seed, *divmod(step, steps)) for key in own_share(keys))
        self.loader = self.dataset.loader(items, args.workers, ahead, device.type == "cuda")

    def __next__(self):
        frames, videos, keys = [], [], []
        for group in step_keys(self.pools, self.steps, self.seed, self.epoch, self.step):
            substitutes = self.substitutes(group)
            for key in own_share(group):
                item, video = next(self.loader), key[2]
                while isinstance(item, str):
                    if video not in self.unreadable:
                        self.unreadable[video] = item
                        text = f"warning: {self.videos.path(video)}: {item}; another video takes its place"
                        tqdm.write(text, file=sys.stderr)
                        check_unreadable(self.unreadable, self.pools[key[0]].videos, self.videos)
                    video = next(substitutes, None)
                    if video is None:
                        raise UserError("too few videos can be decoded to fill a batch: choose a smaller --batch")
                    item = self.dataset[key, video]
                frames.append(item.to(self.device, non_blocking=True))
                videos.append(video)
                keys.append(key)
        self.epoch, self.step = (self.epoch, self.step + 1) if self.step + 1 < self.steps else (self.epoch + 1, 0)
        return frames, videos, keys

    def substitutes(self, group):
        """Videos that may stand in for unreadable ones of this part of the batch, in an order of their own."""
        members, _, cycle = self.pools[group[0][0]]
        taken = set() if cycle else {key[2] for key in group}
        spare = [int(i) for i in members if i not in taken]
        order = draw(self.seed, *group[0][:2], self.epoch, self.step, 1).permutation(len(spare))
        yield from (spare[k] for k in order[rank()::world_size()] if spare[k] not in self.unreadable)


def check_unreadable(unreadable, members, videos):
    """UserError if over 10 % of the videos `members` are among the unreadable ones."""
    bad = [videos.path(i) for i in members if i in unreadable]
    if len(bad) > 0.1 * len(members):
        raise UserError(f"{len(bad)} of {len(members)} videos cannot be decoded, more than 10 %: mend or remove "
                        + ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else ""))


# ---- Data: augmentation, on the device -------------------------------------------------------------------------------
STRONG = dict(area=0.3, jitter=0.4, hue=0.1, p_jitter=0.8, p_grey=0.2)  # stage 1
WEAK = dict(area=0.5, jitter=0.2, hue=0.05, p_jitter=0.5, p_grey=0.1)  # stages 2 and 3


def augment(clip, size, rng, area, jitter, hue, p_jitter, p_grey):
    """One random crop, flip, colour jitter and greyscale for all frames of a clip, drawn from a numpy Generator.

    clip: uint8 (T, H, W, 3) on any device -> uint8 (T, 3, size, size). area: least share of the frame that the crop
    keeps. jitter, hue: largest change of brightness, contrast, saturation, and of hue. p_jitter, p_grey: how often."""
    clip = clip.permute(0, 3, 1, 2)
    height, width = clip.shape[2:]
    area, ratio = rng.uniform(area, 1) * height * width, math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    h, w = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    clip = TF.resized_crop(clip, int(top), int(left), h, w, [size, size], antialias=True)
    if rng.random() < 0.5:
        clip = TF.horizontal_flip(clip)
    if rng.random() < p_jitter:
        changes = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        amounts = [*rng.uniform(1 - jitter, 1 + jitter, 3), rng.uniform(-hue, hue)]
        for k in rng.permutation(4):
            clip = changes[k](clip, float(amounts[k]))
    if rng.random() < p_grey:
        clip = TF.rgb_to_grayscale(clip, num_output_channels=3)
    return clip


def centre_crop(clip, size, scale=1.0):
    """The central square of `scale` times the shorter side: uint8 (T, H, W, 3) -> uint8 (T, 3, size, size)."""
    clip = clip.permute(0, 3, 1, 2)
    side = round(scale * min(clip.shape[2:]))
    return TF.resize(TF.center_crop(clip, [side, side]), [size, size], antialias=True)


def to_input(clips, model):
    """N clips, each uint8 (T, 3, H, W) -> (N, 3, T, H, W), channels_last_3d, normalised by model.mean and model.std."""
    clips = [clip.permute(0, 2, 3, 1).float().div_(255).sub_(model.mean).div_(model.std) for clip in clips]
    return torch.stack(clips).permute(0, 4, 1, 2, 3)


# ---- Distributed: each of these works without torchrun, too ----------------------------------------------------------
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*text):
    """Print from the first process, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)))


def own_share(items):
    """This rank's consecutive part of a list that all ranks know."""
    share = len(items) // world_size()
    return items[rank() * share:(rank() + 1) * share]


def all_gather(z):
    """(B, ...) of each rank -> (ranks * B, ...), in rank order, on every rank, with gradient for the rank's own rows.

    Every rank computes the same loss of all rows: the gradient of its own ones, times the ranks, for DDP averages."""
    if world_size() == 1:
        return z
    rows, own = [torch.empty_like(z) for _ in range(world_size())], z.view_as(z)
    own.register_hook(lambda gradient: gradient * world_size())
    dist.all_gather(rows, z.detach().contiguous())
    rows[rank()] = own
    return torch.cat(rows)


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


# ---- Optimisation and logging ----------------------------------------------------------------------------------------
class Signals:
    """The first signal in training lets the step end, elsewhere it ends the program; a second Ctrl-C always does."""
    deferring = requested = False

    @classmethod
    def handle(cls, number, _frame):
        if not cls.deferring or (number == signal.SIGINT and cls.requested == signal.SIGINT):
            raise KeyboardInterrupt
        cls.requested = cls.requested or number  # torchrun sends SIGTERM after a Ctrl-C: no second request


def start(args):
    """Join torchrun's process group if there is one; settle workers, device and precision -> this process's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if getattr(args, "out", "") is None:
        args.out = f"runs/{args.data or 'toy'}"
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs here for {local_rank + 1} processes or more")
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store, place, size = next(dist.rendezvous("env://"))
        # Else gloo finds the addresses of processes that torchrun has replaced (--max-restarts).
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=place, world_size=size)
    if args.precision is None:
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else any(
            torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
        args.precision = broadcast("bf16" if fast else "fp32")
    return device


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def checkpoint_parts(backbone):
    """Recompute each residual block in the backward pass: memory for one block's inside instead of all."""
    @contextlib.contextmanager
    def without_statistics(part):  # the first pass has updated BatchNorm's statistics, the second one must not
        before = [buffer.clone() for buffer in part.buffers()]
        try:
            yield
        finally:  # torch leaves the second pass by an exception, as soon as it has what it needs
            for buffer, value in zip(part.buffers(), before):
                buffer.data.copy_(value)  # .data: autograd has saved them, too, and need not know

    for part in backbone.parts():
        contexts = lambda part=part: (contextlib.nullcontext(), without_statistics(part))  # of the two passes
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, context_fn=contexts)


FREE_ARGUMENTS = {  # those that may change between a run and its continuation
    "out", "root", "pretrained", "epochs", "workers", "device", "checkpointing", "compile", "restart"}


class Run:
    """Where the training of one network stands: all that its checkpoint OUT/NAME.pt holds, and its log OUT/NAME.log.

    net: the module to train, initialised: a classifier or an Embedder. carried: what else the checkpoint is to hold for
    later stages. Where the checkpoint exists already, the Run goes on from it."""

    def __init__(self, args, stage, name, net, videos, device, labeled=()):
        self.args, self.name, self.device, self.carried = args, name, device, {}
        self.facts = {"stage": stage, "arch": args.arch, "classes": videos.classes,
                      "video_set": set_digest(videos.names()), "labeled": [videos.name(i) for i in labeled]}
        self.path, self.log_path = Path(args.out) / f"{name}.pt", Path(args.out) / f"{name}.log"
        self.epoch, self.step, self.sums, self.finished = 0, 0, {}, False
        self.pending, self.stopping = None, False
        networks = {"model": net.backbone, "head": net.head} if isinstance(net, Embedder) else {"model": net}
        net.to(device, memory_format=torch.channels_last_3d)
        if world_size() > 1 and device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, args.lr, betas=(0.9, 0.999), fused=device.type == "cuda")
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=args.patience)
        self.parts = {**networks, "optimizer": self.optimizer, "plateau": self.plateau}
        if not args.restart and not args.benchmark and broadcast(self.path.exists()):
            self.resume(read_checkpoint(self.path))
        elif not args.benchmark:
            versions = {module.__name__: module.__version__ for module in (torch, torchvision, av, np)}
            git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
            commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
            self.write_log([json.dumps({"command": " ".join(sys.argv), "commit": commit, **versions})])
        for part in networks["model"].parts() if args.compile else ():
            part.forward = torch.compile(part.forward, dynamic=False)  # the parts differ in shape, not the steps
        if args.checkpointing:
            checkpoint_parts(networks["model"])
        self.net = nn.parallel.DistributedDataParallel(net) if world_size() > 1 else net

    def resume(self, saved):
        if saved.get("stage") != self.facts["stage"]:
            raise UserError(f"{self.path} was not written by this stage: choose another --out, or --restart")
        for key, value in {**self.facts, **vars(self.args)}.items():
            before = saved.get(key, saved["args"].get(key))
            if key not in FREE_ARGUMENTS and before != value:
                raise UserError(f"{self.path} was made with {key} {str(before)[:60]}, not {str(value)[:60]}: repeat "
                                "that to go on, or give --restart to begin again or another --out")
        if saved["epoch"] > self.args.epochs:
            raise UserError(f"{self.path} has {saved['epoch']} epochs, --epochs {self.args.epochs} is less")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.epoch, self.step, self.sums = saved["epoch"], saved["step"], saved["sums"]
        self.finished = saved["finished"] and self.epoch == self.args.epochs
        print0(f"{self.path} is finished ({self.epoch} epochs)" if self.finished
               else f"going on from {self.path} at epoch {self.epoch + 1}, step {self.step + 1}")
        lines = [line for line in read_lines(self.log_path) if line.endswith("}")] if self.log_path.exists() else ["{}"]
        self.write_log([line for line in lines if json.loads(line).get("epoch", 0) <= self.epoch])

    def write_log(self, lines):
        if rank() == 0:
            write_atomically(self.log_path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))

    def epochs(self):
        """The epochs that are left: sets the warm-up's learning rate before each; anneals, logs and saves after it."""
        Signals.deferring = True
        while self.epoch < self.args.epochs:
            if self.epoch < self.args.warmup:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.args.lr * (self.epoch + 1) / self.args.warmup
            lr = self.optimizer.param_groups[0]["lr"]
            begin, self.waiting, self.clips = time.perf_counter(), 0.0, 0
            yield self.epoch
            self.settle()
            seconds = time.perf_counter() - begin
            means = {name: total / self.step for name, total in self.sums.items()}
            if self.epoch >= self.args.warmup:
                self.plateau.step(means["loss"])
            self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
            unreadable = {self.stream.videos.name(i) for part in gather_objects(self.stream.unreadable) for i in part}
            line = {"epoch": self.epoch, **means, "lr": lr, "seconds": seconds, "clips_per_s": self.clips / seconds,
                    "waiting_share": self.waiting / seconds, "memory_gib": peak_memory(self.device),
                    "unreadable": len(unreadable)}
            line = {key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()}
            if rank() == 0:
                with open(self.log_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            print0(f"{self.name}:", ", ".join(f"{key} {value:.4g}" for key, value in line.items()))
            if unreadable:
                print0("cannot be decoded:", ", ".join(sorted(unreadable)))
            self.save()
        Signals.deferring = False

    def steps(self, stream):
        """The batches that are left of this epoch, under a progress bar; after a signal, a checkpoint and the end."""
        self.stream = stream
        with tqdm(total=stream.steps, initial=self.step, desc=f"{self.name} {self.epoch + 1}/{self.args.epochs}",
                  leave=False, disable=True if rank() else None) as self.bar:
            if self.args.benchmark:
                yield from self.benchmark(stream)
            while self.step < stream.steps:
                yield self.next_batch(stream)
                self.step += 1
                self.bar.update()
                if self.stopping or (Signals.requested and world_size() == 1):
                    self.settle()
                    self.save()
                    raise KeyboardInterrupt

    def next_batch(self, stream):
        begin = time.perf_counter()
        self.batch = next(stream)
        self.waiting += time.perf_counter() - begin
        torch.manual_seed(draw(self.args.seed, self.epoch, self.step, rank()).integers(2**63))  # for dropout
        return self.batch

    def benchmark(self, stream):
        """The steps of --benchmark; then a table of what they took, the same as one JSON line, and the end."""
        Signals.deferring = False  # nothing is to be saved
        with FlopCounterMode(display=False) as flops:
            yield self.next_batch(stream)
        warmup = min(5, self.args.benchmark)
        for k in range(warmup + self.args.benchmark):
            if k == warmup:
                self.settle()  # which waits for the GPU
                begin, self.waiting, self.clips = time.perf_counter(), 0.0, 0
            yield self.next_batch(stream)
        self.settle()
        step, items = (time.perf_counter() - begin) / self.args.benchmark, [(key, key[2]) for key in self.batch[2][:16]]
        begin = time.perf_counter()
        for item in items:
            stream.dataset[item]
        decode = 1000 * (time.perf_counter() - begin) / len(items)
        numbers = {"videos_per_s": len(self.batch[1]) * world_size() / step, "ms_per_step": 1000 * step,
                   "clips_per_s": self.clips / self.args.benchmark / step, "decode_ms_per_video": decode,
                   "waiting_share": self.waiting / self.args.benchmark / step,
                   "tflop_per_s": flops.get_total_flops() * world_size() / step / 1e12,
                   "memory_gib": peak_memory(self.device)}
        for key, value in numbers.items():
            print0(f"{key:20} {value:10.4g}")
        print0(json.dumps(numbers))
        flag = "--precision bf16" if self.args.precision == "fp32" else "--compile, or more processes"
        print0("bottleneck:", "decoding; --workers" if numbers["waiting_share"] > 0.05 else f"the network; {flag}")
        raise SystemExit

    def record(self, clips, **terms):
        """Note a step's number of clips and its loss terms, scalars of which the first is the loss: means over ranks.

        They are read one step later, when they have reached the host without anyone waiting for them."""
        stop = torch.full((), float(bool(Signals.requested)), device=self.device)
        values = torch.stack([term.detach().float() for term in terms.values()] + [stop])
        if world_size() > 1:
            dist.all_reduce(values)  # the stop request, too: all ranks stop at one step
            values /= world_size()
        self.settle()
        ready = None
        if self.device.type == "cuda":
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.clips += clips * world_size()
        self.pending = (list(terms), values, ready, self.step, self.batch[1])

    def settle(self):
        """Take in the numbers of the step that was recorded last; TrainingError if they are not finite."""
        if self.pending is None:
            return
        (names, values, ready, step, videos), self.pending = self.pending, None
        if ready is not None:
            ready.synchronize()
        *values, stop = values.tolist()
        self.stopping = self.stopping or stop > 0
        terms = dict(zip(names, values))
        if not all(map(math.isfinite, values)):
            raise TrainingError(
                f"epoch {self.epoch + 1}, step {step + 1}: not finite: {terms}. The videos of this step: "
                + ", ".join(self.stream.videos.name(i) for i in videos) + f". {self.path} was left as it was")
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.bar.set_postfix({name: f"{total / (step + 1):.3f}" for name, total in self.sums.items()}, refresh=False)

    def save(self, finished=False, **more):
        """Write the checkpoint: the old one or the new one is there, whole, whenever the power fails."""
        if rank() == 0:
            state = {**self.facts, **self.carried, **more, "args": vars(self.args), "epoch": self.epoch,
                     "step": self.step, "sums": self.sums, "finished": finished,
                     **{name: part.state_dict() for name, part in self.parts.items()}}
            write_atomically(self.path, lambda file: torch.save(state, file))
        if world_size() > 1:
            dist.barrier()

    def finish(self, **more):
        self.save(finished=True, **more)
        print0(f"wrote {self.path}")


def peak_memory(device):
    """The most that this process has held so far, in GiB: on the GPU, or of the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def write_atomically(path, write):
    """Call write(file) on a new file that then takes the place of `path`, whole and on disk; UserError if it cannot."""
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
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        raise UserError(f"{path} cannot be written, what was there is left: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_checkpoint(path):
    """What torch.save has written to a file: a dict, tensors on the CPU, the same on every rank. No code of it runs."""
    saved = error = None
    if rank() == 0:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            error = f"{path}: no such checkpoint (pretrain_inv.py, pretrain_dist.py and finetune.py write them)"
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
            error = f"{path}: damaged, or no file of tensors: {str(e).strip().splitlines()[0][:120]}"
        if error is None and not isinstance(saved, dict):
            error = f"{path}: not a checkpoint"
    saved, error = broadcast((saved, error))
    if error:
        raise UserError(error)
    return saved


def load_finished(names, folder, stages):
    """{name: content} of finished checkpoints, by path or in `folder`, by one of `stages` (None: another program)."""
    contents = {}
    for name in (name for name in names if name != "none"):
        path = name if os.path.dirname(name) else os.path.join(folder, name)
        saved = read_checkpoint(path)
        stage = saved.get("stage")
        if stage not in stages:
            raise UserError(f"{path}: by {stage or 'another program'}, not by {' or '.join(filter(None, stages))}")
        if stage and not saved["finished"]:
            raise UserError(f"{path}: unfinished at epoch {saved['epoch']}, run its stage first")
        contents[name] = {key: value for key, value in saved.items() if key != "optimizer"}
    return contents


def load_classifier(saved, device):
    """The classifier of a checkpoint's content, in eval mode, without gradient."""
    model = build_model(saved["arch"], len(saved["classes"]))
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last_3d).requires_grad_(False).eval()


def load_backbone(model, path, saved):
    """Give a model all weights but the classifier's from what read_checkpoint returned, whoever wrote it.

    Known public forms: torchvision's r3d_18 (a bare state dict), PyTorchVideo's slow_r50 (under "model_state"), TCLR's
    (under "state_dict", names behind "module.0.", trained on BGR frames). UserError if a tensor does not fit."""
    weights = next((saved[key] for key in ("model", "model_state", "state_dict") if key in saved), saved)
    tclr = any(name.startswith("module.0.") for name in weights)
    weights = {name.removeprefix("module.").removeprefix("0." if tclr else ""): w for name, w in weights.items()}
    own = {name: w for name, w in model.state_dict().items() if not name.startswith(CLASSIFIERS)}
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    unfit = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if unfit:
        raise UserError(f"{path}: {len(fitting)} of {len(own)} tensors fit, {unfit[0]} does not: another arch?")
    if tclr:
        fitting["stem.0.weight"] = fitting["stem.0.weight"].flip(1)
    model.load_state_dict(fitting, strict=False)
    print0(f"took {len(fitting)} tensors of {path}, left {len(weights) - len(fitting)}")


# ---- Evaluation: temporal similarity after stage 1, class probabilities ----------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def map_videos(function, videos, indices, size, args, device, title):
    """Apply a function to the decoded frames at `indices` of all videos, shared among the ranks.

    function: a list of up to `size` uint8 (T, H, W, 3) on the device -> a tensor with a row for each. Returns
    {number: row} and, of those that cannot be decoded, {number: reason}."""
    numbers = range(rank(), len(videos), world_size())
    dataset = Frames(videos, indices, round(1.25 * args.size))
    items = dataset.loader([(None, i) for i in numbers], args.workers, pin_memory=device.type == "cuda")
    rows, unreadable, waiting = {}, {}, {}
    for i, item in zip(tqdm(numbers, desc=title, leave=False, disable=True if rank() else None), items):
        if isinstance(item, str):
            unreadable[i] = item
            tqdm.write(f"warning: {videos.path(i)}: {item}", file=sys.stderr)
        else:
            waiting[i] = item.to(device, non_blocking=True)
        if waiting and (len(waiting) == size or i == numbers[-1]):
            rows.update(zip(waiting, function(list(waiting.values())).cpu()))
            waiting = {}
    for part in gather_objects((rows, unreadable)):
        rows.update(part[0])
        unreadable.update(part[1])
    return dict(sorted(rows.items())), dict(sorted(unreadable.items()))


def measure_similarity(embedder, videos, args, device):
    """C of Eq. 5 of each video by the self-supervised teacher, before fine-tuning (Algorithm 1, line 16).

    From args.clips consecutive clips in its middle, centre crop, eval mode. Returns what the checkpoint holds of it."""
    def similarity(frames):
        clips = [centre_crop(clip, args.size) for video in frames for clip in video.split(args.frames)]
        with autocast(args, device):
            z = embedder(to_input(clips, embedder.backbone))
        return temporal_similarity(z.unflatten(0, (-1, args.clips)))

    embedder.eval()
    span = functools.partial(spaced_clips, clips=1, frames=args.clips * args.frames, stride=args.stride)
    rows, unreadable = map_videos(similarity, videos, span, args.batch // world_size(), args, device, "similarity")
    check_unreadable(unreadable, range(len(videos)), videos)
    return {"similarity_of": [videos.name(i) for i in rows], "similarity": torch.stack(list(rows.values())),
            "similarity_clips": [args.clips, args.frames, args.stride]}


def paired_similarity(teachers):
    """Of the videos of which both teachers' checkpoints hold C of Eq. 5: names, and both C, (N, n, n).

    teachers: {name: content} of two. UserError if one holds none."""
    for name, saved in teachers.items():
        if "similarity" not in saved:
            raise UserError(f"{name} does not come from stage 1, TSTR cannot weigh it: --reweight mean or a number")
    rows = [{video: i for i, video in enumerate(saved["similarity_of"])} for saved in teachers.values()]
    names = [video for video in rows[0] if video in rows[1]]
    return names, *(saved["similarity"][[row[name] for name in names]] for saved, row in zip(teachers.values(), rows))


def class_probabilities(model, videos, clips, scales, args, device, title):
    """Softmax averaged over uniformly spaced clips and centre crops of the given shares of the short side (Sec. 4.2).

    Returns {number: (C,)} and {number: reason} as map_videos does."""
    def probabilities(frames):
        crops = [centre_crop(clip, args.size, scale)
                 for video in frames for clip in video.split(args.frames) for scale in scales]
        with autocast(args, device):
            logits = model(to_input(crops, model))
        return logits.float().softmax(1).unflatten(0, (len(frames), -1)).mean(1)

    model.eval()
    spaced = functools.partial(spaced_clips, clips=clips, frames=args.frames, stride=args.stride)
    return map_videos(probabilities, videos, spaced, 4, args, device, title)


# ---- Arguments -------------------------------------------------------------------------------------------------------
DATA_SETS = "toy", "ucf101", "hmdb51", "kinetics400", "folder"


def defaults(data, stage):
    """What a stage ("pretrain", "finetune", "student") does where no flag says otherwise: the paper's settings.

    Batch and epochs of fine-tuning, which it does not name, are those of the authors' code. toy has small ones."""
    ssl = stage == "pretrain"
    settings = {"data": data, "root": f"data/{data}", "split": 1, "pool": "train", "arch": "slow_r50", "size": 224,
                "clips": 4, "frames": 16 if ssl else 8, "stride": 1 if ssl else 2, "batch": 40 if ssl else 16,
                "epochs": 150 if not ssl else 100 if data == "kinetics400" else 250, "warmup": 10, "patience": 5,
                "lr": 1e-3, "percent": {"ucf101": 5, "hmdb51": 40, "toy": 6}.get(data, 10), "subset_seed": 0}
    if data == "toy":
        settings |= {"arch": "r3d_tiny", "size": 32, "warmup": 2, "batch": 20 if ssl else 16,
                     "epochs": {"pretrain": 12, "finetune": 100, "student": 30}[stage],
                     "patience": {"pretrain": 5, "finetune": 25, "student": 15}[stage],
                     "lr": 3e-4 if stage == "finetune" else 1e-3}
    return settings


def number(kind, least, most=math.inf):
    """An argparse type: an int or a float, from `least` to `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {least} to {most}")
    return parse


class Parser(argparse.ArgumentParser):
    """Flags in named groups, with their defaults in --help, those that training stages share among them ("": none).

    stage: "pretrain", "finetune" or "student". A mistake becomes a UserError, so one line."""

    def __init__(self, description, stage=""):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.stage, self.groups = stage, {}
        count, add = functools.partial(number, int), self.add
        if stage:
            add("data", "--data", "data set; toy is rendered where it is missing (default toy)", choices=DATA_SETS)
            add("data", "--root", "its folder (default data/<data>)", metavar="DIR")
            add("data", "--split", "official split of ucf101 and hmdb51", type=int, choices=(1, 2, 3))
            add("data", "--pool", "hmdb51's training videos: the split's, or all but test's", choices=("train", "all"))
            if stage != "pretrain":
                add("data", "--percent", "%% of each class with a label", type=number(float, 1e-3, 100), metavar="P")
                add("data", "--labeled-list", "read the labelled videos from a published list instead", metavar="FILE")
                add("data", "--subset-seed", "draws which P percent", type=count(0), metavar="N")
            else:
                add("clips", "--clips", "consecutive clips per video, n", type=count(2), metavar="N")
            add("clips", "--frames", "frames per clip", type=count(1), metavar="N")
            add("clips", "--stride", "frames from one to the next", type=count(1), metavar="N")
            add("clips", "--size", "side of the square that the network sees", type=count(16), metavar="PIXELS")
            add("model", "--arch", "network", choices=ARCHS)
            add("training", "--epochs", "passes over the videos", type=count(1), metavar="N")
            add("training", "--batch", "videos per step, over all processes", type=count(1), metavar="VIDEOS")
            add("training", "--lr", "Adam's learning rate", type=number(float, 0), metavar="X")
            add("training", "--warmup", "epochs in which it rises linearly", type=count(0), metavar="EPOCHS")
            add("training", "--patience", "epochs without a lower loss before it halves", type=count(0), metavar="N")
            add("run", "--out", "folder of checkpoints and logs (default runs/<data>)", metavar="DIR")
            add("run", "--seed", "of weights, order and augmentation", type=count(0), default=0, metavar="N")
            add("run", "--checkpointing", "recompute activations: less memory, a third more time", action="store_true")
            add("run", "--compile", "torch.compile: slow to start, then faster on GPUs", action="store_true")
            add("run", "--restart", "begin again, even where there is a checkpoint", action="store_true")
            add("run", "--benchmark", "time so many steps, write no checkpoint", type=count(1), metavar="N")
        add("run", "--workers", "decoding processes (default: its share of the cores)", type=count(0), metavar="N")
        add("run", "--device", "default: cuda where there is a GPU", choices=("cpu", "cuda"))
        add("run", "--precision", "default: bf16 autocast where the hardware has it", choices=("bf16", "fp32"))

    def add(self, group, flag, text, **settings):
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        key, default = flag.strip("-").replace("-", "_"), settings.get("default")
        values = {data: defaults(data, self.stage).get(key) for data in DATA_SETS} if self.stage else {}
        default = values.get("ucf101") if default is None else " ".join(map(str, np.atleast_1d(default)))
        if default is not None and "default" not in text:
            others = [f"{data} {value}" for data, value in values.items() if value not in (None, default)]
            text += f" (default {'; '.join([str(default), *others])})"
        self.groups[group].add_argument(flag, help=text, **settings)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def settle_arguments(args, stage, sources={}, inherited=()):
    """Fill in what no flag has set, from checkpoints, {name: content}, or by default; UserError on a contradiction."""
    taken, ours = [], {path: saved for path, saved in sources.items() if saved.get("stage")}
    for path, saved in ours.items():
        for key in inherited:
            value = saved["args"][key]
            if getattr(args, key) is None and value is not None:
                setattr(args, key, value)
                taken.append(key)
            elif getattr(args, key) != value and key != "root":  # the videos may have moved
                raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)} contradicts {path}, made with {value}")
    if taken:
        print0("from", ", ".join(ours) + ":", *(f"--{k} {getattr(args, k)}" for k in taken))
    for key, value in defaults(args.data or "toy", stage).items():
        if getattr(args, key, 0) is None and not (key == "percent" and args.labeled_list):
            setattr(args, key, value)
    if getattr(args, "labeled_list", None) and args.percent is not None:
        raise UserError("--percent and --labeled-list: choose one")
    if args.benchmark:
        args.epochs = 10**6  # as many as it needs
    if args.device == "cpu" and args.precision == "bf16" and args.arch.startswith("r3d") and args.size > 112:
        raise UserError(f"{args.arch} above --size 112 needs --precision fp32 on a CPU: oneDNN's bf16 is wrong there")
    if args.batch % world_size():
        raise UserError(f"--batch {args.batch} cannot be shared among {world_size()} processes: choose a multiple")
    print0("settings:", *(f"--{k.replace('_', '-')} {value}" for k, value in vars(args).items() if value is not None))


class UserError(Exception):
    """A mistake in arguments or input: `command` turns it into one line on stderr and exit status 2."""
    status = 2


class TrainingError(UserError):
    """Training cannot go on: one line on stderr, exit status 1."""
    status = 1


def command(main):
    """Make main(argv=None) a command: signals as Signals says, a user's mistakes as one line, exit status 0, 1 or 2."""
    @functools.wraps(main)
    def run(argv=None):
        Signals.deferring = Signals.requested = False
        before = {s: signal.signal(s, Signals.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        script, status, text = os.path.basename(main.__code__.co_filename), 0, None
        try:
            main(argv)
        except UserError as error:
            status, text = error.status, error
        except torch.cuda.OutOfMemoryError as error:
            status, text = 2, f"out of GPU memory: try --checkpointing, or a smaller --batch or --size ({error})"
        except KeyboardInterrupt:
            status, text = 1, "interrupted; the same command goes on from the last checkpoint"
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
        if status:
            print(f"{script}: {text}".replace("\n", " "), file=sys.stderr, flush=True)
            raise SystemExit(status)
        if dist.is_initialized():
            dist.destroy_process_group()
    return run
