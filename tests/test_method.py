"""Losses, TSTR, clips, augmentation and networks: types, corners, inputs that are refused, and the
files of --init. The losses against loops are in test_common.py."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2 import functional as TF

import common as tb
from conftest import moving_frames, smooth_clips

FUNCTIONS = {  # each takes (B, n, d) or (B, C), twice
    "invariant": lambda z, _: tb.invariant_loss(z),
    "distinctive": tb.distinctive_loss,
    "unpooled": tb.unpooled_distinctive_loss,
    "l2": tb.distillation_loss,
    "kl": lambda p, q: tb.distillation_loss(p, q, "kl"),
    "js": lambda p, q: tb.distillation_loss(p, q, "js"),
    "score": lambda z, w: tb.similarity_score(tb.temporal_similarity(z), tb.temporal_similarity(w)),
    "teachers": lambda p, q: tb.combine_teachers(p, q, p[:, 0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_stays_and_all_other_precisions_become_float32(name):
    torch.manual_seed(0)
    if name in ("l2", "kl", "js", "teachers"):
        inputs = torch.randn(2, 3, 5, dtype=torch.float64).softmax(2)
    else:
        inputs = torch.randn(2, 3, 4, 6, dtype=torch.float64) + 0.3
    function = FUNCTIONS[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        short = inputs.to(dtype)
        value = function(*short)
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), function(*short.double()), rtol=1e-5, atol=1e-6)
    with FakeTensorMode(allow_non_fake_inputs=True):  # to read a value raises an error
        function(*inputs)


Z = torch.ones(3, 4, 8)
FRAMES = torch.zeros(4, 20, 30, 3, dtype=torch.uint8)
LONG = torch.zeros(2, 3, 8, 16, 16)


@pytest.mark.parametrize("call, message", [
    (lambda: tb.pairwise_cosine(Z, Z[:1]), r"\(1, 4, 8\)"),
    (lambda: tb.invariant_loss(Z.long()), "int64"),
    (lambda: tb.invariant_loss(Z[0]), r"found \(4, 8\)"),
    (lambda: tb.invariant_loss(Z[:1]), r"\(1, 4, 8\)"),
    (lambda: tb.invariant_loss(Z[:, :1]), r"\(3, 1, 8\)"),
    (lambda: tb.distinctive_loss(Z, Z, 0.0), "temperature 0.0"),
    (lambda: tb.distinctive_loss(Z, Z[:2]), r"two \(B, n, d\).* \(2, 4, 8\)"),
    (lambda: tb.unpooled_distinctive_loss(Z, Z[:, :2]), r"two \(B, n, d\).* \(3, 2, 8\)"),
    (lambda: tb.temporal_similarity(Z[0]), r"found \(4, 8\)"),
    (lambda: tb.similarity_score(Z, Z[:2]), r"\(2, 4, 8\)"),
    (lambda: tb.combine_teachers(Z[0], Z[0], Z[0]), r"\(4, 8\) and \(4, 8\)"),
    (lambda: tb.distillation_loss(Z[0], Z[1, :2]), r"\(2, 8\)"),
    (lambda: tb.distillation_loss(Z[:0, 0], Z[:0, 0]), r"\(0, 8\)"),
    (lambda: tb.distillation_loss(Z[0], Z[1], "l1"), "'l1'"),
    (lambda: tb.augment_clips([FRAMES, FRAMES], 16, [tb.rng(0)]), "2 clips, 1 generators"),
    (lambda: tb.centre_crop(FRAMES, 16, 1.5), "and 1.5"),
    (lambda: tb.to_input(FRAMES[None].float(), tb.build_model("r3d_tiny", 2)), "float32"),
    (lambda: tb.clip_indices(0, 4), "video of 0 frames"),
    (lambda: tb.clip_indices(64, 16.0), "16.0 frames"),
    (lambda: tb.build_model("r3d", 2), "unknown arch 'r3d'"),
    (lambda: tb.Embedder(tb.build_model("r3d_tiny", 2))(LONG, num_long=1, slices=3),
     "2 time steps"),
    (lambda: tb.labeled_subset(["a/1.avi", "b/2.avi"], [0, 1], 101), "101 per cent"),
    (lambda: tb.labeled_subset(["a/1.avi", "b/2.avi"], [0]), r"shape \(1,\)"),
])
def test_other_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names, z, other", [
    *(("invariant distinctive unpooled", z, None) for z in (
        torch.ones(2, 2, 4), torch.tensor([[[1.0], [-1]], [[-1], [1]]]),  # alike, opposite
        1e4 * torch.randn(2, 2, 4), torch.zeros(2, 2, 4))),
    *(("l2 kl js", torch.eye(3), teacher) for teacher in (torch.eye(3), torch.eye(3).flip(0)))])
def test_losses_and_gradients_are_finite_at_the_corners(names, z, other, dtype):
    for name in names.split():
        leaf = z.to(dtype, copy=True).requires_grad_()
        value = FUNCTIONS[name](leaf, leaf if other is None else other.to(dtype))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite()
        assert leaf.grad.isfinite().all()


def test_a_video_without_a_matrix_gets_the_plain_mean():
    c = {"a": torch.ones(2, 2), "b": 0.5 * torch.ones(2, 2), "d": torch.zeros(2, 2)}
    s = tb.score_videos(["d", "c", "a"], c, {name: c[name] for name in ("a", "d")})
    assert s.tolist() == [0, 0.5, 1]


def test_the_score_is_clamped():
    ones = torch.ones(1, 3, 3)
    for c_inv, c_dist, expected in [
            (ones, ones, 1), (-ones, ones - 1, 0), (1.5 * ones, ones, 1)]:
        assert tb.similarity_score(c_inv, c_dist).item() == pytest.approx(expected)


def test_distillation_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    l2 = 2 * 0.25 ** 2 + 0.5 ** 2
    kl = 2 * 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 1e-8)  # from the teacher
    js = (2 * 0.5 * math.log(0.5 / 0.375) + 2 * 0.25 * math.log(0.25 / 0.375)
          + 0.5 * math.log(0.5 / 0.25)) / 2
    for kind, value in {"l2": l2, "kl": kl, "js": js}.items():
        loss = tb.distillation_loss(p, q, kind).item()
        assert loss == pytest.approx(value / 2, rel=1e-5)  # the second row is equal


# ---- Clips and augmentation ----------------------------------------------------------------------

def test_a_short_video_is_slowed_down_never_dropped():
    assert tb.clip_indices(100, 4, 2, 0).tolist() == [0, 2, 4, 6]
    assert tb.clip_indices(100, 4, 2, 1).tolist() == [93, 95, 97, 99]
    assert tb.clip_indices(14, 8, 2).tolist() == [0, 1, 3, 5, 7, 8, 10, 12]


def change_colours(x, brightness=1, contrast=1, saturation=1, hue=0):
    """change_colours with the same change of every clip."""
    changes = (brightness, contrast, saturation, hue)
    return tb.change_colours(x, *(np.full(len(x), float(change)) for change in changes))


@pytest.mark.parametrize("hue", [-0.3, 0, 0.1, 0.5])
@pytest.mark.parametrize("saturation", [0, 0.6, 1, 1.4])
def test_grey_stays_grey_bit_for_bit(saturation, hue):
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, -1, -1)
    assert torch.equal(change_colours(grey, saturation=saturation, hue=hue), grey)


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.15, 1.4])
def test_brightness_contrast_and_saturation_are_those_of_torchvision(factor):
    """To one level; contrast is about mid-grey, not about the mean."""
    torch.manual_seed(0)  # colours that no change takes out of 0 to 255
    x = torch.randint(90, 166, (3, 4, 3, 16, 16), dtype=torch.uint8)
    for ours, theirs in [
            (change_colours(x, brightness=factor), TF.adjust_brightness(x, factor)),
            (change_colours(x, contrast=factor), 127.5 + factor * (x.float() - 127.5)),
            (change_colours(x, saturation=factor), TF.adjust_saturation(x, factor)),
            (change_colours(x, saturation=0), TF.rgb_to_grayscale(x, 3))]:
        assert (ours.float() - theirs.float()).abs().max() <= 1


def test_hue_by_a_third_of_the_circle_turns_red_into_green_into_blue():
    red, green, blue = 255 * torch.eye(3, dtype=torch.uint8).view(3, 1, 1, 3, 1, 1)
    assert torch.equal(change_colours(red, hue=1 / 3), green)
    assert torch.equal(change_colours(green, hue=1 / 3), blue)


def test_changes_do_not_depend_on_the_clips_beside_them():
    """Of 40 clips, more than a chunk, each as alone."""
    clips = smooth_clips(40)
    together = tb.augment_clips(clips, 24, [tb.rng(0, k) for k in range(40)])
    for k, clip in enumerate(clips):
        assert torch.equal(tb.augment_clips([clip], 24, [tb.rng(0, k)])[0], together[k])


@pytest.mark.parametrize("strength", [{}, tb.WEAK], ids=["strong", "weak"])
def test_strengths_are_shares_and_probabilities(strength, monkeypatch):
    changes = []
    monkeypatch.setattr(tb, "change_colours", lambda x, *each: changes.append(each) or x)
    clips = smooth_clips(1) * 2000
    tb.augment_clips(clips, 4, [tb.rng(0, k) for k in range(2000)], **strength)
    expected = {**dict(jitter=0.4, hue=0.1, jitter_prob=0.8, grey_prob=0.2), **strength}
    brightness, contrast, saturation, hue = changes[0]
    for factor in (brightness, contrast, saturation[saturation > 0]):
        assert abs(factor - 1).max() == pytest.approx(expected["jitter"], rel=0.02)
    assert abs(hue).max() == pytest.approx(expected["hue"], rel=0.02)
    assert (hue != 0).mean() == pytest.approx(expected["jitter_prob"], abs=0.04)
    assert (saturation == 0).mean() == pytest.approx(expected["grey_prob"], abs=0.04)


@pytest.mark.parametrize("area", [0.3, 0.5])
def test_crops_have_their_share_of_the_area_and_their_ratio(area):
    """Seen from frames of which red is the column and green the row; 3 : 4 to 4 : 3."""
    frame = torch.zeros(1, 150, 200, 3, dtype=torch.uint8)
    frame[..., 0] = torch.arange(200)
    frame[..., 1] = torch.arange(150)[:, None]
    rngs = [tb.rng(0, k) for k in range(500)]
    crops = tb.augment_clips([frame] * 500, 32, rngs, False, area, jitter_prob=0, grey_prob=0)
    crops = crops[:, 0].float()
    width = (crops[:, 0, 16, -1] - crops[:, 0, 16, 0]) * 32 / 31
    height = (crops[:, 1, -1, 16] - crops[:, 1, 0, 16]) * 32 / 31
    share = width * height / (150 * 200)
    ratio = width / height
    assert share.min() == pytest.approx(area, abs=0.03) and share.max() > 0.95
    assert ratio.min() == pytest.approx(3 / 4, abs=0.05)
    assert ratio[share < 0.6].max() == pytest.approx(4 / 3, abs=0.07)
    assert crops[:, 0, 16, 0].max() > 60 and crops[:, 1, 0, 16].max() > 30  # anywhere


def test_all_frames_of_a_clip_are_changed_alike_and_each_key_in_its_own_way():
    torch.manual_seed(0)
    still = torch.randint(256, (1, 40, 56, 3), dtype=torch.uint8).expand(6, -1, -1, -1)
    clips, again = (tb.augment_clips([still] * 20, 24, [tb.rng(0, k) for k in range(20)])
                    for _ in range(2))
    assert clips.shape == (20, 6, 3, 24, 24) and clips.dtype == torch.uint8
    assert torch.equal(clips, again) and (clips == clips[:, :1]).all()
    assert len(torch.unique(clips, dim=0)) == 20


@pytest.mark.parametrize("flip, mirrored", [(True, {True, False}), (False, {False})])
def test_half_of_the_clips_are_mirrored_or_none(flip, mirrored):
    ramp = torch.arange(64, dtype=torch.uint8)[:, None].expand(2, 48, 64, 3)
    rngs = [tb.rng(0, k) for k in range(20)]
    out = tb.augment_clips([ramp] * 20, 16, rngs, flip, jitter_prob=0, grey_prob=0)
    assert {bool(clip[0, 0, 8, 0] > clip[0, 0, 8, -1]) for clip in out} == mirrored


def test_the_network_s_input_is_the_centre_normalised():
    clip = moving_frames(6, 40, 56)
    crop = tb.centre_crop(torch.tensor(clip), 20, 0.5)
    assert np.array_equal(crop.numpy(), clip[:, 10:30, 18:38].transpose(0, 3, 1, 2))
    model = tb.build_model("r3d_tiny", 2)
    two = torch.stack([crop, crop])
    x = tb.to_input(two, model)
    expected = crop.permute(1, 0, 2, 3) / 255 - model.mean.view(3, 1, 1, 1)
    expected /= model.std.view(3, 1, 1, 1)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(x[1], expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tb.to_input(two, model), x.bfloat16())  # rounded once


# ---- Networks ------------------------------------------------------------------------------------

def test_projection_head_is_the_paper_s():
    head = tb.ProjectionHead(2048)
    kinds = [type(module).__name__ for module in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert head[3].bias is None
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.randn(4, 2048))
    assert z.dtype == torch.float32 and z.norm(dim=1).allclose(torch.ones(4))


def test_embedder_pools_short_clips_and_slices_long_ones():
    """Slices of two time steps. All rows are one batch of the head's BatchNorm."""
    torch.manual_seed(0)
    embedder = tb.Embedder(tb.build_model("r3d_tiny", 3))
    x = torch.randn(6, 3, 16, 32, 32)
    z = embedder(x, num_long=2, slices=2)
    f = embedder.backbone.features(x)
    slices = [f[4 + long, :, 2 * t:2 * t + 2].mean(1) for long, t in np.ndindex(2, 2)]
    expected = embedder.head(torch.stack([*f[:4].mean(2), *slices]))
    assert z.shape == (4 + 2 * 2, 128) and torch.allclose(z, expected, atol=1e-5)
    for name, p in embedder.backbone.named_parameters():
        assert p.requires_grad != name.startswith("fc.")  # all but the classifier are trained


