"""Losses, TSTR, clips and networks: types, inputs that are refused, and the files of --init."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common as tb
from conftest import earlier_checkpoints
from test_common import run_stage

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


def to_input(clips):
    return tb.to_input(clips, tb.build_model("r3d_tiny", 2))


def embed(clips, **settings):
    return tb.Embedder(tb.build_model("r3d_tiny", 2)).eval()(clips, **settings)


def load(content):
    return tb.load_backbone(tb.build_model("r3d_tiny", 2), content)


@pytest.mark.parametrize("function, inputs, message", [
    (tb.invariant_loss, [Z.long()], "int64"),
    (tb.distinctive_loss, [Z, Z, 0.0], "temperature 0.0"),
    (tb.distillation_loss, [Z[:0, 0], Z[:0, 0]], r"\(0, 8\)"),
    (tb.augment_clips, [[FRAMES, FRAMES], 16, [tb.draw(0)]], "2 clips, 1 generators"),
    (tb.centre_crop, [FRAMES, 16, 1.5], "scale 1.5"),
    (to_input, [[FRAMES.float()]], "float32"),
    (tb.cosine_similarity, [Z, Z[:1]], r"\(1, 4, 8\)"),
    (tb.clip_indices, [0, 4], "video of 0 frames"),
    (tb.clip_indices, [64, 16.0], "16.0 frames"),
    (tb.spaced_clips, [100, 0, 8, 1], "0 clips"),
    (embed, [LONG.transpose(1, 2)], r"\(2, 8, 3, 16, 16\)"),
    (lambda: embed(LONG, num_long=1, slices=3), [], "2 time steps"),
    (lambda: embed(LONG, num_long=3), [], "3 of 2 clips"),
    (load, [[1, 2]], "no weights"),
    (load, [{"fc.bias": Z, "stem.0.weight": torch.ones(12, 3, 3, 7, 7, dtype=torch.int64)}],
     "stem.0.weight is torch.int64"),
    (tb.labeled_subset, [["a/1.avi", "b/2.avi"], [0, 1], 101], "101 per cent"),
])
def test_other_inputs_are_refused(function, inputs, message):
    """Wrong shapes of the losses and of TSTR are in test_common.py."""
    with pytest.raises(ValueError, match=message):
        function(*inputs)


# ---- --init: what other programs write ---------------------------------------------------------

def tiny_weights(prefix=""):
    torch.manual_seed(1)
    return {prefix + name: w for name, w in tb.build_model("r3d_tiny", 5).state_dict().items()}


@pytest.mark.parametrize("content", [
    tiny_weights("module._orig_mod."),
    tiny_weights("model.backbone."),
    {"state_dict": tiny_weights("model."), "epoch": 3},
    {"model_state": tiny_weights()},
    {"model": "r3d_tiny", "state_dict": tiny_weights()},
], ids=lambda content: " ".join(map(str, list(content)[:2])))
def test_weights_are_found_wherever_they_lie(content):
    model = tb.build_model("r3d_tiny", 3)
    tb.start_from(model, "any.pt", content)
    state = model.state_dict()
    for name, w in tiny_weights().items():
        assert name.startswith(tb.CLASSIFIERS) or torch.equal(state[name], w)


@pytest.mark.parametrize("content, message", [
    ({"state_dict": None}, "found no weights"),
    (dict.fromkeys(tiny_weights(), 1.0), "found no weights"),
    ({**tiny_weights(), "stem.0.weight": None},
     "71 of 72 tensors fit; stem.0.weight is missing"),
    ({**tiny_weights(), "stem.0.weight": torch.tensor(0.5)},
     r"stem.0.weight is torch.float32 \(\), expected"),
    ({**tiny_weights(), **tiny_weights("model.")}, "several networks"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(content, message):
    model = tb.build_model("r3d_tiny", 3)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(tb.UserError, match=f"any.pt: .*{message}"):
        tb.start_from(model, "any.pt", content)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("stage, flags", [
    ("inv", []), ("dist", []), ("ft", []), ("student", ["--teachers", "none"])])
def test_no_stage_starts_from_random_weights_unasked(stage, flags, chain, toy, tmp_path, complaint):
    earlier_checkpoints(chain, tmp_path, stage)
    for content in (b"", {}, {"optimizer": {"state": {}}}):
        file = tmp_path / "any.pt"
        file.write_bytes(b"")
        if content != b"":
            torch.save(content, file)
        before = set(tmp_path.glob("*.pt"))
        assert f"{file}: " in complaint(run_stage, stage, toy, tmp_path, "--init", file, *flags)
        assert set(tmp_path.glob("*.pt")) == before
