"""Every page does what it shows: commands, output, Python, links, and the picture of the house."""

from __future__ import annotations

import ast
import doctest
import hashlib
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import loratools
from loratools.cli import options
from loratools.cli.main import ALIASES, COMMANDS, cli
from loratools.operations.formats import formats
from loratools.operations.merge import merge
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT, blocks, run, same, steps

ALL = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"`loratools ([a-z-]+)")


def digest(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_happens(page: Path, workplace: Path, example_files: Path) -> None:
    before, globs, wrong = digest(example_files), dict[str, object](), list[str]()
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "console":
            for step in steps(block):
                code, printed = run(step)
                if code != step.exit_code:
                    wrong.append(f"{where}: {step.command}: exit code {code}\n" + "\n".join(printed))
                elif not same(step.shown, printed):
                    wrong.append(f"{where}: {step.command} prints\n" + "\n".join(printed))
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, globs, where, str(page), block.line)
            told: list[str] = []
            doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
            globs, wrong = test.globs, [*wrong, *told]
    assert not wrong, "\n\n".join(wrong) + "\n\npython -m tests.docs.regenerate writes what the commands print now"
    assert digest(example_files) == before, "a command changed its input"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_console_blocks(page: Path) -> None:
    """A command in any other block would not be run."""
    for block in blocks(page):
        if block.language != "console":
            assert not [line for line in block.lines if line.startswith(("loratools ", "$ loratools "))], f"{page.name}:{block.line}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_page(name: str) -> None:
    """A page of its own that runs it, or (formats, env) a place in the index that does."""
    page = ROOT / "docs" / f"{name}.md"
    if page.name in pages.GENERATED or not page.exists():
        page = ROOT / "docs" / "index.md"
    run_there = {step.words[1] for block in blocks(page) if block.language == "console" for step in steps(block)}
    assert name in run_there
    assert f"[{name}]({name}.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8") or name == "env"


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_only_commands_that_exist_are_named(page: Path) -> None:
    assert set(_COMMAND.findall(page.read_text(encoding="utf-8"))) <= {*COMMANDS, *ALIASES}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_index() -> None:
    linked = set(_LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"index.md"} <= linked


# command → what is run to see all keys its JSON object can have
RUNS = {
    "inspect": ["broken.safetensors --modules --hashes"],
    "convert": ["style.safetensors --to diffusers --dry-run"],
    "compare": ["style.safetensors style.safetensors --modules"],
    "combine": ["tenth.safetensors tenth.safetensors both.safetensors --dry-run"],
    "merge": [
        "corner-sd15.safetensors ink.safetensors planned.safetensors --dry-run",
        "corner-sd15.safetensors ink.safetensors merged.safetensors --verify --residual rest.safetensors",
    ],
    "extract": [
        "corner-sd15.safetensors tuned-sd15.safetensors planned.safetensors --dry-run",
        "corner-sd15.safetensors tuned-sd15.safetensors difference.safetensors",
    ],
    "resize": ["style.safetensors smaller.safetensors --rank 2 --dry-run"],
    "rescale-alpha": ["tenth.safetensors ten.safetensors --alpha rank --dry-run"],
    "metadata": ["chat-peft"],
}


@pytest.mark.parametrize("name", [name for name in COMMANDS if (ROOT / "docs" / f"{name}.md").exists() and name != "formats"])
def test_a_page_lists_the_json_keys(name: str, workplace: Path) -> None:
    """The table under "JSON" names every key of the object, and no other."""
    if name == "extract":
        _tuned(workplace)
    objects = [json.loads(CliRunner().invoke(cli, [name, *shlex.split(line), "--json"]).stdout) for line in RUNS[name]]
    section = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").partition("## JSON")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert listed - {"checkpoint"} == {key for found in objects for key in found}


