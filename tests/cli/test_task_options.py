"""Options of recipes and tasks: their values, their spelling, and their help."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep import recipes
from lockstep.cli.task_options import TaskOptions, options_of
from lockstep.errors import JobError
from tests.support import command

OPEN = TaskOptions(task="some:Task", options=None)
"""Those of a task whose source says nothing."""

MINE = """
import torch_is_not_imported_for_this
from dataclasses import dataclass
import lockstep

class Plain(lockstep.Task):
    def __init__(self, data, lr: float = 0.1, *, depth: int | None = 3, wide: "bool" = False): ...

class Inherits(Plain): ...

@dataclass
class Made(lockstep.Task):
    lr: float = 0.1

def anything(**options): ...

def chosen(by: "Literal['sgd', 'adam', 2] | None" = None): ...

def job(label: str = "x", sizes: list[int] | None = None): ...

class Twice(Plain):
    def __init__(self): ...

Twice = Plain
"""


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--lr", "0.5", "--name", "a b"], {"lr": 0.5, "name": "a b"}),
        (["--model=cnn"], {"model": "cnn"}),
        (["--wide", "--depth", "3"], {"wide": True, "depth": 3}),
        (["--sizes", "[1, 2]", "--deep"], {"sizes": [1, 2], "deep": True}),
        (["--learning-rate-decay", "0.5"], {"learning_rate_decay": 0.5}),
        (["--lr=-0.5"], {"lr": -0.5}),
        (["--lr", "1e-3"], {"lr": 0.001}),
        (["--files", "*.csv"], {"files": "*.csv"}),
        (["--label", "Income #", "--data", "null", "--other=a: b"],
         {"label": "Income #", "data": "null", "other": "a: b"}),
        (["--wide=True", "--deep", "false"], {"wide": True, "deep": False}),
    ],
)  # fmt: skip
def test_values_without_an_annotation(given: list[str], read: dict[str, Any]) -> None:
    assert OPEN.read(given) == read


def test_a_stray_word_is_refused() -> None:
    with pytest.raises(JobError, match="unexpected argument 'cnn'"):
        OPEN.read(["cnn"])


@pytest.mark.parametrize(
    "text",
    ["null", "5", "#1.csv", "sales #3.csv", "a: b.csv", "yes", "[1]", "'q'", "~", "", "1e3", "Ä"],
)
@pytest.mark.parametrize("name", ["data", "label"])
def test_what_a_recipe_takes_as_text_stays_as_the_shell_gave_it(name: str, text: str) -> None:
    assert options_of("clicks").read([f"--{name}", text]) == {name: text}


def test_numbers_of_recipes() -> None:
    read = options_of("clicks").read(["--epochs", "0.5", "--width=8"])
    assert read == {"epochs": 0.5, "width": 8}
    whole = options_of("clicks").read(["--epochs", "2"])["epochs"]
    assert json.dumps(whole) == "2"  # as in manifests of earlier runs
    assert options_of("vision").read(["--color"]) == {"color": True}
    assert options_of("vision").read(["--color=no"]) == {"color": False}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--width", "wide"], "--width has the wrong value.*a whole number.*'wide'"),
        (["--width", "1.5"], "a whole number"),
        (["--epochs", "#3"], "--epochs has the wrong value.*a number"),
        (["--data"], "--data has the wrong value.*a value.*none"),
        (["--lable", "x"], "did you mean --label"),
        (["--workes", "2"], "did you mean --workers"),
        (["--zzz", "2"], "lockstep run --help"),
    ],
)
def test_wrong_options_are_refused_by_name(given: list[str], says: str) -> None:
    with pytest.raises(JobError, match=f"(?s){says}"):
        options_of("clicks").read(given)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_one_of_several_values(mine: str) -> None:
    options = options_of(f"{mine}:chosen")
    for text, value in {"SGD": "sgd", "2": 2, "none": None}.items():
        assert options.read(["--by", text]) == {"by": value}
    for given in (["--by", "lion"], ["--by"]):
        with pytest.raises(JobError, match=r"(?s)sgd or adam or 2 or None.*(lion|none)"):
            options.read(given)


@pytest.mark.parametrize("task", ["mnist", "absent.py:Task"])
def test_wrong_names_are_refused_before_torch_is_loaded(task: str, tmp_path: Path) -> None:
    given = ("-X", "importtime", "-m", "lockstep", "run", task, "--model", "cmn")
    done = command.python(*given, cwd=tmp_path)
    assert done.returncode == 2
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert ("softmax or mlp or cnn" if task == "mnist" else "there is no file") in done.stderr


def test_options_of_a_task_in_a_file(mine: str) -> None:
    options = options_of(f"{mine}:Plain")
    read = options.read(["--data", "5", "--lr=1", "--depth", "none", "--wide"])
    assert read == {"data": 5, "lr": 1, "depth": None, "wide": True}
    with pytest.raises(JobError, match="did you mean --depth"):
        options.read(["--dept", "3"])
    assert options_of(f"{mine}:job").read(["--label", "5", "--sizes", "[1]"]) == {
        "label": "5", "sizes": [1]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Inherits", "Made", "anything", "Twice", "Missing", "A.b"])
def test_what_a_source_does_not_say_is_left_to_the_task(name: str, mine: str) -> None:
    assert options_of(f"{mine}:{name}").options is None
    assert options_of("no_such_module:Task").options is None
    assert options_of("no_such_file.py:Task").options is None


def test_every_recipe_says_its_options() -> None:
    for name in recipes.names():
        options = options_of(name).options
        assert options
        assert all(each.help and each.default is not None for each in options.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["minst"], "did you mean mnist?"),
        (["mnist", "--modle", "cnn"], "did you mean --model?"),
    ],
)
def test_a_misspelt_name_is_refused_before_torch_is_imported(
    words: list[str], says: str, tmp_path: Path
) -> None:
    script = f"""
import sys
sys.argv = ["lockstep", "run", *{words}]
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "torch"
sys.meta_path.insert(0, NoTorch())
import lockstep.agent.forkserver_client as client
client.ForkServerClient.start = None
from lockstep.cli.main import main
main()
"""
    ended = command.python("-", cwd=tmp_path, script=script)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.startswith("lockstep: ")
    assert says in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_help_of_a_recipe(tmp_path: Path) -> None:
    ended = command.lockstep("run", "clicks", "--help", cwd=tmp_path)
    assert ended.returncode == 0
    _, _, own = ended.stdout.partition("Options of clicks:")
    assert "--label str" in own
    assert "--width int" in own


def test_modules_in_folders_without_an_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Namespace packages are found too, and nothing of them is imported."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    (folder / "tasks.py").write_text("def job(rate: float = 0.1): ...\n")
    monkeypatch.chdir(tmp_path)
    options = options_of("outer.inner.tasks:job")
    with pytest.raises(JobError, match="unexpected keyword argument 'rat'"):
        options.read(["--rat", "1"])
    assert "outer" not in sys.modules
    assert options_of("outer.nowhere.tasks:job").options is None
