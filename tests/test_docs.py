"""The documentation against the code: commands, options, links, paths and Python names that it shows exist.

Nothing is run, and of the package only the command line's definitions are imported: names are looked up in
the source, which is quick and needs no torch.
"""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer.main

import brainfound
from brainfound.cli.main import app
from brainfound.recipes import available

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "train", "adapters", "data", "model_cards", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
RECIPES = sorted(file for folder in ("train", "adapters") for file in (ROOT / folder).rglob("*.[ys]*"))
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"^(?:accelerate launch .*-m )?brainfound (.+)$")


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str = "") -> list[str]:
    return [content for name, content in _FENCE.findall(read(page)) if name == language]


def spans(text: str) -> list[str]:
    """What stands between backticks in prose, on one line each."""
    return [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", text))]


def commands(lines: list[str]) -> list[str]:
    joined = "\n".join(lines).replace("\\\n", " ")
    found = (_COMMAND.match(" ".join(line.split())) for line in joined.splitlines())
    return [match.group(1) for match in found if match]


def shown_commands(page: Path) -> list[str]:
    return commands([line for block in blocks(page) for line in block.splitlines()])


def mentioned_commands(page: Path) -> list[str]:
    lines = [line.strip("# ") for line in read(page).splitlines()] if page in RECIPES else spans(read(page))
    return [command for command in commands(lines) if not command.startswith(("VERB", "-"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def labelled(pages: list[Path], find) -> list:
    return [pytest.param(item, id=f"{name_of(page)}: {item}") for page in pages for item in find(page)]


@pytest.mark.parametrize("command", labelled(PAGES, shown_commands))
def test_a_command_in_a_block_parses(command):
    verb, *arguments = shlex.split(command, comments=True)
    assert verb in VERBS
    # Parses and checks types and required arguments; invokes nothing.
    context = VERBS[verb].make_context(verb, list(arguments))
    recipe = context.params.get("recipe")
    if recipe and recipe != recipe.upper():
        assert recipe in available("train")
    for adapter in context.params.get("adapter") or ():
        # NAME=ADAPTER,KEY=VALUE: see `brainfound.experiments.systems`.
        assert adapter.partition(",")[0].rpartition("=")[2] in available("adapters")


@pytest.mark.parametrize("command", labelled([*PAGES, *RECIPES], mentioned_commands))
def test_a_command_in_passing_names_a_verb_and_its_options(command):
    verb, *rest = command.partition(" #")[0].split()
    assert verb in VERBS
    known = {"--help", *(option for parameter in VERBS[verb].params for option in parameter.opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


def test_commands_were_found():
    assert len(shown_commands(ROOT / "README.md")) >= 6
    assert {command.split()[0] for command in shown_commands(ROOT / "docs" / "reference" / "cli.md")} == set(VERBS)


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"demo"}))
def test_every_option_is_documented(verb):
    sections = re.split(r"^## ", read(ROOT / "docs" / "reference" / "cli.md"), flags=re.MULTILINE)
    shared, *named = sections
    section = next(text for text in named if verb in re.split(r"[,\s]+", text.partition("\n")[0]))
    options = [parameter.opts[0] for parameter in VERBS[verb].params if parameter.opts[0].startswith("--")]
    assert [option for option in options if f"`{option}`" not in shared + section] == []


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", read(page)))
    return [link for link in found if not re.match(r"[a-z]+:|\$", link)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(target), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_are_named_exist(page):
    folders = "|".join(("brainfound", "tests", *FOLDERS))
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]+\.(?:py|md|yaml|sbatch)", read(page))
    named += re.findall(r"(?<![\w/])(?:constraints\.txt|Makefile|pyproject\.toml)", read(page))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert len(sizes) >= 6
    assert max(sizes.values()) < 300_000
    assert sum(sizes.values()) < 1_500_000


def test_every_page_is_in_the_index():
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs" / "index.md")}
    assert [name_of(page) for page in PAGES if page.parent.parent == ROOT / "docs" and page not in listed] == []


def test_make_targets_exist():
    code = [text for page in PAGES for text in (*blocks(page), *spans(read(page)))]
    named = {target for text in code for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    assert named <= set(targets)


def paths_of_tree(tree: str) -> list[str]:
    """The files and folders that an indented tree names, each under the folder that it is indented below.

    Further names on a line stand next to the first one; words in backticks are modules in the folder of the line.
    """
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        above = [(depth, folder) for depth, folder in above if depth < indent]
        here = "".join(folder for _, folder in above)
        names = re.findall(r"(?<![\w/.])\w+(?:\.py\b|/)", line)
        paths += [here + name for name in names]
        inside = here + names[0] if names and names[0].endswith("/") else here
        paths += [f"{inside}{name}.py" for name in re.findall(r"`(\w+)`", line)]
        if inside != here:
            above.append((indent, names[0]))
    return paths


def test_rooms_in_the_architecture_exist():
    text = read(ROOT / "docs" / "architecture.md")
    tree = text.partition("## Rooms")[2].partition("```\n")[2].partition("```")[0]
    named = paths_of_tree(tree)
    assert {"brainfound/data/sources/words.py", "brainfound/pretraining/monitoring/", "brainfound/demo.py"} <= {*named}
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


# Python: a name is looked up in the source of the module that defines it.


def source_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@cache
def tree_of(module: str) -> ast.Module:
    file = source_of(module)
    assert file is not None, module
    return ast.parse(read(file))


def lookup(module: str, name: str) -> tuple[str, ast.AST] | str:
    """Where a module's name is defined, as (module, definition), or the submodule of that name."""
    if module == "brainfound" and name in brainfound._MODULES:
        return lookup(brainfound._MODULES[name], name)
    for node in tree_of(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == name or any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("brainfound"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return lookup(node.module, alias.name)
    assert source_of(f"{module}.{name}"), f"{module} has no {name}"
    return f"{module}.{name}"


def member(module: str, owner: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
    """A method or field of a class or of its bases; None where a base is another library's."""
    for node in owner.body:
        if name in (getattr(node, "name", None), getattr(getattr(node, "target", None), "id", None)):
            return module, node
    for base in (base.id for base in owner.bases if isinstance(base, ast.Name)):
        try:
            found = lookup(module, base)
        except AssertionError:
            return None
        return member(*found, name) if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef) else None
    raise AssertionError(f"{owner.name} has no {name}")


def resolve(dotted: list[str]) -> tuple[str, ast.AST] | str | None:
    found: tuple[str, ast.AST] | str | None = "brainfound"
    for name in dotted[1:]:
        if isinstance(found, str):
            if found == "brainfound":
                assert name in brainfound.__all__ or source_of(f"brainfound.{name}"), f"brainfound has no {name}"
            found = lookup(found, name)
        elif found and isinstance(found[1], ast.ClassDef):
            found = member(found[0], found[1], name)
        else:
            return None
    return found


def signature(found: tuple[str, ast.AST] | str | None) -> ast.arguments | None:
    """The arguments of what is called; of a room that is a verb, those of the function behind it; of a class with an
    ``__init__`` of its own, those of that."""
    if isinstance(found, str):
        calls = [node for node in ast.walk(tree_of(found)) if isinstance(node, ast.Call)]
        (call,) = [node for node in calls if chain(node.func) == ["make_callable"]]
        module, _, name = ast.literal_eval(call.args[1]).partition(":")
        found = lookup(module, name)
    if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef):
        made = [node.args for node in found[1].body if getattr(node, "name", None) == "__init__"]
        return made[0] if made else None  # type: ignore[union-attr]
    return found[1].args if isinstance(found, tuple) and isinstance(found[1], ast.FunctionDef) else None


def chain(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return [*before, node.attr] if before else []
    return [node.id] if isinstance(node, ast.Name) else []


def python_blocks(page: Path) -> list[str]:
    return [block for block in blocks(page, "python") if "$" not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_blocks_use_names_and_arguments_that_exist(page):
    for block in python_blocks(page):
        known: dict[str, tuple[str, ast.AST] | str | None] = {}
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "brainfound":
                for alias in node.names:
                    known[alias.asname or alias.name] = resolve([*node.module.split("."), alias.name])
        for node in ast.walk(tree):
            names = chain(node)
            if names[:1] in (["brainfound"], ["bf"]):
                resolve(names)
            if isinstance(node, ast.Call):
                names = chain(node.func)
                found = resolve(names) if names[:1] in (["brainfound"], ["bf"]) else known.get(".".join(names))
                arguments = signature(found) if found else None
                if arguments and not arguments.kwarg:
                    accepted = {a.arg for a in [*arguments.args, *arguments.kwonlyargs]}
                    assert {keyword.arg for keyword in node.keywords} <= accepted, ast.unparse(node)
                if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef) and not arguments:
                    for keyword in node.keywords:
                        assert member(*found, str(keyword.arg)), ast.unparse(node)


def test_the_api_page_names_everything_public():
    text = read(ROOT / "docs" / "reference" / "python-api.md")
    assert [name for name in brainfound.__all__ if name != "__version__" and f"`{name}" not in text] == []


@pytest.mark.parametrize("name", ["prepare", "pretrain", "finetune", "evaluate", "predict", "load"])
def test_signatures_on_the_api_page_are_those_of_the_code(name):
    shown = [span for span in spans(read(ROOT / "docs" / "reference" / "python-api.md")) if span.startswith(f"{name}(")]
    assert shown
    (function,) = ast.parse(f"def {shown[0]}: ...").body
    actual = signature(resolve(["brainfound", name]))
    assert actual is not None
    for arguments in (function.args, actual):  # type: ignore[attr-defined]
        for argument in (*arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
    assert ast.unparse(function.args) == ast.unparse(actual)  # type: ignore[attr-defined]
