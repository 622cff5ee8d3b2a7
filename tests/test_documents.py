"""The documents: links that point at what they name, and commands and options that exist."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as get_torchruns_parser

import benchmark_accuracy
import benchmark_freezing
import benchmark_kills
import benchmark_training
import dataset_split
import Q3
from conftest import ROOT

DOCUMENTS = ("README.md", "Q1.md", "Q2.md")
BENCHMARKS = {**{module.__name__: module.get_args_parser() for module in (benchmark_accuracy, benchmark_freezing, benchmark_kills, benchmark_training)},
              "benchmark_published_run": Q3.get_args_parser()}
PARSERS = {"Q3.py": Q3.get_args_parser(), "dataset_split.py": dataset_split.get_args_parser()}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_the_lines_they_name(document):
    for name, file, line in re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", (ROOT / document).read_text()):
        assert name in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{name} is not in line {line} of {file}"
    for target in re.findall(r"\]\(([\w./]+)[#)]", (ROOT / document).read_text()):
        assert (ROOT / target).exists(), target


def test_every_command_of_the_readme_is_one_the_scripts_accept():
    commands = re.findall(r"python (Q3\.py|dataset_split\.py)( [^#\n`;&]*)?", (ROOT / "README.md").read_text())
    assert len(commands) > 12
    for script, rest in commands:
        words = shlex.split(re.split(r"   +", rest)[0])
        if "--help" not in words:
            PARSERS[script].parse_args(words)


def test_every_benchmark_command_of_the_documents_is_one_that_the_benchmark_accepts():
    for document in DOCUMENTS:
        for script, rest in re.findall(r"python tests/(benchmark_\w+)\.py( [^#`;&]*)?`", (ROOT / document).read_text()):
            BENCHMARKS[script].parse_args(shlex.split(rest))


def test_every_option_that_the_documents_name_exists():
    parsers = (*PARSERS.values(), *BENCHMARKS.values(), get_torchruns_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings} | {"--hypothesis-profile"}
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / document).read_text()))
        assert named <= known, named - known


@pytest.fixture
def accuracy_table(small_network, shared_data, monkeypatch, capsys):
    """Print a table of benchmark_accuracy.py, of one-epoch runs of a small network; gives it and the runs that it made."""
    made = []
    def in_this_process(function, *args):
        made.append(args[0])
        function(*args)
    monkeypatch.setattr(benchmark_accuracy, "apart", in_this_process)

    def printed(*flags):
        made.clear()
        benchmark_accuracy.main([flags[0], "--data", str(shared_data), "--weights", "small.pth", "--image-size", "32", "--epochs", "1", *flags[1:]])
        return capsys.readouterr().out, list(made)
    return printed


def test_tables_of_accuracy_go_on_where_they_were_stopped(accuracy_table, shared_data):
    Path("Photos").symlink_to(shared_data)
    flags = ("--data", "photos", "--fraction", "1", "--variants", "reference", "tuned", "--seeds", "0")  # found in any capitals
    tuned_first, made = accuracy_table("recipes", *flags)
    assert made == ["tuned", "reference"] and re.search(r"^\| tuned \| 24 \|", tuned_first, re.MULTILINE)
    assert accuracy_table("recipes", *flags) == (tuned_first, [])
    table, made = accuracy_table("recipes", *flags, "1")
    assert made == ["tuned", "reference"] and re.search(r"^\| reference \| .* ± ", table, re.MULTILINE)


def test_each_change_to_the_recipe_changes_something(accuracy_table):
    for table, names in (("ingredients", benchmark_accuracy.INGREDIENTS), ("candidates", benchmark_accuracy.CANDIDATES)):
        printed, made = accuracy_table(table, "--image-size", "64", "--fraction", "1", "--seeds", "0")
        assert [line.split(" | ")[0] for line in printed.splitlines()[2:]] == [f"| {name}" for name in ["tuned", *names]]
        assert made == [*["tuned"] * (table == "ingredients"), *names]
    losses = {run.name: [row["val_loss"] + row["train_loss"] for row in benchmark_accuracy.read_csv(run / "history.csv")] for run in Path("runs/benchmark_accuracy").iterdir()}
    usual = losses.pop("tuned, 1, 64 px, 1 epochs, seed 0")
    assert len(losses) == len(benchmark_accuracy.INGREDIENTS + benchmark_accuracy.CANDIDATES) and not [name for name, others in losses.items() if others == usual]


def test_published_run_is_a_row_of_the_same_table(accuracy_table, shared_data):
    table, made = accuracy_table("recipes", "--image-size", "224", "--fraction", "1", "--seeds", "0", "--variants", "published, float32", "tuned")
    assert made == ["tuned", "published, float32"] and re.search(r"^\| published, float32 \| 24 \| .* ± ", table, re.MULTILINE) and "nan" not in table
    report, = Path("runs/benchmark_accuracy").glob("published*/test.json")
    assert json.loads(report.read_text())["photos"] == 12


def test_runs_of_a_benchmark_are_made_in_processes_of_their_own():
    benchmark_accuracy.apart(os.mkdir, "made")
    assert Path("made").is_dir()
    with pytest.raises(SystemExit):
        benchmark_accuracy.apart(os.mkdir, "made")


def test_tables_of_other_networks_and_depths(accuracy_table):
    table, _ = accuracy_table("scratch", "--fraction", "1", "--seeds", "0")
    assert re.search(r"^\| 0 \| [01]\.\d+ \|  \|$", table, re.MULTILINE) and re.search(r"^\| 1 \| [01]\.\d+ \| [01]\.\d+ \|$", table, re.MULTILINE)
    assert re.search(r'^```mermaid\nxychart-beta\n    title "[^"]*: (fine-tuned, from scratch|from scratch, fine-tuned) \(from the top, at the right\)"\n'
                     r'.*\[1\]\n.*\n(    line \[[01]\.\d{4}\]\n){2}```$', table, re.MULTILINE)
    upper, lower = map(float, re.findall(r"line \[([\d.]+)\]", table))
    assert upper >= lower
    table, made = accuracy_table("freezing", "--fraction", "1", "--seeds", "0")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 9", "| 8", "| 7", "| 6", "| 4", "| 0"]
    assert made == ["freeze 9", "freeze 8", "freeze 7", "freeze 4", "freeze 0"], "six is the tuned run that is there already"
    table, made = accuracy_table("data", "--fraction", "0.5", "1", "--seeds", "0")
    assert re.findall(r"^\| \d+", table, re.MULTILINE) == ["| 12", "| 24"] and made.count("linear probe") == 2
    assert re.search(r'x-axis "training photos" \[12, 24\]\n.*\n(    line \[[01]\.\d{4}, [01]\.\d{4}\]\n){3}```$', table, re.MULTILINE)


def test_table_of_freezing_depths_can_be_printed_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark_freezing.py", "--image-size", "32"])
    benchmark_freezing.main()
    assert re.search(r"^\| 6 \| layer3, layer4, fc \| 22,083,594 \|", capsys.readouterr().out, re.MULTILINE)
