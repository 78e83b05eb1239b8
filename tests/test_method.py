"""Losses, TSTR, clips and networks: types, inputs that are refused, and the files of --init."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common as tb
import finetune
import train_student
from test_common import moving_frames, write_video

# ---- Losses and TSTR: empty batches, precision -------------------------------------------------

LOSSES = {  # each takes (B, n, d) or (B, C), twice
    "invariant": lambda z, _: tb.invariant_loss(z),
    "distinctive": tb.distinctive_loss,
    "unpooled": tb.unpooled_distinctive_loss,
    "l2": tb.distillation_loss,
    "kl": lambda p, q: tb.distillation_loss(p, q, "kl"),
    "js": lambda p, q: tb.distillation_loss(p, q, "js"),
}
ROW_BY_ROW = {
    "cosine": tb.cosine_similarity,
    "temporal": lambda z, _: tb.temporal_similarity(z),
    "score": lambda z, w: tb.similarity_score(tb.temporal_similarity(z), tb.temporal_similarity(w)),
    "teachers": lambda p, q: tb.combine_teachers(p, q, p[:, 0]),
}


def two_inputs(name, dtype=torch.float64):
    torch.manual_seed(0)
    if name in ("l2", "kl", "js", "teachers"):
        return [torch.randn(3, 5, dtype=torch.float64).softmax(1).to(dtype) for _ in range(2)]
    return [(torch.randn(3, 4, 6, dtype=torch.float64) + 0.3).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_an_empty_batch_is_refused(name):
    a, b = two_inputs(name)
    with pytest.raises(ValueError, match="floating-point"):
        LOSSES[name](a[:0], b[:0])


@pytest.mark.parametrize("name", ["temporal", "score", "teachers"])
def test_tstr_of_no_videos_is_empty(name):
    a, b = two_inputs(name)
    assert len(ROW_BY_ROW[name](a[:0], b[:0])) == 0


@pytest.mark.parametrize("name", [*LOSSES, *ROW_BY_ROW])
def test_float64_stays_float64(name):
    function = {**LOSSES, **ROW_BY_ROW}[name]
    a, b = two_inputs(name)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert function(a, b).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LOSSES, *ROW_BY_ROW])
def test_all_other_precisions_become_float32(name, dtype):
    a, b = two_inputs(name, dtype)
    value = {**LOSSES, **ROW_BY_ROW}[name](a, b)
    exact = {**LOSSES, **ROW_BY_ROW}[name](a.double(), b.double())
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_embedder_computes_in_float64():
    torch.manual_seed(0)
    embedder = tb.Embedder(tb.build_model("r3d_tiny", 3)).eval()
    clips = torch.randn(2, 3, 8, 16, 16)
    single = embedder(clips, num_long=1, slices=2)
    double = embedder.double()(clips.double(), num_long=1, slices=2)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.allclose(double.norm(dim=1), torch.ones(3).double(), atol=1e-12)
    assert torch.allclose(single.double(), double, atol=1e-4)


@pytest.mark.parametrize("name", [*LOSSES, *ROW_BY_ROW])
def test_no_function_waits_for_a_value_on_the_device(name):
    """Fake tensors have no values: to read one raises an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        {**LOSSES, **ROW_BY_ROW}[name](*two_inputs(name))


def test_augmentation_waits_for_no_value_on_the_device():
    with FakeTensorMode():
        clips = [torch.zeros(4, 20, 30, 3, dtype=torch.uint8) for _ in range(40)]
        assert augment(clips, 40).shape == (40, 4, 3, 16, 16)


# ---- Inputs of another count, shape or type ----------------------------------------------------

Z = torch.ones(3, 4, 8)
P = torch.full((4, 5), 0.2)
ONES = torch.ones(3, 4, 4)
FRAMES = torch.zeros(4, 20, 30, 3, dtype=torch.uint8)
CLIP = FRAMES.permute(0, 3, 1, 2)
LONG = torch.zeros(2, 3, 8, 16, 16)
NAMES = ["a/1.avi", "b/2.avi"]


def augment(clips, rngs=1):
    return tb.augment_clips(clips, 16, [tb.draw(0, k) for k in range(rngs)])


