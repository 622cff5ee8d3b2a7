"""The documents: links that point at what they name, and commands and options that exist."""

import json
import re
import shlex

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


def test_every_option_that_the_documents_name_exists():
    parsers = (*PARSERS.values(), benchmark_training.get_args_parser(), benchmark_accuracy.get_args_parser(),
               benchmark_freezing.get_args_parser(), benchmark_kills.get_args_parser(), get_torchruns_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings} | {"--hypothesis-profile"}
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / document).read_text()))
        assert named <= known, named - known


def test_table_of_ingredients_goes_on_where_it_was_stopped(small_network, shared_data, tmp_path, capsys):
    def printed(*flags):
        benchmark_accuracy.main(["--data", str(shared_data), "--weights", "small.pth", "--fraction", "1.0", "--image-size", "32", "--epochs", "1",
                                 "--results", str(tmp_path / "results"), *flags])
        return capsys.readouterr().out, (tmp_path / "results").read_text().splitlines()
    table, lines = printed("--seeds", "0")
    assert table.count("\n") == len(lines) + 2 == len(benchmark_accuracy.VARIANTS) + 2
    tuned, *others = [json.loads(line)["last_loss"] for line in lines]
    assert all(other != tuned for other in others), "each variant changes something"
    table, more = printed("--seeds", "0", "1", "--variants", "tuned", "reference")
    assert more[:-2] == lines and re.search(r"^\| reference \|.* ± ", table, re.MULTILINE)


def test_table_of_freezing_depths_can_be_printed_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark_freezing.py", "--image-size", "32"])
    benchmark_freezing.main()
    assert re.search(r"^\| 6 \| layer3, layer4, fc \| 22,083,594 \|", capsys.readouterr().out, re.MULTILINE)