def test_the_table_of_functions_has_their_parameters() -> None:
    """docs/api.md names every public function, with all of its parameters and no other."""
    rows = dict(re.findall(r"^\| `loratools\.(\w+)\(([^)]*)\)`", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    assert rows.keys() == {name for name in loratools.__all__ if callable(getattr(loratools, name))}
    for name, listed in rows.items():
        given = [word.partition("=")[0].strip() for word in listed.split(",")]
        assert {word for word in given if word != "*"} == set(inspect.signature(getattr(loratools, name)).parameters), name


# architecture → what the README calls it
CALLED = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 1, 2",
    "sdxl": "XL (base",
    "sdxl-refiner": "refiner)",
    "sd3": "3 and 3.5",
    "flux": "Flux.1",
    "chroma": "Chroma",
    "wan": "Wan 2.1 and 2.2",
    "lumina2": "Lumina-Image 2",
    "llm": "language models",
    "flux2": "Flux.2",
    "hunyuan-video": "HunyuanVideo",
    "framepack": "FramePack",
    "hunyuan-image": "HunyuanImage",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "ltx-video": "LTX-Video",
    "hidream": "HiDream",
    "krea2": "Krea 2",
    "cascade": "Stable Cascade",
}


def test_the_readme_names_every_dialect_and_architecture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Dialects")[2].partition("\n## ")[0]
    known = formats()
    rows = text.partition("Converted:")[0]
    named = {name for line in rows.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])}
    named |= set(re.findall(r"`([a-z-]+)`", rows.partition("\nand ")[2]))
    assert named == {dialect["name"] for dialect in known["dialects"]}
    converted, recognised = " ".join(text.partition("Converted:")[2].split()).split("Recognised")
    assert CALLED.keys() == {architecture["name"] for architecture in known["architectures"]}
    for architecture in known["architectures"]:
        assert CALLED[architecture["name"]] in (converted if architecture["supported"] else recognised)


# name in the examples of `--help` → the file that plays it
CAST = {
    "style.diffusers.safetensors": "style.safetensors",
    "a.safetensors": "style.safetensors",
    "b.safetensors": "style-weak.safetensors",
    "lycoris.safetensors": "paper-loha.safetensors",
    "peft_folder": "sketch-peft",
    "adapter_folder": "sketch-peft",
}
# and where a base is among them: adapters that fit it
CAST_OF_MERGE = {
    "sd_xl_base_1.0.safetensors": "corner-sd15.safetensors",
    "base.safetensors": "corner-sd15.safetensors",
    "merged.safetensors": "corner-sd15.safetensors",
    "pipeline_folder": "corner-pipeline",
    "llama_folder": "chat-base",
    "style.safetensors": "ink.safetensors",
    "face.safetensors": "portrait-dora.safetensors",
    "adapter_folder": "chat-peft",
}


CAST_OF_EXTRACT = {
    **CAST_OF_MERGE,
    "tuned.safetensors": "tuned-sd15.safetensors",
    "tuned_pipeline_folder": "tuned-pipeline",
    "tuned_folder": "tuned-chat",
}
TUNED = {
    "tuned-sd15.safetensors": ("corner-sd15.safetensors", "ink.safetensors"),
    "tuned-pipeline": ("corner-pipeline", "ink.safetensors"),
    "tuned-chat": ("chat-base", "chat-peft"),
}