def to_input(clips):
    return tb.to_input(clips, tb.build_model("r3d_tiny", 2))


def embed(clips, **settings):
    return tb.Embedder(tb.build_model("r3d_tiny", 2)).eval()(clips, **settings)


@pytest.mark.parametrize("function, inputs, message", [
    (tb.invariant_loss, [Z[0]], r"B n d.*\(4, 8\)"),
    (tb.invariant_loss, [Z[:1]], r"B >= 2.*\(1, 4, 8\)"),
    (tb.invariant_loss, [Z[:, :1]], r"n >= 2.*\(3, 1, 8\)"),
    (tb.invariant_loss, [Z[..., :0]], r"\(3, 4, 0\)"),
    (tb.invariant_loss, [Z.long()], "int64"),
    (tb.invariant_loss, [Z.to(torch.complex64)], "complex64"),
    (tb.invariant_loss, [Z.numpy()], "ndarray"),
    (tb.invariant_loss, [Z, 0], "temperature 0"),
    (tb.invariant_loss, [Z, -0.1], "temperature -0.1"),
    (tb.distinctive_loss, [Z, Z[:1]], r"\(1, 4, 8\)"),
    (tb.distinctive_loss, [Z, Z[:, :2]], r"\(3, 2, 8\)"),
    (tb.distinctive_loss, [Z, Z[..., :1]], r"\(3, 4, 1\)"),
    (tb.distinctive_loss, [Z, Z.int()], "int32"),
    (tb.distinctive_loss, [Z, 0.1], "float$"),
    (tb.distinctive_loss, [Z, Z, 0.0], "temperature 0.0"),
    (tb.unpooled_distinctive_loss, [Z, Z[:1]], r"\(1, 4, 8\)"),
    (tb.unpooled_distinctive_loss, [Z, Z[:, :2]], r"\(3, 2, 8\)"),
    (tb.unpooled_distinctive_loss, [Z.bool(), Z], "bool"),
    (tb.unpooled_distinctive_loss, [Z, Z, float("nan")], "temperature nan"),
    (tb.cosine_similarity, [Z, Z[..., :1]], r"\(3, 4, 1\)"),
    (tb.cosine_similarity, [Z, Z[:1]], r"\(1, 4, 8\)"),
    (tb.cosine_similarity, [Z[0, 0], Z[0, 0]], r"\(8,\)"),
    (tb.cosine_similarity, [Z.long(), Z.long()], "int64"),
    (tb.temporal_similarity, [Z[0]], r"\(4, 8\)"),
    (tb.temporal_similarity, [Z[:, :1]], r"\(3, 1, 8\)"),
    (tb.temporal_similarity, [Z.long()], "int64"),
    (tb.similarity_score, [Z, Z], r"B n n.*\(3, 4, 8\)"),
    (tb.similarity_score, [ONES, ONES[:1]], r"\(1, 4, 4\)"),
    (tb.similarity_score, [ONES, ONES[:, :2, :2]], r"\(3, 2, 2\)"),
    (tb.similarity_score, [ONES[:, :1, :1], ONES[:, :1, :1]], "n >= 2"),
    (tb.similarity_score, [ONES.long(), ONES], "int64"),
    (tb.combine_teachers, [P, P[:, :2], P[:, 0]], r"\(4, 2\)"),
    (tb.combine_teachers, [P, P, P[:, :1]], r"\(4, 1\)"),
    (tb.combine_teachers, [P, P, P[:1, 0]], r"\(1,\)"),
    (tb.combine_teachers, [P, P, P[:, 0].long()], "int64"),
    (tb.combine_teachers, [P, P, 0.5], "float$"),
    (tb.distillation_loss, [P, P[:1]], r"\(1, 5\)"),
    (tb.distillation_loss, [P, P[:, :1]], r"\(4, 1\)"),
    (tb.distillation_loss, [P[0], P[0]], r"\(5,\)"),
    (tb.distillation_loss, [P, P.argmax(1)], "int64"),
    (tb.distillation_loss, [P, P, "l1"], "l2, kl or js"),
    (augment, [[]], "0 clips"),
    (augment, [[FRAMES, FRAMES]], "2 clips, 1 generators"),
    (augment, [[FRAMES], 2], "1 clips, 2 generators"),
    (augment, [[FRAMES, FRAMES[:2]], 2], "of one length"),
    (augment, [[FRAMES.float()]], "float32"),
    (augment, [[CLIP]], r"T H W 3.*\(4, 3, 20, 30\)"),
    (augment, [FRAMES, 4], r"\(20, 30, 3\)"),
    (augment, [[FRAMES[:0]]], r"\(0, 20, 30, 3\)"),
    (tb.centre_crop, [CLIP, 16], r"T H W 3.*\(4, 3, 20, 30\)"),
    (tb.centre_crop, [FRAMES.float(), 16], "float32"),
    (tb.centre_crop, [FRAMES, 16, 1.5], "scale 1.5"),
    (tb.centre_crop, [FRAMES, 16, 0], "scale 0"),
    (to_input, [FRAMES[None]], r"N T 3 H W.*\(1, 4, 20, 30, 3\)"),
    (to_input, [CLIP], r"\(4, 3, 20, 30\)"),
    (to_input, [[CLIP.float()]], "float32"),
    (tb.clip_indices, [0, 4], "video of 0 frames"),
    (tb.clip_indices, [7.5, 4], "7.5"),
    (tb.clip_indices, [9, 0], "clip of 0 frames"),
    (tb.clip_indices, [9, 4, 0], "0 apart"),
    (tb.clip_indices, [9, 4, 1, 1.5], "at 1.5"),
    (tb.spaced_clips, [100, 0, 8, 1], "0 clips"),
    (tb.spaced_clips, [100, -2, 8, 1], "-2 clips"),
    (tb.spaced_clips, [0, 1, 8, 1], "video of 0 frames"),
    (tb.build_model, ["r3d_19", 2], "r3d_tiny"),
    (embed, [LONG[0]], r"N 3 T H W.*\(3, 8, 16, 16\)"),
    (embed, [LONG.transpose(1, 2)], r"\(2, 8, 3, 16, 16\)"),
    (embed, [LONG[:0]], r"\(0, 3, 8, 16, 16\)"),
    (embed, [LONG.byte()], "uint8"),
    (tb.labeled_subset, [NAMES, [0], 50], "2 names"),
    (tb.labeled_subset, [NAMES, [[1, 0], [0, 1]], 50], r"\(2, 2\)"),
    (tb.labeled_subset, [NAMES, [0, 1], 0], r"\b0 per cent"),
    (tb.labeled_subset, [NAMES, [0, 1], 101], "101 per cent"),
])
def test_other_inputs_are_refused(function, inputs, message):
    with pytest.raises(ValueError, match=message):
        function(*inputs)


