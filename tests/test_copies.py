"""Blocks that several scripts hold word for word: `# Copied from home.py::name` above a copy, checked here.

    python tests/test_copies.py          # say what has drifted
    python tests/test_copies.py --fix    # rewrite every copy from its home
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"# (Copied|Adapted) from (\w+\.py)::(\w+)(: \S.*)?")
EACH_ITS_OWN = {"Args", "State", "main", "check", "evaluate", "accumulate_gradients"}  # every script has its own


def definitions(source):
    """name -> (first line with its decorators, last line) of the top-level functions and classes, from 1."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno
    return found


def check(sources):
    """Complaints about the markers and copies in {file name: source}, one line each."""
    complaints, blocks, markers = [], {}, {}
    for name, source in sources.items():
        lines = source.splitlines()
        for defined, (first, last) in definitions(source).items():
            blocks[name, defined] = "\n".join(lines[first - 1:last]), first
        starts = {first: defined for (file, defined), (_, first) in blocks.items() if file == name}
        for number, line in enumerate(lines, 1):
            if not re.match(r"\s*#\s*(copied|adapted) from\b", line, re.IGNORECASE):
                continue
            match, place = MARKER.fullmatch(line), f"{name}:{number}"
            if not match:
                complaints.append(f"{place}: malformed marker {line.strip()!r}")
            elif number + 1 not in starts:
                complaints.append(f"{place}: the marker does not stand directly above a definition")
            elif match[1] == "Copied" and starts[number + 1] != match[3]:
                complaints.append(f"{place}: the marker names {match[3]}, "
                                  f"below it stands {starts[number + 1]}")
            elif match[1] == "Adapted" and not match[4]:
                complaints.append(f"{place}: an adapted block says why: "
                                  f"'# Adapted from {match[2]}::{match[3]}: reason'")
            else:
                markers[name, starts[number + 1]] = match[1], match[2], match[3], number
    for (name, defined), (kind, home, original, number) in markers.items():
        place = f"{name}:{number}"
        if (home, original) not in blocks:
            complaints.append(f"{place}: {home}::{original} does not exist")
        elif markers.get((home, original), ("",))[0] == "Copied":
            complaints.append(f"{place}: {home}::{original} is itself a copy; name its home")
        elif kind == "Copied" and blocks[name, defined][0] != blocks[home, original][0]:
            complaints.append(f"{place}: {defined} differs from {home}::{original} "
                              "(python tests/test_copies.py --fix)")
    homes = {}
    for (name, defined) in blocks:
        if (name, defined) not in markers and defined not in EACH_ITS_OWN:
            homes.setdefault(defined, []).append(name)
    complaints += [f"{', '.join(names)}: all define {defined}, and no marker says which is the home"
                   for defined, names in homes.items() if len(names) > 1]
    return complaints


def fix(sources):
    """The sources with every copy rewritten from its home."""
    fixed = {}
    for name, source in sources.items():
        lines = source.splitlines()
        for first, last, block in sorted(_replacements(sources, source), reverse=True):
            lines[first - 1:last] = block
        fixed[name] = "\n".join(lines) + "\n"
    return fixed


def _replacements(sources, source):
    lines = source.splitlines()
    for defined, (first, last) in definitions(source).items():
        match = MARKER.fullmatch(lines[first - 2]) if first > 1 else None
        if match and match[1] == "Copied" and match[2] in sources:
            home = definitions(sources[match[2]]).get(match[3])
            if home:
                yield first, last, sources[match[2]].splitlines()[home[0] - 1:home[1]]


def read_scripts():
    return {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}


def test_copies_equal_their_homes():
    assert check(read_scripts()) == []


HOME = "import torch\n\n\n@torch.no_grad()\ndef f(x):\n    # why\n    return x\n\n\ndef g():\n    pass\n"
COPY = "# Copied from a.py::f\n@torch.no_grad()\ndef f(x):\n    # why\n    return x\n"


def complaint(copy, home=HOME, **more):
    found = check({"a.py": home, "b.py": copy, **more})
    return found[0] if found else ""


def test_a_true_copy_passes():
    assert complaint(COPY) == ""


def test_a_changed_comment_is_drift():
    assert "differs" in complaint(COPY.replace("# why", "# because"))


def test_a_changed_decorator_is_drift():
    assert "differs" in complaint(COPY.replace("@torch.no_grad()\n", ""))


def test_malformed_marker():
    assert "malformed" in complaint(COPY.replace("a.py::f", "a.py: f"))
    assert "malformed" in complaint(COPY.replace("# Copied", "#copied"))


def test_misplaced_marker():
    assert "directly above" in complaint(COPY.replace("::f\n", "::f\n\n"))
    assert "below it stands" in complaint(COPY.replace("::f\n", "::g\n"))


def test_missing_home():
    assert "does not exist" in complaint(COPY.replace("a.py", "c.py"))
    assert "does not exist" in complaint(COPY.replace("a.py::f", "a.py::h").replace("def f", "def h"))


def test_copy_of_a_copy():
    found = check({"a.py": HOME, "b.py": COPY, "c.py": COPY.replace("a.py", "b.py")})
    assert any("itself a copy" in line for line in found)


def test_same_name_without_a_marker():
    assert "no marker" in complaint(COPY.split("\n", 1)[1])
    assert complaint("class Args:\n    pass\n", home="class Args:\n    x = 1\n") == ""


def test_adapted_needs_a_reason():
    adapted = COPY.replace("# Copied from a.py::f", "# Adapted from a.py::f").replace("return x", "return -x")
    assert "says why" in complaint(adapted)
    assert complaint(adapted.replace("a.py::f", "a.py::f: the sign")) == ""


def test_fix_rewrites_the_copy_alone():
    drifted = "x = 1\n\n\n" + COPY.replace("return x", "# more\n    return 2 * x") + "\n\ny = 2\n"
    fixed = fix({"a.py": HOME, "b.py": drifted})
    assert fixed["a.py"] == HOME
    assert fixed["b.py"] == "x = 1\n\n\n" + COPY + "\n\ny = 2\n"


ABOVE = {"grpo.py": 500, "ppo.py": 620, "star.py": 580, "dpo.py": 420, "eval.py": 420, "reward_model.py": 340,
         "sft.py": 240}  # lines of the method, above the ruled line
RULE = ("# Shared blocks, word for word in every script that has them (tests/test_copies.py): LoRA, log-probs, "
        "sampler")


@pytest.mark.parametrize("name", ABOVE)
def test_a_script_is_short_enough_to_read_whole(name):
    """Its method, its main (flat: no function in it), its blocks; no line longer than 110 columns."""
    source = (ROOT / name).read_text(encoding="utf-8")
    lines = source.splitlines()
    assert lines.index(RULE) - 1 <= ABOVE[name] and len(lines) - lines.index(RULE) <= 650
    main = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno < 125
    inside = [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert inside == [main]
    for path in (ROOT / name, *(ROOT / "common").glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [f"{path.name}: {line}" for line in lines if len(line) > 110] == []


if __name__ == "__main__":
    if "--fix" in sys.argv:
        for name, text in fix(read_scripts()).items():
            (ROOT / name).write_text(text)
    complaints = check(read_scripts())
    print("\n".join(complaints) or "every copy equals its home")
    sys.exit(bool(complaints))