def _tuned(workplace: Path) -> None:
    """Models to extract from, made once: a base with an adapter merged into it."""
    for name, (base, adapter) in TUNED.items():
        if not (workplace / name).exists():
            merge(workplace / base, [(workplace / adapter, 1.0)], workplace / name)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_run(name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example is run in a folder that holds its inputs and nothing else; what differs may say so with 4."""
    context = click.Context(cli, info_name="loratools", **cli.context_settings)
    command = cli.get_command(context, name)
    assert isinstance(command, options.Command)
    cast = {"merge": CAST_OF_MERGE, "extract": CAST_OF_EXTRACT}.get(name, CAST)
    if name == "extract":
        _tuned(workplace)
    for number, line in enumerate(command.examples.strip().splitlines()):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        found, _, last = line.strip().rpartition(" | ")
        _, _, *arguments = shlex.split(last)
        parameters = command.make_context(name, list(arguments), parent=context).params
        named = [parameters[key] for key in ("source", "a", "b", "base", "tuned") if parameters.get(key)]
        inputs = [*named, *parameters.get("paths", ())]
        for path in [*inputs, *(path for path, _ in parameters.get("adapters", ()))]:
            _play(Path("style.safetensors") if path.name in ("-", "*.safetensors") else path, workplace, cast)
            if path.name == "*.safetensors":
                _play(Path("loras", "style.safetensors"), workplace, cast)
        if name != "rescale-alpha" and "--alpha" in arguments:  # an alpha is asked for: the folder has lost its own
            config = folder / "adapter_folder" / "adapter_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "lora_alpha": None}), encoding="utf-8")
        result = CliRunner().invoke(cli, [name, *arguments], input="style.safetensors\n" if found else None)
        assert result.exit_code in (0, 4), f"{line}\n{result.output}"


def _play(path: Path, workplace: Path, cast: dict[str, str]) -> None:
    """Put the example file that plays `path` there, in the current folder."""
    path.parent.mkdir(exist_ok=True)
    source = workplace / cast.get(path.name, path.name)
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copy(source, path)


HOUSE = ("tensors", "adapters", "mapping", "operations", "cli")  # docs/architecture.md, right to left
BESIDE = {"training": "operations"}  # a wing of the house: what it may know is what this room may, and itself


def test_the_house_is_as_the_picture_says() -> None:
    """No package imports one to its left; errors and report import no package."""
    picture = next(block for block in blocks(ROOT / "docs" / "architecture.md") if "cli ──▶ operations" in block.text)
    assert picture.lines[0].split(" ──▶ ") == list(reversed(HOUSE))
    above: list[str] = []
    for file in (ROOT / "loratools").rglob("*.py"):
        package = file.relative_to(ROOT / "loratools").parts[0].removesuffix(".py")
        room = BESIDE.get(package, package)
        known = HOUSE[: HOUSE.index(room) + 1] if package in HOUSE else HOUSE[: HOUSE.index(room)] if package in BESIDE else ()
        allowed = {"errors", "report", "version", package, *known}
        if package in ("__init__", "__main__"):
            continue
        imported = [name.split(".")[1] for name in imports(file) if name.startswith("loratools.")]
        above += [f"{file.name} imports {name}" for name in imported if name not in allowed]
    assert not above


def imports(file: Path) -> list[str]:
    """The modules a file imports, at its top or inside a function."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def test_pages_keep_to_140_columns_in_prose() -> None:
    for page in PAGES:
        inside = {number for block in blocks(page) for number in range(block.line, block.line + len(block.lines) + 2)}
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert number in inside or line.startswith("|") or len(line) <= 140, f"{page.name}:{number}: {len(line)} columns"


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        (["a", "...", "c"], ["a", "b", "b", "c"], True),
        (["a", "...", "c"], ["a", "c"], True),
        (["a", "..."], ["a"], True),
        (["a", "...", "c"], ["a", "b"], False),
        (["a", "c"], ["a", "b", "c"], False),
        ([], ["a"], False),
        (["a"], [], False),
        (["relative error 1.63e-15 (tolerance 1e-05)"], ["relative error 0 (tolerance 1e-05)"], True),
        (["relative error 1.63e-15 (tolerance 1e-05)"], ["relative error 1.63e-05 (tolerance 1e-05)"], False),
        (["relative error 0.5"], ["relative error 0.25"], False),
        (['  "cosine": 0.9994058478795843,'], ['  "cosine": 0.9994058478795999,'], True),
        (['  "cosine": 0.9994058478795843,'], ['  "cosine": 0.9993058478795843,'], False),
        ([" site     error", " ───────────"], [" site  error", " ────────"], True),
        (["wrote a in 1.34 s, peak memory 268 MB"], ["wrote a in 0.0213 s, peak memory 1.1e+03 MB"], True),
        (["wrote a in 1.34 s, peak memory 268 MB"], ["wrote b in 1.34 s, peak memory 268 MB"], False),
        (['  "seconds": 1.341,', '  "peak_rss_mb": 268.3'], ['  "seconds": 0.21,', '  "peak_rss_mb": 512.0'], True),
        (["changed in 12 tensors"], ["changed in 13 tensors"], False),
    ],
)
def test_what_counts_as_the_same_output(shown: list[str], printed: list[str], expected: bool) -> None:
    assert same(tuple(shown), tuple(printed)) is expected


def test_a_command_and_its_exit_code() -> None:
    block = pages.Block(ROOT / "x.md", 1, "console", ("$ loratools convert 'a b' --to x  # exit 3", "error: …", "$ loratools env"))
    first, second = steps(block)
    assert (first.words, first.exit_code, first.shown) == (["loratools", "convert", "a b", "--to", "x"], 3, ("error: …",))
    assert (second.words, second.exit_code, second.shown) == (["loratools", "env"], 0, ())
