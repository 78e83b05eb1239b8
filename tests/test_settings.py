"""Settings: what a run takes from its data set, its flags and earlier checkpoints; mistakes in
them cost one line, and exit status 2; every command of the table of ablations runs."""

import re
import shlex
import shutil

import pytest
import torch

import common as tb
import finetune
import pretrain_dist
import pretrain_inv
import train_student
from test_common import HERE, STAGES, TINY, load, run_stage


def test_later_stages_take_settings_from_checkpoints_and_a_flag_overrides_them(toy, tmp_path,
                                                                              capsys):
    for stage in ("inv", "dist"):
        run_stage(stage, toy, tmp_path, "--epochs", 1, "--no-flip")
    few = [*"--epochs 1 --device cpu --workers 0 --out".split(), str(tmp_path)]
    finetune.main(["--size", "24", *few])
    assert "--size 24 in place of 16, of inv.pt" in capsys.readouterr().out
    train_student.main(few)
    run_stage("student", toy, tmp_path, "--epochs", 1, "--teachers", "none", "--init", "dist.pt",
              "--name", "alone", "--batch", 16)
    made = {**load(tmp_path, "inv")["args"], "no_flip": True}
    for name, size in {"inv_ft": 24, "dist_ft": 24, "student": 24, "alone": 16}.items():
        taken = load(tmp_path, name)["args"]
        assert taken["size"] == size, name
        assert all(taken[key] == made[key] for key in ("data", "root", "arch", "no_flip")), name
    steps = [load(tmp_path, name)["model"]["stem.1.num_batches_tracked"]
             for name in ("student", "alone")]
    assert steps[0] == steps[1] > 1  # that makes the control fair


def test_every_command_of_the_ablations_table_runs_in_order(chain, toy, tmp_path):
    """Pasted one after the other into one folder: none is refused, each writes its own file."""
    for name in ("inv", "dist"):  # the others are made again, of one epoch
        shutil.copy(chain / f"{name}.pt", tmp_path)
    programs = {f"{module.__name__}.py": module for module, _ in STAGES.values()}
    commands = []
    for row in re.findall(r"^\| \d .*", (HERE / "docs/study.md").read_text(), re.M):
        commands += re.findall(r"`(\w+\.py [^`]*)`", row)
    assert len(commands) == 30
    before = {}
    for command in commands:
        program, *flags = command.split()
        if program.startswith("pretrain") and "--clips" not in flags:
            flags += ["--clips", "2"]
        flags += ["--root", str(toy), "--out", str(tmp_path), "--epochs", "1", "--batch", "12"]
        programs[program].main([*TINY, *flags])
        after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        assert before.items() < after.items(), command
        before = after
    assert len(before) == 2 + 30


def test_settings_can_be_pasted_back(toy, tmp_path, capsys):
    """The printed flags, with another folder, make the same run."""
    run_stage("inv", toy, tmp_path / "a b", "--warmup", 0, "--seed", 0, "--epochs", 1)
    settings = capsys.readouterr().out.split("settings: ")[1].splitlines()[0]
    assert "--warmup 0 " in settings and "--seed 0 " in settings
    flags = shlex.split(settings)
    flags[flags.index("--out") + 1] = str(tmp_path / "again")
    pretrain_inv.main(flags)
    first, second = (load(tmp_path / out, "inv")["args"] for out in ("a b", "again"))
    assert {**first, "out": None} == {**second, "out": None}


@pytest.mark.parametrize("stage", ["inv", "dist"])
def test_stage_1_starts_from_given_weights(stage, toy, tmp_path, capsys, complaint):
    torch.manual_seed(1)
    model = tb.build_model("r3d_tiny", 400)  # as public weights: other classes
    public = tmp_path / "public.pth"
    torch.save({f"module.{k}": w for k, w in model.state_dict().items()}, public)
    run_stage(stage, toy, tmp_path, "--init", public, "--lr", 0, "--epochs", 1)
    assert f"from {public}" in capsys.readouterr().out
    saved = load(tmp_path, stage)["model"]
    for name, weight in model.named_parameters():
        assert name.startswith("fc.") or torch.equal(saved[name], weight), name
    # Without them it is another run.
    assert "init" in complaint(run_stage, stage, toy, tmp_path, "--lr", 0, "--epochs", 1)


# ---- Mistakes ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mistaken(chain, tmp_path_factory):
    """A copy of the chain without student.pt, among files that no stage can use."""
    folder = tmp_path_factory.mktemp("mistaken")
    shutil.copytree(chain, folder, dirs_exist_ok=True)
    (folder / "student.pt").rename(folder / "again.pt")
    (folder / "empty.txt").touch()
    (folder / "broken.pt").write_bytes((folder / "inv.pt").read_bytes()[:5000])
    (folder / "text.pt").write_text("no tensors")
    teacher = load(chain, "inv_ft")
    torch.save({**teacher, "classes": teacher["classes"][:5]}, folder / "other.pt")
    torch.save({**teacher, "finished": False}, folder / "begun.pt")
    torch.save({**teacher, "labeled": teacher["labeled"][1:]}, folder / "fewer.pt")
    return folder


