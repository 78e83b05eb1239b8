"""README.md and docs/: commands, flags, links and code blocks are what the code has."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import common as tb

HERE = Path(__file__).resolve().parents[1]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
STAGES = ["pretrain_inv.py", "pretrain_dist.py", "finetune.py", "train_student.py", "evaluate.py"]
SCRIPTS = [*STAGES, "docs/draw.py", "docs/intervals.py", "docs/unlabeled.py"]
OTHERS = {  # flags of torchrun, docker and argparse
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts",
    "--shm-size", "--help"}


def blocks(text, language=""):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def spans(text):
    """The pieces of code inside its sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def load_script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, HERE / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {name: load_script(name) for name in SCRIPTS}


def commands(lines):
    """(script, flags) of every line that starts one, with or without torchrun."""
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
        if words[:1] == ["python"] and words[1] not in ("-c", "-m"):
            found.append((words[1], [word for word in words[2:] if word != "..."]))
    return found


def commands_of(page):
    text = page.read_text()
    lines = []
    for block in blocks(text):
        lines += re.split(r"\n|&&", block.replace("\\\n", " "))
    lines = [line.strip() for line in lines]
    for span in spans(text):
        lines.append(f"python {span}" if span.split()[0] in SCRIPTS else span)
    return commands(line for line in lines if re.match(r"(python|torchrun) (?!-[cm])", line))


def flags_of(script, *flags):
    """The flags that --help names, behind others, which must be right: main() would exit with 2."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        MODULES[script].main([*flags, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.getvalue().split("\n\n", 1)[0]))


def check(found):
    for script, flags in found:
        known = flags_of(script, *flags)
        assert {flag for flag in flags if flag.startswith("--")} <= known, (script, flags)


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_parsed(page):
    found = commands_of(page)
    assert len(found) >= {"README.md": 25, "study.md": 32, "performance.md": 2}.get(page.name, 0)
    check(command for command in found if command[0] != "arrange_by_classes.py")  # Kinetics' own


@pytest.mark.parametrize("script", STAGES)
def test_every_command_in_a_docstring_can_be_parsed(script):
    lines = [line.strip() for line in MODULES[script].__doc__.splitlines()]
    found = commands(line for line in lines if line.startswith(("python ", "torchrun ")))
    assert len(found) == 3 and {name for name, _ in found} == {script}
    check(found)


def test_every_flag_in_a_sentence_exists():
    known = set().union(OTHERS, *map(flags_of, SCRIPTS))
    for page in PAGES:
        for span in spans(page.read_text()):
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span))
            assert named <= known, (page.name, span)


# ---- Links and code blocks -----------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path = link.partition("#")[0]
        assert link.startswith("https://") or (page.parent / path).exists(), link


def test_the_pieces_run_as_they_stand():
    [code] = blocks((HERE / "README.md").read_text(), "python")
    names = {}
    exec(code, names)
    shapes = {"x": (80, 3, 16, 24, 24), "f": (80, 96, 4), "slices": (64, 96), "z": (8, 4, 128),
              "C": (8, 4, 4), "s": (8,), "p_inv": (8, 8)}
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    loss = names["loss_inv"] + names["loss_dist"] + names["loss_student"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.abs().sum() > 0 for p in names["model"].parameters())


# ---- Lines of a shell ----------------------------------------------------------------------------

# In the place of these programs: no network, and archives are zip files under other names.
UNPACKER = f"""
args=()
for a in "$@"; do case $a in -*|x) ;; *) args+=("$a");; esac; done
while [ $# -gt 1 ]; do [ $1 = -d ] && args[1]=$2; shift; done
exec {sys.executable} -m zipfile -e "${{args[0]}}" "${{args[1]:-.}}"
"""
PROGRAMS = {
    "unrar": UNPACKER,
    "unzip": UNPACKER,
    "wget": 'for a in "$@"; do case $a in -*) ;; *) cp "$ARCHIVES/${a##*/}" . || exit;; esac; done',
}


def pack(path, files):
    """A zip file of {name: content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def make_archives(data, folder):
    """What the sites of a data set give: one training and one test video of a class."""
    if data == "ucf101":
        pack(folder / "UCF101.rar", {"UCF-101/Ring/a.avi": "", "UCF-101/Ring/b.avi": ""})
        pack(folder / "UCF101TrainTestSplits-RecognitionTask.zip", {
            "ucfTrainTestlist/classInd.txt": "1 Ring",
            "ucfTrainTestlist/trainlist01.txt": "Ring/a.avi 1",
            "ucfTrainTestlist/testlist01.txt": "Ring/b.avi"})
    else:
        pack(folder / "c.rar", {"brush_hair/a.avi": "", "brush_hair/b.avi": ""})
        pack(folder / "hmdb51_org.zip", {"hmdb51/brush_hair.rar": (folder / "c.rar").read_bytes()})
        pack(folder / "test_train_splits.zip", {
            "test_train_splits/testTrainMulti_7030_splits/brush_hair_test_split1.txt":
            "a.avi 1\nb.avi 2"})


@pytest.mark.parametrize("data, c", [("ucf101", "Ring"), ("hmdb51", "brush_hair")])
def test_downloads_make_a_tree_that_is_read(data, c, tmp_path):
    [lines] = [block for block in blocks((HERE / "README.md").read_text())
               if block.startswith("mkdir -p data") and f"data/{data}" in block]
    make_archives(data, tmp_path / "archives")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    env = os.environ | {"ARCHIVES": str(tmp_path / "archives"),
                        "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", lines], cwd=tmp_path, env=env, check=True)
    for train, name in [(True, "a.avi"), (False, "b.avi")]:
        assert tb.read_videos(data, tmp_path / "data" / data, train).names() == [f"{c}/{name}"]
