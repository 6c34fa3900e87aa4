"""The recipes on files of people's own: what is learned, refused before a run, and predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lockstep
from lockstep.errors import DataError, JobError
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.sampling import Sampling
from lockstep.recipes.cartpole import cartpole
from lockstep.recipes.clicks import Clicks, clicks
from lockstep.recipes.datasets.tables import read_table
from lockstep.recipes.game import game
from lockstep.recipes.mnist import mnist
from lockstep.recipes.recommend import Recommend, recommend
from lockstep.recipes.summarise import summarise
from lockstep.recipes.translate import translate
from lockstep.recipes.vision import Vision, vision
from tests.recipes.test_user_files import PAIRS, folder_of_images

# clicks


def people(path: Path, edit: Callable[[int, dict[str, str]], None] = lambda row, each: None) -> str:
    """200 rows: `many` and `few` are numbers, and say together whether it is a yes."""
    draw, lines = np.random.RandomState(2), ["many,few,letter,clicked"]
    for row in range(200):
        many, few = int(draw.randint(1000)), int(draw.randint(5))
        values = {
            "many": str(many), "few": str(few), "letter": "abc"[row % 3],
            "clicked": str(int(many > 500 and few > 1)),
        }  # fmt: skip
        edit(row, values)
        lines.append(",".join(values.values()))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def written_otherwise(row: int, values: dict[str, str]) -> None:
    """The same rows, with numbers written in other ways."""
    values["many"] = f"{float(values['many']):e}"
    values["few"] = f" {values['few']}.0" if row % 2 else values["few"]
    values["clicked"] = f"{values['clicked']}.0"


def test_the_same_rows_however_numbers_are_written(tmp_path: Path) -> None:
    plain = Clicks(people(tmp_path / "plain.csv"), "clicked")
    other = Clicks(people(tmp_path / "other.csv", written_otherwise), "clicked")
    for one, two in zip(plain.rows, other.rows, strict=True):
        assert one.equal(two)


def test_a_json_record_is_the_row_of_the_table(tmp_path: Path) -> None:
    def some(row: int, values: dict[str, str]) -> None:
        if row % 10 == 0:
            values["many"] = ("", "NA", "nan", "null")[row // 10 % 4]

    task = Clicks(people(tmp_path / "mine.csv", some), "clicked")
    assert len(task.rows) == 3
    assert task.ranges["many"] is not None  # missing values do not make categories of numbers
    assert np.isfinite(task.ranges["many"]).all()
    columns = read_table(tmp_path / "mine.csv").columns
    for row in range(20):
        many = None if row % 10 == 0 else float(columns["many"][row])
        record = {"few": float(columns["few"][row]), "letter": columns["letter"][row]}
        assert task.from_record({**record, "many": many, "more": []}).equal(task.rows[0][row])
    with pytest.raises(DataError, match="'old' in the column many, which has numbers"):
        task.from_record({**record, "many": "old"})


@pytest.mark.parametrize(
    "bad", ["-", "n.a.", "12 EUR", "1.234,50", "inf", "-inf", "45%", "1_0", "1e999", "x"]
)
def test_one_value_that_is_no_number_is_refused_by_its_line(bad: str, tmp_path: Path) -> None:
    def some(row: int, values: dict[str, str]) -> None:
        if row in (5, 8):
            values["many"] = f'"{bad}"'

    path = people(tmp_path / "mine.csv", some)
    with pytest.raises(DataError, match=r"mine\.csv, line 7: the column many") as caught:
        len(Clicks(path, "clicked").rows)
    assert caught.value.found == f"{bad!r}, and 1 more such rows"
    assert caught.value.fix.endswith("--categories many")
    task = clicks(path, "clicked", categories="many, few").task
    assert isinstance(task, Clicks)
    assert task.ranges == {"many": None, "few": None, "letter": None}
    with pytest.raises(DataError, match="there is no column old"):
        len(Clicks(path, "clicked", 16, ("old",)).rows)


def test_names_that_happen_to_be_numbers_are_categories(tmp_path: Path) -> None:
    def hexadecimal(row: int, values: dict[str, str]) -> None:
        values["many"] = str(row) if row < 90 else f"{row}ab"
        values["few"] = "n.a." if row == 3 else values["few"]

    task = Clicks(people(tmp_path / "mine.csv", hexadecimal), "clicked")
    assert task.ranges == {"many": None, "few": None, "letter": None}


def test_columns_in_another_order_are_the_same_categories(tmp_path: Path) -> None:
    lines = Path(people(tmp_path / "mine.csv")).read_text().splitlines()
    turned = [",".join(reversed(line.split(","))) for line in lines]
    (tmp_path / "turned.csv").write_text("\n".join(turned))
    mine = Clicks(str(tmp_path / "mine.csv"), "clicked")
    other = Clicks(str(tmp_path / "turned.csv"), "clicked")
    assert mine.rows[0].equal(other.rows[0].flip(1))
    assert mine.rows[1].equal(other.rows[1])


def set_to(column: str, *texts: str) -> Callable[[int, dict[str, str]], None]:
    return lambda row, values: values.update({column: texts[min(row, len(texts) - 1)]})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (set_to("clicked", "1"), "1 (200)"),
        (set_to("clicked", "0", "2", "1"), "0 (1), 1 (198), 2 (1)"),
        (set_to("clicked", *"0123456"), "..."),
        (set_to("clicked", "0", "1", ""), "'' in line 4"),
        (set_to("clicked", "0", "NA", "1"), "'NA' in line 3"),
        (set_to("clicked", "1", "0"), "1 yes and 199 no"),
    ],
)
def test_labels_that_cannot_be_learned(
    edit: Callable[[int, dict[str, str]], None], says: str, tmp_path: Path
) -> None:
    task = Clicks(people(tmp_path / "mine.csv", edit), "clicked")
    with pytest.raises(DataError, match=r"the column clicked of .* cannot be learned") as caught:
        task.train_data()
    assert says in caught.value.found


def test_a_column_of_nothing_is_one_category(tmp_path: Path) -> None:
    task = Clicks(people(tmp_path / "mine.csv", set_to("letter", "", "NA")), "clicked")
    assert task.rows[0][:, 2].unique().numel() == 1


# recommend


def ratings(path: Path, *rows: str, header: str = "user_id,item_id,timestamp") -> Recommend:
    path.write_text("\n".join([header, *rows]) + "\n")
    return Recommend(str(path), width=4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1,b,", "line 3 is not a rating"),
        ("1,b,NA", "no timestamp"),
        ("1,b,nan", "no timestamp"),
        ("1,b,2024-01-03", "the timestamp '2024-01-03'"),
        (",b,4", "no user_id"),
        ("1,,4", "no item_id"),
    ],
)
def test_ratings_are_refused_by_their_line(row: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3") as caught:
        ratings(tmp_path / "mine.csv", "1,a,1", row).train_data()
    assert says in str(caught.value)


def test_what_is_rated_again_counts_once(tmp_path: Path) -> None:
    """Else the item that is held out might be one that was seen, and is never recommended."""
    task = ratings(
        tmp_path / "mine.csv", *(f"7,{item},{time}" for time, item in enumerate("abcab"))
    )
    assert task.histories[0].tolist() == [1, 2, 3]
    assert task.eval_data().tensors[2].tolist() == [3]


def test_users_as_numbers(tmp_path: Path) -> None:
    task = ratings(tmp_path / "mine.csv", *(f"{u},{i},1" for u in (7, 10) for i in "abc"))
    assert {task.from_record({"user": user}).item() for user in (7, 7.0, "7")} == {1}
    for user in (True, None, [7], 8):
        with pytest.raises(DataError, match="there is no user"):
            task.from_record({"user": user})


def test_equal_times_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    task = ratings(tmp_path / "mine.csv", "u,c,5", "u,a,5", "u,b,5", "v,a,1")
    assert task.histories[0].tolist() == [3, 1, 2]


def test_fewer_items_than_are_recommended(tmp_path: Path) -> None:
    """Nothing that was seen, and nothing that is no item, fills the list."""
    rows = [f"{user},{item},{time}" for user in "uv" for time, item in enumerate("abcd")]
    task = ratings(tmp_path / "mine.csv", *rows[:-1], "w,a,1", "x,e,1")
    found = task.predict(task.model().eval(), torch.arange(4))
    assert [set(answer["items"]) for answer in found] == [
        {"e"}, {"d", "e"}, {"b", "c", "d", "e"}, {"a", "b", "c", "d"},
    ]  # fmt: skip
    values = task.metrics(task.model().eval(), task.eval_data().tensors)
    assert all(torch.as_tensor(value).isfinite().all() for value in values.values())


# All recipes.


@pytest.mark.parametrize(
    ("recipe", "args"),
    [
        (clicks, {"width": 0}),
        (recommend, {"width": 1.5}),
        (vision, {"size": 4}),
        (vision, {"width": "wide"}),
        (translate, {"width": 18}),
        (translate, {"words": 0}),
        (summarise, {"vocabulary": 100}),
        (game, {"simulations": 0}),
        (clicks, {"data": 5}),
        (clicks, {"label": True}),
        (clicks, {"categories": 5}),
        (mnist, {"data": True}),
        (summarise, {"data": 1.5}),
        (cartpole, {"iterations": 1.5}),
        (cartpole, {"iterations": True}),
    ],
)
def test_arguments_out_of_range(recipe: Callable[..., Job], args: dict[str, Any]) -> None:
    (name,) = args
    with pytest.raises(JobError, match=name):
        recipe(**args)


def test_the_rate_falls_to_nothing_with_any_batch_size(tmp_path: Path) -> None:
    lines = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    made: list[tuple[Task, int]] = [
        (Vision(str(folder_of_images(tmp_path)), epochs=8, width=4), 2),
        (summarise(str(tmp_path / "mine.jsonl"), epochs=4, width=4).task, 27),  # type: ignore[list-item]
    ]
    for task, samples in made:
        for batch in (1, 2):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
            sampling = Sampling(samples=samples, batch_size=batch, shards=1, seed=0)
            schedule = LrSchedule(task, optimizer, sampling)
            steps = int((8 if samples == 2 else 4) * sampling.steps_per_epoch)
            rates = []
            for step in range(steps + 1):
                schedule.go_to(step)
                rates.append(optimizer.param_groups[0]["lr"])
            assert min(rates[:-2]) > 0
            assert rates[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["recommend", "clicks", "summarise"])
def test_data_that_give_the_model_another_meaning(name: str, tmp_path: Path) -> None:
    """Its numbers would be of other users, ranges or subwords, so there are none."""
    record: dict[str, Any]
    lines = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    if name == "recommend":
        path = tmp_path / "mine.csv"
        ratings(path, *(f"{user},{item},1" for user in range(9) for item in "abcd"))
        other, record = "00,a,1\n", {"user": 3}
        job = recommend(str(path), epochs=1, width=4)
    elif name == "clicks":
        path = Path(people(tmp_path / "mine.csv"))
        other, record = "5000,1,a,1\n" * 9, {"many": 1, "few": 1, "letter": "a"}
        job = clicks(str(path), "clicked", epochs=1, width=4)
    else:
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(lines) + "\n")
        other, record = lines[0].replace("source 0", "entirely new words"), {"source": "a"}
        job = summarise(str(path), epochs=1, width=16, vocabulary=300)
    task = job.task
    assert isinstance(task, Task)
    run = lockstep.run(
        job, workers=1, shards=1, threads=1, batch_size=8, steps=1, quiet=True,
        evaluate=False, out=str(tmp_path / "run"),
    )  # fmt: skip
    (tmp_path / "record.jsonl").write_text(json.dumps(record))
    known = path.read_text()
    path.write_text(known + other)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="was not fitted to these data"):
        lockstep.predict(run.folder, tmp_path / "record.jsonl", out=out, task=task)
    assert not out.exists()
    with pytest.raises(DataError, match="was not fitted to these data"):
        lockstep.evaluate(run.folder, task=task)
    (run.folder / "result.json").unlink()
    with pytest.raises(DataError, match="was not fitted to these data"):
        lockstep.resume(run.folder, task=task, quiet=True)
    path.write_text(known)
    assert lockstep.predict(run.folder, tmp_path / "record.jsonl", out=out, task=task).records