MISTAKES = {  # the flags, and what the line names
    pretrain_inv: {
        "--data ucf102": "--data", "--frames x": "--frames", "--lr nan": "--lr",
        "--batch 1": "--batch 1", "--batch 25": "--batch 25", "--what": "--what",
        "--percent 5": "--percent", "--data ucf101 --root /nowhere": "/nowhere",
        "--init OUT/./inv.pt": "this run writes", "--out OUT/inv.pt/x": "cannot be written"},
    pretrain_dist: {
        "--frames 8": "leave 2 time steps", "--clips 3": "--clips 3",
        "--batch 1 --invariant-weight 1": "--batch 1: Eq. 1",
        "--frames 4 --arch r3d_18": "leave 1 time steps"},  # of one pixel each
    finetune: {
        "--percent 101": "--percent", "--init no.pt": "no.pt", "--out OUT/none": "inv.pt",
        "--init again.pt": "again.pt", "--init broken.pt": "broken.pt",
        "--init text.pt": "text.pt", "--init OUT/empty.txt": "empty.txt",
        "--arch r3d_18": "--arch r3d_18 contradicts inv.pt",
        "--labeled-list no.txt": "no.txt", "--labeled-list OUT/empty.txt": "names no video",
        "--percent 5 --labeled-list no.txt": "--labeled-list"},
    train_student: {
        "--teachers inv.pt dist.pt": "inv.pt", "--teachers inv_ft.pt inv_ft.pt": "--teachers",
        "--teachers other.pt": "classes", "--teachers begun.pt": "unfinished",
        "--teachers inv_ft.pt fewer.pt": "fewer.pt was fine-tuned on different labelled videos",
        "--reweight 2": "--reweight", "--init nothing.pt": "nothing.pt",
        "--percent 50": "--percent 50.0 contradicts inv_ft.pt, made with 6",
        "--subset-seed 1": "--subset-seed 1", "--labeled-list no.txt": "contradicts inv_ft.pt",
        "--batch 25": "unlabelled videos"},
}


@pytest.mark.parametrize("module, flags, word", [
    pytest.param(module, *case, id=f"{module.__name__} {case[0]}")
    for module, cases in MISTAKES.items() for case in cases.items()])
def test_a_mistake_costs_one_line(module, flags, word, mistaken, toy, monkeypatch, complaint):
    """Those of evaluate.py are in test_evaluate.py."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py"])
    argv = [*flags.replace("OUT", str(mistaken)).split(), "--device", "cpu", "--workers", "0"]
    argv += [] if "--out" in argv else ["--out", str(mistaken)]
    argv += [] if "--root" in argv else ["--root", str(toy)]
    argv += ["--restart"] if module in (pretrain_inv, pretrain_dist) else []
    error = complaint(module.main, argv)
    assert word in error and error.startswith(f"{module.__name__}.py: "), error


@pytest.mark.parametrize("data, stage, expected", [
    ("ucf101", "pretrain_inv", "frames 16 stride 1 clips 4 batch 40 epochs 250"),
    ("kinetics400", "pretrain_dist", "frames 16 stride 1 clips 4 batch 40 epochs 100"),
    ("ucf101", "finetune", "frames 8 stride 2 percent 5 batch 16 epochs 150"),
    ("hmdb51", "student", "frames 8 stride 2 percent 40 batch 16 epochs 150")])
def test_the_defaults_are_the_paper_s(data, stage, expected):
    argv = ["--data", data, "--device", "cpu"]
    args, _, _ = tb.start(tb.stage_parser(stage, ""), stage, argv)
    expected += " arch slow_r50 size 224 lr 0.001 warmup 10 patience 5"
    for key, value in zip(expected.split()[::2], expected.split()[1::2]):
        assert str(getattr(args, key)) == value, key


def test_toy_trains_in_float32_where_bf16_is_the_default(monkeypatch):
    """And its recipe has the last word on what the parser has a default for, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    for data, expected in {"toy": ("fp32", 24, 2), "ucf101": ("bf16", 224, 10)}.items():
        argv = ["--data", data, "--device", "cpu"]
        args, _, _ = tb.start(tb.stage_parser("finetune", ""), "finetune", argv)
        assert (args.precision, args.size, args.warmup) == expected


def test_bf16_on_a_cpu_needs_amx(toy, tmp_path, monkeypatch, complaint):
    """Elsewhere oneDNN's gradients of convolutions over two time steps are wrong."""
    monkeypatch.setattr(torch.cpu, "get_capabilities",
                        lambda: {"avx512_bf16": True, "amx_bf16": False})
    error = complaint(run_stage, "inv", toy, tmp_path, "--precision", "bf16")
    assert "--precision fp32" in error