@pytest.mark.parametrize("num_long, slices", [(3, 1), (-1, 1), (1, 3), (1, 0), (1, -1)])
def test_the_embedder_cuts_only_what_can_be_cut(num_long, slices):
    with pytest.raises(ValueError, match="2 time steps"):
        embed(LONG, num_long=num_long, slices=slices)


def test_the_smallest_crop_is_a_pixel():
    assert tb.centre_crop(FRAMES, 16, 0.01).shape == (4, 3, 16, 16)


# ---- --init: what other programs write ---------------------------------------------------------

def tiny_weights():
    torch.manual_seed(1)
    return tb.build_model("r3d_tiny", 5).state_dict()


def renamed(prefix):
    return {prefix + name: w for name, w in tiny_weights().items()}


def in_parts():
    """The names that torch.compile leaves where a part of a network was compiled."""
    return {name.replace("layer2.", "layer2._orig_mod."): w for name, w in tiny_weights().items()}


@pytest.mark.parametrize("content", [
    *map(renamed, ["", "_orig_mod.", "model.", "backbone.", "module.", "module._orig_mod.",
                   "_orig_mod.module.", "model.backbone."]),
    in_parts(),
    {"state_dict": renamed("model."), "epoch": 3},
    {"model_state": tiny_weights()},
    {"model_state_dict": tiny_weights()},
    {"model": "r3d_tiny", "state_dict": tiny_weights()},
    {"model": None, "state_dict": tiny_weights()},
    {"state_dict": None, "model": tiny_weights()},
    {"state_dict": {}, "model_state": 3, **tiny_weights()},
    {**tiny_weights(), "epoch": 3, 4: None},
], ids=lambda content: " ".join(map(str, list(content)[:2])))
def test_weights_are_found_wherever_they_lie(content, tmp_path):
    torch.save(content, tmp_path / "any.pt")
    model = tb.build_model("r3d_tiny", 3)
    tb.start_from(model, "any.pt", tb.read_checkpoint(tmp_path / "any.pt"))
    state = model.state_dict()
    for name, w in tiny_weights().items():
        assert name.startswith(tb.CLASSIFIERS) or torch.equal(state[name], w)


