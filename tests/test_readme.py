"""README.md and docs/: commands, flags, links and code blocks are what the code has."""

import ast
import contextlib
import importlib
import io
import re
import shlex

import pytest

import common as tb
from test_common import HERE

PAGES = [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md"))]
STAGES = ["pretrain_inv.py", "pretrain_dist.py", "finetune.py", "train_student.py", "evaluate.py"]
STUDY = ["draw", "intervals", "unlabeled", "weight"]
SCRIPTS = [*STAGES, *(f"docs/study/{name}.py" for name in STUDY)]
MODULES = {name: importlib.import_module(name[:-3].replace("/", ".")) for name in SCRIPTS}
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
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as end:
        MODULES[script].main([*flags, "--help"])
    assert not end.value.code
    return set(re.findall(r"^  (?:-h, )?(--[a-z][a-z-]*)", text.getvalue(), re.M))


def check(found):
    for script, flags in found:
        known = flags_of(script, *flags)
        assert {flag for flag in flags if flag.startswith("--")} <= known, (script, flags)


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_parsed(page):
    found = commands_of(page)
    assert len(found) >= {"README.md": 20, "study.md": 30, "performance.md": 1}.get(page.name, 0)
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


def test_one_file_is_classified_as_by_evaluate(chain, toy, tmp_path, monkeypatch, capsys):
    _, code = blocks((HERE / "README.md").read_text(), "python")
    video = tb.read_videos("toy", toy, False).path(0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(chain)
    (tmp_path / "a.avi").symlink_to(video)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = ast.literal_eval(capsys.readouterr().out)
    MODULES["evaluate.py"].main([
        "--checkpoint", "runs/toy", "--videos", "a.avi", "--output", "out", "--clips", "1",
        "--scales", "1", "--precision", "fp32", "--device", "cpu", "--workers", "0"])
    rows = (tmp_path / "out/predictions.csv").read_text().splitlines()[1:]
    assert {row.split(",")[3]: float(row.split(",")[4]) for row in rows} == found


def test_the_pieces_run_as_they_stand():
    code, _ = blocks((HERE / "README.md").read_text(), "python")
    names = {}
    exec(code, names)
    shapes = {"x": (80, 3, 16, 24, 24), "f": (80, 96, 4), "slices": (64, 96), "z": (8, 4, 128),
              "C": (8, 4, 4), "s": (8,), "p_inv": (8, 8)}
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    loss = names["loss_inv"] + names["loss_dist"] + names["loss_student"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