# ---- --init: what other programs write -----------------------------------------------------------

def under(prefix, weights):
    return {prefix + name: w for name, w in weights.items()}


@pytest.mark.parametrize("arch, wrap", [
    ("r3d_tiny", lambda w: w),  # torchvision's r3d_18: a bare state dict
    ("slow_r50", lambda w: {"model_state": w}),  # PyTorchVideo's
    ("r3d_tiny", lambda w: {"epoch": 3, "state_dict": {  # TCLR's, of BGR frames
        f"module.{int(name.startswith('fc'))}.{name}": x for name, x in w.items()}}),
    ("r3d_tiny", lambda w: under("module._orig_mod.", w)),
    ("r3d_tiny", lambda w: {"model": "r3d_tiny", "state_dict": under("model.backbone.", w)})])
def test_weights_are_found_wherever_they_lie(arch, wrap):
    """All but the classifier's, of another number of classes."""
    torch.manual_seed(1)
    weights = tb.build_model(arch, 400).state_dict()
    content = wrap(weights)
    model = tb.build_model(arch, 7)
    for w in model.state_dict().values():
        w.fill_(7)
    tb.start_from(model, "any.pt", content)
    for name, w in model.state_dict().items():
        if name.startswith(("fc.", "blocks.5.proj.")):
            assert (w == 7).all()
        elif name == "stem.0.weight" and "epoch" in content:
            assert torch.equal(w, weights[name].flip(1))
        else:
            assert torch.equal(w, weights[name])


TINY_WEIGHTS = tb.build_model("r3d_tiny", 5).state_dict()


@pytest.mark.parametrize("content", [
    {"state_dict": None},
    dict.fromkeys(TINY_WEIGHTS, 1.0),
    {key: w for key, w in TINY_WEIGHTS.items() if key != "stem.0.weight"},
    {**TINY_WEIGHTS, "stem.0.weight": torch.tensor(0.5)},
], ids=["nothing", "numbers", "one missing", "another shape"])
def test_what_does_not_fit_is_named(content):
    model = tb.build_model("r3d_tiny", 3)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(tb.UserError, match="any.pt: .* tensors of the network .*stem.0.weight"):
        tb.start_from(model, "any.pt", content)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
