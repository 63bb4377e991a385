"""README and docs/ say what the code does: keys, names, defaults, commands, paths and links."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import yaml

from docs import reference
from ochat_train.cli import WORDS
from ochat_train.conversations.dedupe import DROP_REASONS
from ochat_train.conversations.forms import FORMS
from ochat_train.conversations.own_weights import LISTS, OF_A_TURN
from ochat_train.conversations.roles import ROLES
from ochat_train.conversations.template import TEMPLATES, ChatTemplate, TemplatePart
from ochat_train.model.loss import ConditionSums
from ochat_train.recipe import FREE_AT_RESUME, known_keys, load_recipe, to_json
from ochat_train.tokens.store import Manifest
from ochat_train.training.checkpoint import Checkpoint, TrainState
from ochat_train.training.metrics import Metrics, RunOutline, StepReport
from ochat_train.training.saving import SaveResult
from ochat_train.training.speed import PEAKS
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ochat_train"
README, DESIGN = ROOT / "README.md", ROOT / "docs/design.md"
DATA, RECIPES, RUNS = ROOT / "docs/data.md", ROOT / "docs/recipes.md", ROOT / "docs/runs.md"
TROUBLESHOOTING, CHAT_TEMPLATES = ROOT / "docs/troubleshooting.md", ROOT / "docs/templates.md"
DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *DECISIONS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Every name that the ledger can hold. A new one fails `test_every_reason_and_action_of_the_code_is_listed_here`.
ACTIONS = {
    "earlier_answers_untrained",
    "surrogate_replaced",
    "nan_read",
    "media_left_out",
    "python_literal_read",
    "earlier_answer_untrained",
    "reasoning_kept",
    "reasoning_dropped",
    "calls_untrained",
    "tools_in_system",
    "empty_turn_removed",
    "leading_answer_untrained",
    "leading_answer_removed",
    "user_turns_joined",
    "unanswered_turn_removed",
    "html_converted",
    "page_noise_removed",
    "refusal_masked",
    "repeated_answer_masked",
    "overlong_split",
    "overlong_truncated",
    "answers_apart",
    "answer_left_out",
    "question_cut",
    "answer_windowed",
}
REASONS = {
    "in_eval_source",
    "not_json",
    "not_utf8",
    "truncated_record",
    "record_too_large",
    "bad_row",
    "no_parent",
    "repeated_message",
    "no_next_data",
    "no_page_content",
    "not_an_object",
    "no_turns",
    "turn_not_an_object",
    "unknown_role",
    "bad_pair",
    "value_not_text",
    "not_text",
    "equal_answer",
    "bad_weight",
    "bad_condition",
    "bad_system",
    "html_too_deep",
    "html_not_converted",
    "no_answer",
    "too_few_answers",
    "other_language",
    "refusal",
    "repeated_answer",
    "no_weight",
    "too_long",
    "template_refused",
    "template_unstable",
    "spells_control",
    "exact_duplicate",
    "earlier_snapshot",
    "near_duplicate",
}

# Where reasons and actions arise, what else stands in those files in the same form, and what does not have that form.
NAMING_FILES = (
    *(
        f"conversations/{name}.py"
        for name in (
            "records",
            "parts",
            "json_scan",
            "turns",
            "sharegpt",
            "own_weights",
            "spell_out",
            "markdown",
            "clean",
            "filters",
        )
    ),
    "tokens/overlong.py",
    "tokens/rendered.py",
    "tokens/strings.py",
)
OTHER_NAMES = (
    LISTS
    | OF_A_TURN
    | {
        *("tool_calls", "reasoning_content"),  # fields of messages
        *("bos_token", "eos_token", "date_string", "tools_in_user_message"),  # variables of templates
        *("line_end", "depth_limit_exceeded"),
    }
)
ONE_WORD = {"refusal", "bad_condition", "bad_system"}

# Folders that a run makes: what lies in them need not exist.
MADE_BY_A_RUN = {"runs", "stores", "wandb"}


# ---- Reading pages ----


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table; cells without the backticks around them."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        yield header, rows


def table(page: Path, *header: str) -> list[list[str]]:
    """The rows of all tables of a page whose first columns are these."""
    found = [rows for columns, rows in tables(page.read_text()) if columns[: len(header)] == list(header)]
    assert found, f"{page.name} has no table with the columns {header}"
    return [row for rows in found for row in rows]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def first_names(rows: list[list[str]]) -> list[str]:
    """The code spans of all first cells."""
    return [name for row in rows for name in code(row[0])]


def fences(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def indented_blocks(text: str) -> list[str]:
    """The blocks of code that are indented by four spaces, without them."""
    blocks = re.findall(r"^(?: {4}.*\n)(?:(?: {4}.*)?\n)*", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def commands(text: str) -> list[list[str]]:
    """The shell commands of a page, as words, up to where an explanation follows behind several spaces."""
    starts = ("./launch.sh ", "python -m ", "deepspeed ", "ochat ")
    inline = [span for span in re.findall(r"`([^`\n]+)`", text) if span.startswith(starts)]
    lines = [line for block in [*fences(text, "sh"), *indented_blocks(text)] for line in block.splitlines()]
    return [shlex.split(re.split(r" {3,}", line)[0]) for line in [*inline, *lines] if line.startswith(starts)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- docs/recipes.md, docs/runs.md ----


# The least that a recipe says, and nothing else.
REQUIRED: dict[str, Any] = {
    "name": "least",
    "data": {"store": "stores/least", "sources": [{"name": "all", "path": "dumps/all.json"}]},
    "template": "chatml",
    "model": {"base": "some/model"},
    "packing": {"tokens_per_gpu": 4096},
    "train": {"epochs": 1},
    "checkpoint": {"dir": "runs/least"},
}


@pytest.fixture
def least(tmp_path: Path) -> Path:
    path = tmp_path / "least.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path


def test_runs_lists_what_a_resume_may_change() -> None:
    assert sorted(first_names(table(RUNS, "what", "what then happens"))) == sorted(FREE_AT_RESUME)


def test_runs_lists_the_fields_of_the_metrics(least: Path, tmp_path: Path) -> None:
    about = {"num_processes": 1, "started": "", "device": "cpu", "attention": "sdpa", "checkpointing": "full"}
    sums = ConditionSums(torch.ones(2, 3, 1, dtype=torch.float64))
    outline = RunOutline(load_recipe(least), tmp_path, ["GPT4"], ["gpt4"], 0, 1, 10, None)
    with Metrics(outline, is_main=True) as metrics:
        metrics.start(0, 0, resumed=None, about=about)
        metrics.step(StepReport(1, 0, 1, 0.5, sums, np.ones(1), 1e-3, 1.0, 10, 10, 0.5, 2, 1.0, 0.0, 1))
        metrics.evaluation(1, 0, sums, is_epoch_end=True)
        metrics.saved(SaveResult("model", tmp_path / "models/step-00000001", 1.0, 1, None))
        metrics.end(1, 0, "finished")
    lines = [orjson.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    common = first_names(table(RUNS, "field", "meaning"))
    assert code(table(RUNS, "field", "meaning")[0][1]) == [line["event"] for line in lines]
    for line in lines:
        listed = [*common, *first_names(table(RUNS, f"field of {line['event']}", "meaning"))]
        assert sorted(listed) == sorted(line), line["event"]


def test_runs_lists_the_peaks_of_devices() -> None:
    listed = sorted(float(row[1].replace(",", "")) for row in table(RUNS, "device", "peak"))
    assert listed == sorted(set(PEAKS.values()))


def test_recipes_names_the_tokens_that_may_be_added() -> None:
    section = RECIPES.read_text().partition("### Special tokens\n")[2].partition("\n#")[0]
    for template in TEMPLATES.values():
        assert set(template.addable) <= set(code(section))


# ---- docs/data.md ----


def test_every_reason_and_action_of_the_code_is_listed_here() -> None:
    found = set(DROP_REASONS.values())
    for file in NAMING_FILES:
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^[a-z0-9]+(?:_[a-z0-9]+)+$", node.value))
    assert (found - OTHER_NAMES) | ONE_WORD == REASONS | ACTIONS


def test_data_explains_every_repair_in_the_order_of_the_rules() -> None:
    listed = first_names(table(DATA, "repair", "meaning"))
    assert sorted(listed) == sorted(ACTIONS)
    rules = [
        *("empty_turn_removed", "leading_answer_untrained", "leading_answer_removed"),
        *("user_turns_joined", "unanswered_turn_removed"),
    ]
    assert [name for name in listed if name in rules] == rules


def test_data_explains_every_drop_reason() -> None:
    assert sorted(first_names(table(DATA, "reason", "meaning"))) == sorted(REASONS)


def test_data_has_the_table_of_roles() -> None:
    listed = {name: row[1].partition(":")[0] for row in table(DATA, "in the file", "role") for name in code(row[0])}
    assert listed == ROLES


def test_data_has_the_table_of_forms() -> None:
    listed = {
        row[0]: tuple(tuple(code(names)) for names in row[1].split(", ")) for row in table(DATA, "part", "fields")
    }
    assert listed == FORMS


# ---- docs/templates.md ----


def test_templates_has_every_template_with_its_roles_and_condition() -> None:
    listed = {
        row[0].strip("`"): (code(row[2]), code(row[3])) for row in table(CHAT_TEMPLATES, "template", "base models")
    }
    assert listed == {
        name: (
            [template.role_names[role] for role in ("user", "assistant", "tool")],
            [template.inference_condition] * bool(template.inference_condition),
        )
        for name, template in TEMPLATES.items()
    }


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_templates_shows_the_pieces_of_every_template(template: ChatTemplate) -> None:
    def shown(piece: TemplatePart, role: str) -> str:
        text = piece.text.replace("{role}", role).replace("\n", "\\n")
        return f"[{text}]" if piece.is_special else f'"{text}"'

    def line(header: tuple[TemplatePart, ...], role: str) -> str:
        end = TemplatePart(template.end_token, is_special=True)
        parts = [shown(piece, role) for piece in header]
        return " ".join([*parts, "TEXT", *(shown(piece, role) for piece in (end, *template.after_end))])

    blocks = [
        block
        for block in re.split(r"\n\n", "\n".join(indented_blocks(CHAT_TEMPLATES.read_text())))
        if "beginning" in block
    ]
    block = next(block for block in blocks if template.name in re.split(r",? +|\n", block.partition("  ")[0].strip()))
    lines = dict(re.findall(r"^ +(beginning|system|turn) +(.*)$", block, re.MULTILINE))
    beginning = f"[{template.bos}]" if template.bos else "nothing"
    if template.condition_in == "first":
        beginning += f', and with a condition: "Assistant is {{condition}}" [{template.end_token}]'
    assert lines == {
        "beginning": beginning,
        "system": line(template.system_header, template.role_names["system"]),
        "turn": line(template.header, "{role}" if template.condition_in == "first" else "{condition} {role}"),
    }


# ---- docs/design.md ----


def rooms() -> Iterator[tuple[str, str]]:
    """Every path in the list of rooms, with what is said of it."""
    block = indented_blocks(DESIGN.read_text().partition("## Packages\n")[2])[0]
    files, *lines = block.rstrip().splitlines()
    yield from ((name, "") for name in files.split())
    folders: list[str] = []  # the folders around a line, outermost first
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, meaning = line.strip().partition(" ")
        folders[depth:] = [name]
        yield "".join(folders), meaning.strip()


def test_every_room_exists_unless_it_is_marked_later() -> None:
    for path, meaning in rooms():
        place = ROOT / path
        there = any(place.iterdir()) if place.is_dir() else place.is_file()
        assert there is not meaning.startswith("later"), f"{path}: {meaning}"


def test_the_picture_has_every_room_and_what_passes_between_them() -> None:
    (picture,) = fences(DESIGN.read_text(), "mermaid")
    drawn = {name for name in re.findall(r"\b[a-z]+\b(?=\[| --|$)", picture, re.MULTILINE)} - {"dumps"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert drawn == folders | {"train", "export"}  # files.py is for all of them
    labelled = re.findall(r"(\w+)(?:\[.*?\])? -- (\w+) --> (\w+)", picture)
    assert len(labelled) > 6
    for giver, name, taker in labelled:
        defined, used = source_of(giver if giver in drawn else taker), source_of(taker)
        assert f"class {name}" in defined and re.search(rf"\b{name}\b", used), (giver, name, taker)


def source_of(room: str) -> str:
    """The text of all modules of a room."""
    files = (PACKAGE / room).glob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    return "".join(path.read_text() for path in files)


def test_a_decision_has_a_page_of_its_own_with_all_that_belongs_to_it() -> None:
    numbers = [int(page.name.partition("-")[0]) for page in DECISIONS]
    assert numbers == list(range(1, len(DECISIONS) + 1))
    for number, page in zip(numbers, DECISIONS, strict=True):
        text = page.read_text()
        title, *headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Evidence", "Consequences"], page.name
        assert len(text.splitlines()) <= 40, page.name
        assert f"[{title.removeprefix(f'{number}. ')}](decisions/{page.name})" in DESIGN.read_text(), page.name


def test_every_module_has_its_line_in_the_rooms() -> None:
    listed = {path for path, _ in rooms()}
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert modules <= listed
    pages = {page.name for page in PAGES[1:] if page not in DECISIONS}
    assert pages == set(re.findall(r"[\w-]+\.md", dict(rooms())["docs/"]))


@pytest.mark.parametrize("kind", [TrainState, Checkpoint, Manifest], ids=lambda kind: kind.__name__)
def test_design_names_the_fields_of_what_is_saved(kind: type) -> None:
    text = DESIGN.read_text()
    for name in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        assert re.search(rf"\b{name}\b", text), name


def test_the_recipe_in_design_is_the_published_one() -> None:
    (ours,) = (block for block in indented_blocks(DESIGN.read_text()) if block.startswith("name:"))
    path = ROOT / "recipes/openchat_v3.2_super_13b.yaml"
    tree = yaml.safe_load(ours)
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}" for key, value in tree.items()]
    assert to_json(load_recipe(path, overrides)) == to_json(load_recipe(path))


# ---- All pages ----


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert linked.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


@each_page
def test_paths_that_a_page_names_exist(page: Path) -> None:
    folders = {path.name for root in (ROOT, PACKAGE) for path in root.iterdir() if path.is_dir()}
    folders = {name for name in folders if name.isidentifier()} - MADE_BY_A_RUN
    text = page.read_text()
    if page == DESIGN:  # some of its rooms are of later: they have their own test
        text = re.sub(r"^## Packages\n\n(?: {4}.*\n)+", "", text, flags=re.MULTILINE)
    named = re.findall(rf"(?<![\w/.~-])((?:{'|'.join(folders)})/[\w./-]*[\w/]|[\w.]+\.(?:sh|toml|txt))(?![\w-])", text)
    for path in set(named) - {"tokens/s"}:
        assert any((root / path).exists() for root in (ROOT, PACKAGE)), f"{page.name} names {path}"


MODULE = re.compile(r"(?:-m|--module) (ochat_train\.\w+)")


@each_page
def test_commands_name_modules_that_exist(page: Path) -> None:
    for name in MODULE.findall(page.read_text()):
        assert importlib.util.find_spec(name) is not None, f"{page.name} names {name}"


@each_page
def test_recipes_and_overrides_in_commands_are_right(page: Path) -> None:
    for words in commands(page.read_text()):
        for position, word in enumerate(words):
            if word.endswith(".yaml") and word.startswith("recipes/"):
                load_recipe(ROOT / word, [other for other in words[position + 1 :] if "=" in other])


@each_page
def test_whole_recipes_in_a_page_are_right(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(fences(page.read_text(), "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        load_recipe(path)


@each_page
def test_python_in_a_page_parses(page: Path) -> None:
    for block in fences(page.read_text(), "python"):
        ast.parse(block)


# ---- Pages that are generated, and the site ----


@pytest.mark.parametrize("name", ["keys", "commands"])
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    generated = {"keys": reference.keys_page, "commands": reference.commands_page}[name]()
    assert (ROOT / f"docs/{name}.md").read_text() == generated, "run python docs/reference.py"


def test_generated_pages_have_every_key_and_every_command() -> None:
    assert sorted(first_names(table(ROOT / "docs/keys.md", "key", "type or values", "default"))) == sorted(known_keys())
    assert set(reference.MORE) <= set(known_keys())
    files = {path.stem for path in PACKAGE.glob("*.py") if "__main__" in path.read_text()} - {"cli"}  # that is ochat
    entries = files | {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert set(MODULE.findall((ROOT / "docs/commands.md").read_text())) == {f"ochat_train.{entry}" for entry in entries}


TAKES_FLAGS_OF_OTHERS = {"serve", "evaluate"}  # what they do not know goes to the engine


@each_page
def test_flags_in_commands_exist(page: Path) -> None:
    for words in commands(page.read_text()):
        if words[0] == "ochat":
            if words[1].isupper() or words[1].startswith("-"):
                continue  # WORD, or a flag of ochat itself
            module = WORDS[words[1]].module
        else:
            named = MODULE.search(" ".join(words))
            module = named[1].partition(".")[2] if named else ""
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        if not module or module in TAKES_FLAGS_OF_OTHERS or not flags:
            continue
        parser = reference.parser_of(module)
        parsers = [parser, *reference.subparsers_of(parser).values()]
        known = {flag for one in parsers for flag in one._option_string_actions}
        known |= {"--num_gpus", "--module"} if words[0] == "deepspeed" else set()
        assert flags <= known, f"{page.name}: {shlex.join(words)}"


def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=HANG_S
    )
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) == len(PAGES)  # 404.html is there, README.md is not
    drawn = (tmp_path / "design/index.html").read_text()
    arrows = [line for line in fences(DESIGN.read_text(), "mermaid")[0].splitlines() if "->" in line]
    assert drawn.count("url(#arrow)") == len(arrows) and "graph TD" not in drawn and "flowchart" not in drawn
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?([^\" >]+)", page.read_text())
        assert loaded and not [url for url in loaded if re.match(r"(https?:)?//", url)], page


# ---- docs/troubleshooting.md ----


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Every string of a module, with `...` for what is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_troubleshooting_stand_in_the_code() -> None:
    texts = [text for path in PACKAGE.rglob("*.py") for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))]
    messages = re.findall(r"^### `(.+)`$", TROUBLESHOOTING.read_text(), re.MULTILINE)
    assert len(messages) > 20
    pythons_own = "No module named ochat_train"
    assert [message for message in messages if not any(message in text for text in texts)] == [pythons_own]


# ---- docs/gpus.md, docs/nodes.md ----


def test_gpus_lists_every_recipe() -> None:
    recipes = [f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")]
    assert sorted(first_names(table(ROOT / "docs/gpus.md", "recipe", "what it is"))) == sorted(recipes)


def test_nodes_lists_the_variables_of_launch() -> None:
    sources = "".join(path.read_text() for path in (PACKAGE / "launch").glob("*.py"))
    variables = set(re.findall(r"\.get\(\"([A-Z_]+)\"\)", sources))
    assert set(first_names(table(ROOT / "docs/nodes.md", "variable", "meaning"))) == variables


# ---- README.md ----


def test_readme_is_one_screen_with_two_commands_and_small_pictures() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 100
    shown = [shlex.split(line, comments=True) for line in indented_blocks(text)[0].strip().splitlines()]
    assert shown == [["./launch.sh", "recipes/quickstart.yaml"], ["./launch.sh", "test"]]
    pictures = [ROOT / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
    assert len(pictures) == 2 and sum(picture.stat().st_size for picture in pictures) < 300_000
