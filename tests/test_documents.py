"""The documents name what exists: functions, files, commands, options. Budgets. Benchmarks."""

import re
import shlex
from contextlib import suppress
from operator import attrgetter

import benchmark_accuracy
import benchmark_freezing
import benchmark_kills
import benchmark_training
import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser as get_torchruns_parser

import dataset_split
import Q3

DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "Q1.md", "Q2.md")}
BENCHMARKS = {"benchmark_published_run": Q3.get_args_parser(), **{
    module.__name__: module.get_args_parser() for module in (
        benchmark_accuracy, benchmark_freezing, benchmark_kills, benchmark_training)}}
SCRIPTS = {"Q3.py": Q3, "dataset_split.py": dataset_split}
CHECKS = {"Q3.py": Q3.get_args, "dataset_split.py": dataset_split.get_args_parser().parse_args}
WORDS = r"((?: [^#\n`;&|>]*)?)"  # what follows in a command line
ELSEWHERE = {"--hypothesis-profile", "--index-url"}  # of pytest with hypothesis, of pip


def in_documents(pattern: str) -> list:
    return [found for text in DOCUMENTS.values() for found in re.findall(pattern, text)]


def exists(name: str, *owners) -> bool:
    for owner in owners:
        with suppress(AttributeError):
            attrgetter(name.removeprefix("class ").removeprefix("def "))(owner)
            return True
    return False


def test_functions_that_the_documents_name_exist():
    links = in_documents(r"\[`([^`]+)`\]\((Q3\.py|dataset_split\.py)\)")
    wrong = [name for name, file in links
             if not exists(name.removesuffix("()"), SCRIPTS[file], Q3.FineTuned)]
    wrong += [name for name in in_documents(r"`([A-Za-z_][\w.]*)\(\)`") if not exists(
        name.removeprefix("model."), *SCRIPTS.values(), Q3.FineTuned)]
    assert links and not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[document]):
        file, _, place = target.partition("#")
        assert file.startswith("http") or (ROOT / file).exists(), target
        if place and not file.startswith("http"):
            headings = re.findall(r"^#+ (.+)", DOCUMENTS[file or document].lower(), re.M)
            assert place in [re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in headings]


def test_commands_of_the_documents_are_accepted():
    commands = in_documents(r"(?:python|torchrun [^`\n]*?) (Q3\.py|dataset_split\.py)" + WORDS)
    assert len(commands) > 12
    for script, rest in commands:
        words = shlex.split(re.split(r"   +", rest)[0])  # an explanation may stand further right
        if "--help" not in words:
            CHECKS[script](words)


def test_benchmark_commands_of_the_documents_are_accepted():
    commands = in_documents(r"python tests/(benchmark_\w+)\.py" + WORDS)
    assert commands
    for script, rest in commands:
        BENCHMARKS[script].parse_args(shlex.split(rest))


def test_options_that_the_documents_name_exist():
    parsers = (Q3.get_args_parser(), dataset_split.get_args_parser(), get_torchruns_parser(),
               *BENCHMARKS.values())
    known = {flag for parser in parsers for flag in parser._option_string_actions} | ELSEWHERE
    assert set(in_documents(r"(?<![\w-])--[a-z][a-z-]+")) <= known


def test_budgets():
    for name, lines in (("Q3.py", 1100), ("dataset_split.py", 550)):
        assert len((ROOT / name).read_text().splitlines()) <= lines, name
    assert len(DOCUMENTS["README.md"].splitlines()) <= 300
    assert len(DOCUMENTS["README.md"].split()) <= 2800
    long = [f"{file.name}: {line}" for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))
            for line in file.read_text().splitlines() if len(line) > 100]
    assert not long


@pytest.fixture
def accuracy_table(small_network, shared_data, monkeypatch, capsys):
    """Prints a table of a small network; gives it, as rows of cells, and the runs it made."""
    def printed(table, *flags):
        made = []
        monkeypatch.setattr(benchmark_accuracy, "apart", lambda function, variant, *args: (
            made.append(variant), function(variant, *args)))
        benchmark_accuracy.main([
            table, "--data", str(shared_data), "--weights", "small.pth", "--image-size", "64",
            "--epochs", "1", "--fraction", "1", "--seeds", "0", "--cache", "cache", *flags])
        lines = capsys.readouterr().out.splitlines()
        return [line[2:-2].split(" | ") for line in lines if line.startswith("| ")][1:], made
    return printed


def test_table_goes_on_where_it_was_stopped(accuracy_table):
    flags = ("--variants", "reference", "tuned")
    rows, made = accuracy_table("recipes", *flags)
    assert made == ["tuned", "reference"] and [row[0] for row in rows] == ["reference", "tuned"]
    assert accuracy_table("recipes", *flags) == (rows, [])
    rows, made = accuracy_table("recipes", *flags, "--seeds", "0", "1")
    assert made == ["tuned", "reference"] and " ± " in rows[0][4]


def test_each_ingredient_changes_something(accuracy_table, tmp_path):
    rows, made = accuracy_table("ingredients")
    assert made == [row[0] for row in rows] == ["tuned", *benchmark_accuracy.INGREDIENTS]
    losses = [benchmark_accuracy.read_csv(file)[-1]["val_loss"]
              for file in tmp_path.glob("runs/benchmark_accuracy/*/history.csv")]
    assert len(set(losses)) == len(rows)


def test_other_tables(accuracy_table, tmp_path):
    assert accuracy_table("recipes", "--image-size", "224", "--variants", "published, float32")[1]
    rows, _ = accuracy_table("freezing")
    assert [row[0] for row in rows] == ["9", "8", "7", "6", "4", "0"]
    learn = [int(row[1].replace(",", "")) for row in rows]
    assert sorted(set(learn)) == learn[1:], "avgpool, the ninth, has no parameters"
    assert len(accuracy_table("scratch")[0]) == 11
    assert (tmp_path / "runs/benchmark_accuracy/scratch-1.png").exists()
