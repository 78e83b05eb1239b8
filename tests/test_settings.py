"""Settings: what a run takes from its data set, its flags and earlier checkpoints; mistakes in
them cost one line, and exit status 2; every command of the table of ablations runs."""

import re
import shutil

import pytest
import torch

import finetune
import pretrain_dist
import pretrain_inv
import train_student
from test_common import HERE, TINY, load, run_stage


@pytest.mark.parametrize("videos, flags, batch, epochs", [
    (100, [], 8, 416), (100, ["--batch", "20"], 20, 1000), (999, [], 8, 250),
    (1000, [], 40, 250)])
def test_a_small_folder_has_small_batches_and_5000_steps(videos, flags, batch, epochs, tmp_path,
                                                         capsys):
    """By the settings that it prints, before it finds out that all videos are empty."""
    (tmp_path / "train/c").mkdir(parents=True)
    for i in range(videos):
        (tmp_path / f"train/c/{i}.mp4").touch()
    with pytest.raises(SystemExit):
        pretrain_inv.main(["--data", "folder", "--root", str(tmp_path), "--arch", "r3d_tiny",
                           "--device", "cpu", "--precision", "fp32", "--workers", "0",
                           "--out", str(tmp_path), *flags])
    settings = capsys.readouterr().out.split("settings:")[1]
    assert f"--batch {batch} " in settings and f"--epochs {epochs} " in settings


def test_later_stages_take_settings_from_checkpoints(chain, toy, tmp_path, capsys):
    shutil.copy(chain / "inv.pt", tmp_path)
    finetune.main(["--init", "inv.pt", "--epochs", "1", "--batch", "8", "--device", "cpu",
                   "--workers", "0", "--out", str(tmp_path)])
    made = load(chain, "inv")["args"]
    taken = load(tmp_path, "inv_ft")["args"]
    assert all(taken[key] == made[key] for key in ("data", "root", "arch", "size"))
    assert "--size 16" in capsys.readouterr().out


def test_every_command_of_the_ablations_table_runs_in_order(chain, toy, tmp_path):
    """Pasted one after the other into one folder: none is refused, each writes its own file."""
    for name in ("inv", "dist", "inv_ft", "dist_ft", "student"):  # the first line's
        shutil.copy(chain / f"{name}.pt", tmp_path)
    programs = {"pretrain_inv.py": pretrain_inv, "pretrain_dist.py": pretrain_dist,
                "finetune.py": finetune, "train_student.py": train_student}
    text = "".join(path.read_text() for path in sorted(HERE.glob("*/*.md")))
    commands = []
    for row in re.findall(r"^\| \d \(?.*?$", text, re.M):
        commands += re.findall(r"`(\w+\.py [^`]*)`", row)
    assert len(commands) == 30
    for command in commands:
        program, *flags = command.split()
        if program.startswith("pretrain") and "--clips" not in flags:
            flags += ["--clips", "2"]
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        programs[program].main([*TINY, "--root", str(toy), "--out", str(tmp_path), *flags])
        assert before.items() <= {
            path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}.items()
    assert len(list(tmp_path.glob("*.pt"))) == 5 + 30 - 2  # two teachers were there


# ---- Mistakes ------------------------------------------------------------------------------------

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


MISTAKES = {  # the flags, and what the line names
    pretrain_inv: {
        "--data ucf102": "--data", "--frames x": "--frames", "--lr nan": "--lr",
        "--batch 25": "--batch 25", "--what": "--what", "--percent 5": "--percent",
        "--data ucf101 --root /nowhere": "/nowhere",
        "--data kinetics400 --root OUT/hollow": "no training videos",
        "--out OUT/inv.pt/x": "cannot be written"},
    pretrain_dist: {"--frames 8": "--frames 8", "--clips 3": "--clips 3"},
    finetune: {
        "--percent 101": "--percent", "--init no.pt": "no.pt", "--out OUT/none": "pretrain_inv.py",
        "--init again.pt": "again.pt", "--init OUT/bad/broken.pt": "broken.pt",
        "--init OUT/bad/text.pt": "text.pt", "--size 24": "--size",
        "--labeled-list no.txt": "no.txt", "--labeled-list OUT/empty/list.txt": "names no video",
        "--percent 5 --labeled-list no.txt": "--labeled-list"},
    train_student: {
        "--teachers inv.pt dist.pt": "inv.pt", "--teachers inv_ft.pt inv_ft.pt": "--teachers",
        "--teachers OUT/bad/other.pt": "classes", "--reweight 2": "--reweight",
        "--init nothing.pt": "nothing.pt", "--percent 50": "--percent",
        "--batch 25": "unlabelled videos"},
}


@pytest.mark.parametrize("module, flags, word", [
    pytest.param(module, *case, id=f"{module.__name__} {case[0]}")
    for module, cases in MISTAKES.items() for case in cases.items()])
def test_a_mistake_costs_one_line(module, flags, word, mistaken, toy, complaint):
    """Those of evaluate.py are in test_evaluate.py."""
    argv = [*flags.replace("OUT", str(mistaken)).split(), "--device", "cpu"]
    argv += [] if "--out" in argv else ["--out", str(mistaken)]
    argv += [] if "--root" in argv else ["--root", str(toy)]
    argv += ["--restart"] if module in (pretrain_inv, pretrain_dist) else []
    error = complaint(module.main, argv)
    assert word in error and error.startswith(module.__name__)


def test_bf16_on_a_cpu_needs_amx(toy, tmp_path, monkeypatch, complaint):
    """Elsewhere oneDNN's gradients of convolutions over two time steps are wrong."""
    monkeypatch.setattr(torch.cpu, "get_capabilities",
                        lambda: {"avx512_bf16": True, "amx_bf16": False})
    error = complaint(run_stage, "inv", toy, tmp_path, "--precision", "bf16")
    assert "--precision fp32" in error