def test_a_wrapped_slow_r50_is_no_tclr():
    """TCLR's prefix alone does not mean that there is an r3d, whose colours are to be exchanged."""
    with torch.device("meta"):
        model = tb.build_model("slow_r50", 3)
    saved = {f"module.0.{name}": w for name, w in model.state_dict().items()}
    assert tb.load_backbone(model, saved)[0] == len(saved) - 2


WITHOUT_WEIGHTS = {
    "empty": {},
    "empty state dict": {"state_dict": {}},
    "nothing": {"state_dict": None},
    "None": dict.fromkeys(tiny_weights()),
    "numbers": dict.fromkeys(tiny_weights(), 1.0),
    "numbered": dict(enumerate(tiny_weights().values())),
    "optimizer": {"optimizer": {"state": {}}},
}


@pytest.mark.parametrize("content", WITHOUT_WEIGHTS.values(), ids=WITHOUT_WEIGHTS)
def test_a_file_without_weights_is_refused(content):
    with pytest.raises(tb.UserError, match="any.pt: found no weights"):
        tb.start_from(tb.build_model("r3d_tiny", 3), "any.pt", content)


@pytest.mark.parametrize("changed, message", [
    ({"stem.0.weight": None}, "71 of 72 tensors fit; stem.0.weight is missing"),
    ({"stem.0.weight": 0.5}, "stem.0.weight is missing"),
    ({"stem.0.weight": torch.tensor(0.5)}, r"stem.0.weight is torch.float32 \(\), expected"),
    ({"stem.1.bias": torch.ones(12).long()}, "stem.1.bias is torch.int64"),
    (renamed("model."), "several networks"),
])
def test_what_does_not_fit_is_named(changed, message):
    model = tb.build_model("r3d_tiny", 3)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(tb.UserError, match=f"any.pt: .*{message}"):
        tb.start_from(model, "any.pt", {**tiny_weights(), **changed})
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("saved", [None, [1], torch.ones(3), "weights"])
def test_what_is_no_dict_is_refused(saved):
    with pytest.raises(ValueError, match="found no weights"):
        tb.load_backbone(tb.build_model("r3d_tiny", 3), saved)


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("two_videos")
    for k in range(2):
        folder = root / "train" / f"class{k}"
        folder.mkdir(parents=True)
        write_video(folder / "any.avi", moving_frames(8, seed=50 * k))
    return root


@pytest.mark.parametrize("script, flags", [
    (finetune, []), (train_student, ["--teachers", "none"])], ids=["finetune", "train_student"])
@pytest.mark.parametrize("content", [None, *WITHOUT_WEIGHTS.values()],
                         ids=["no bytes", *WITHOUT_WEIGHTS])
def test_no_script_trains_from_random_weights_unasked(script, flags, content, two_videos, tmp_path,
                                                      capsys):
    file = tmp_path / "any.pt"
    file.touch()
    if content is not None:
        torch.save(content, file)
    with pytest.raises(SystemExit) as end:
        script.main(["--data", "folder", "--root", str(two_videos), "--arch", "r3d_tiny", "--size",
                     "16", "--frames", "8", "--percent", "100", "--epochs", "1", "--batch", "2",
                     "--warmup", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32",
                     "--out", str(tmp_path), "--init", str(file), *flags])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and f"{file}: " in error and "\n" not in error, error
    assert list(tmp_path.glob("*.pt")) == [file]
