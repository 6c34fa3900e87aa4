"""The recipes vision, recommend and clicks, on small files that the tests make themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lockstep
from benchmarks.applications import curve
from lockstep import recipes
from lockstep.errors import DataError
from lockstep.job.faults import Fault
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.recipes.clicks import Clicks, auc, clicks, hashed, ranges_of
from lockstep.recipes.datasets import fetch
from lockstep.recipes.datasets.idx import to_idx
from lockstep.recipes.datasets.images import IDX_NAMES
from lockstep.recipes.datasets.tables import read_table
from lockstep.recipes.mnist import Mnist
from lockstep.recipes.recommend import LENGTH, Recommend, ranking, recommend, unseen
from lockstep.recipes.vision import Vision, jitter, vision
from tests.support.harmed_runs import assert_same, assert_struck

CLASSES, SIDE = 3, 12


def images(folder: Path) -> Path:
    """Noise with a bright square whose place tells the class: 60 to learn from, 21 held out."""
    draw = np.random.RandomState(1)
    for (images_name, labels_name), count in zip(IDX_NAMES.values(), (60, 21), strict=True):
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        pixels = draw.randint(0, 80, (count, SIDE, SIDE)).astype(np.uint8)
        for place, label in enumerate(labels):
            pixels[place, 4 * label : 4 * label + 4] += 150
        (folder / images_name).write_bytes(to_idx(pixels))
        (folder / labels_name).write_bytes(to_idx(labels))
    return folder


def ratings(folder: Path) -> Path:
    """Thirty users who each go through the items in a circle, one after the other."""
    rows = ["user_id,item_id,timestamp"]
    rows += [
        f"u{user},i{(7 * user + time) % 40:02},{time}"
        for user in range(30)
        for time in range(8 + user % 3)
    ]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    return folder / "ratings.csv"


def rows(folder: Path) -> Path:
    """200 rows: a number and a letter, which together say whether it is a yes."""
    draw = np.random.RandomState(2)
    lines = ["number,letter,clicked"]
    for number, letter in zip(
        draw.randint(0, 1000, 200), draw.choice(list("abc"), 200), strict=True
    ):
        lines.append(f"{number},{letter},{'yes' if number > 500 and letter != 'a' else 'no'}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def job(name: str, folder: Path) -> Job:
    """The recipe on a small file, for 8 steps or so."""
    if name == "vision":
        return vision(str(images(folder)), epochs=2, width=4).replace(batch_size=15)
    if name == "recommend":
        return recommend(str(ratings(folder)), epochs=2, width=8).replace(batch_size=48)
    return clicks(str(rows(folder)), label="clicked", epochs=2, width=4).replace(batch_size=40)


NAMES = ("vision", "recommend", "clicks")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name: str, tmp_path: Path) -> None:
    """On one worker, on two, and on three of which one is killed."""
    made = job(name, tmp_path).replace(shards=3, threads=1, eval_batch_size=7)
    whole = lockstep.run(made, workers=1, out=str(tmp_path / "1"), quiet=True)
    two = lockstep.run(made, workers=2, out=str(tmp_path / "2"), quiet=True)
    assert_same(two, whole)
    faults = (Fault(worker_id=1, step=3, phase="backward"),)
    harmed = lockstep.run(made, workers=3, out=str(tmp_path / "3"), quiet=True, faults=faults)
    assert_struck(harmed.folder, faults)
    assert_same(harmed, whole)
    assert harmed.baseline == two.baseline == whole.baseline
    assert whole.baseline.keys() < whole.metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_named_by_the_command_line(name: str, tmp_path: Path) -> None:
    found = recipes.find(name)()
    assert isinstance(found, Job)
    assert isinstance(found.task, Task)


def train(task: Task, steps: int) -> torch.nn.Module:
    """The recipe in one process, on all of its data at once."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(lockstep.Parameters(model.named_parameters()))
    tensors = task.train_data().tensors  # type: ignore[attr-defined]
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, tensors).backward()
        optimizer.step()
    return model.eval()


def held_out(task: Task, model: torch.nn.Module) -> dict[str, float]:
    tensors = task.eval_data().tensors  # type: ignore[union-attr]
    with torch.no_grad():
        values = dict(task.metrics(model, tensors))
        scores = task.score(dict(task.outputs(model, tensors)))
    return {k: torch.as_tensor(v).double().mean().item() for k, v in {**values, **scores}.items()}


# vision


def test_vision_learns_and_predicts(tmp_path: Path) -> None:
    task = Vision(str(images(tmp_path)), epochs=1, width=4)
    assert task.baseline() == {"accuracy": 1.0}  # the squares stand still
    model = train(task, 40)
    assert held_out(task, model)["accuracy"] > 0.9
    found = task.predict(model, task.eval_data().tensors[0][:6])
    assert [answer["class"] for answer in found] == ["0", "1", "2"] * 2
    assert all(0.3 < answer["probability"] <= 1 for answer in found)


def test_jitter_moves_whole_pixels_and_draws_from_torch_alone() -> None:
    given = torch.arange(2 * 3 * 36, dtype=torch.uint8).view(2, 3, 6, 6)
    torch.manual_seed(3)
    first = jitter(given)
    torch.manual_seed(3)
    assert jitter(given).equal(first)
    assert first.shape == given.shape
    assert first.dtype == torch.uint8
    middle = first[:, :, 2:4, 2:4].flatten().tolist()
    assert set(middle) <= set(given.flatten().tolist())
    many = torch.full((500, 1, 5, 5), 0)
    many[:, 0, 2, 2] = 1
    many[:, 0, 2, 3] = 2
    places = {tuple(map(int, (image[0] == 1).nonzero()[0])) for image in jitter(many)}
    assert len(places) == 25  # every shift by up to two pixels
    mirrored = (jitter(many)[:, 0].argmax(dim=2).amax(dim=1) >= 0).sum()
    assert mirrored == 500


def test_the_rate_rises_and_falls_to_nothing(tmp_path: Path) -> None:
    task = Vision(str(images(tmp_path)), epochs=100, width=4)
    optimizer = task.optimizer(lockstep.Parameters(task.model().named_parameters()))
    schedule = task.scheduler(optimizer)
    rates = []
    for _ in range(105):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[20] == pytest.approx(0.15)
    assert rates[0] == pytest.approx(0.0075)
    assert rates[100:] == [0.0] * 5


# recommend


def test_recommend_learns_and_predicts(tmp_path: Path) -> None:
    task = Recommend(str(ratings(tmp_path)), width=16)
    model = train(task, 150)
    metrics, popular = held_out(task, model), task.baseline()
    assert metrics["hr@10"] > 0.9 > popular["hr@10"]
    assert metrics["ndcg@10"] > popular["ndcg@10"]
    answers = task.predict(model, torch.tensor([0, 29]))
    for answer, user in zip(answers, (0, 29), strict=True):
        taken = {task.ratings.item_names[item - 1] for item in task.histories[user].tolist()}
        assert len(set(answer["items"])) == 10
        assert not taken & set(answer["items"])


def test_the_last_item_is_never_learned_from(tmp_path: Path) -> None:
    task = Recommend(str(ratings(tmp_path)))
    users, before, items = task.train_data().tensors
    for user, history in enumerate(task.histories):
        mine = users == user
        assert items[mine].tolist() == history[1:-1].tolist()
        assert before[mine][0].tolist() == [0] * (LENGTH - 1) + history[:1].tolist()
    _, recent, last, seen = task.eval_data().tensors
    assert last.tolist() == [history[-1] for history in task.histories]
    assert recent[0].tolist() == [0] * (LENGTH - 7) + task.histories[0][:-1].tolist()
    assert [sorted(row[row > 0].tolist()) for row in seen] == [
        sorted(history[:-1].tolist()) for history in task.histories
    ]


def test_ranking_against_sorting() -> None:
    torch.manual_seed(0)
    scores = torch.randn(50, 31)
    seen = torch.stack([torch.randperm(30)[:8] + 1 for _ in range(50)])
    items = torch.tensor([min(set(range(1, 31)) - set(row.tolist())) for row in seen])
    found = ranking(unseen(scores, seen), items)
    for user in range(50):
        allowed = [i for i in range(1, 31) if i not in seen[user].tolist()]
        order = sorted(allowed, key=lambda item: -scores[user, item].item())
        rank = order.index(int(items[user]))
        assert found["hr@10"][user].item() == (rank < 10)
        gain = 1 / math.log2(rank + 2) if rank < 10 else 0.0
        assert found["ndcg@10"][user].item() == pytest.approx(gain)


def test_equal_scores_share_their_ranks() -> None:
    values = ranking(
        torch.zeros(2, 41).index_fill(1, torch.tensor([0]), -torch.inf), torch.ones(2).long()
    )
    assert values["hr@10"].tolist() == [False, False]  # rank 19.5 of 40


def test_ratings_without_anything_to_learn(tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("user,item\na,x\na,y\nb,x\n")
    with pytest.raises(DataError, match="nothing to learn from"):
        Recommend(str(tmp_path / "few.csv")).train_data()


# clicks


def test_clicks_learn_and_predict(tmp_path: Path) -> None:
    task = Clicks(str(rows(tmp_path)), "clicked", width=4)
    model = train(task, 300)
    metrics = held_out(task, model)
    assert metrics["auc"] > 0.95
    assert task.baseline()["auc"] > 0.8
    features, answers = task.eval_data().tensors
    probabilities = [answer["probability"] for answer in task.predict(model, features)]
    assert np.mean((np.array(probabilities) > 0.5) == (answers.numpy() > 0)) == pytest.approx(
        metrics["accuracy"]
    )


def test_auc_against_counting_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (80,), generator=draw).double()
    yes = torch.rand(80, generator=draw) < 0.4
    pairs = scores[yes][:, None] - scores[~yes][None, :]
    wanted = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert auc(scores, yes) == pytest.approx(wanted, abs=1e-12)
    assert math.isnan(auc(scores, torch.ones(80, dtype=torch.bool)))


def test_buckets_do_not_depend_on_what_is_held_out() -> None:
    table = {"letter": ["a", "b", "a"], "number": ["1", "2", "1"]}
    some = hashed(table, ranges_of(table, np.array([True, True, False])))
    assert some.tolist() == hashed(table, ranges_of(table, np.array([True, False, True]))).tolist()
    assert some[0].tolist() == some[2].tolist() != some[1].tolist()
    assert some.shape == (3, 2)
    many = {"number": [str(value) for value in range(1000)]}
    ranges = hashed(many, ranges_of(many, np.arange(1000) < 800))
    assert 30 < len(set(ranges[:, 0].tolist())) <= 80
    assert len(set(ranges[790:, 0].tolist())) == 1  # beyond what is known: the last range


def test_a_row_as_a_record(tmp_path: Path) -> None:
    path = rows(tmp_path)
    task, table = Clicks(str(path), "clicked", width=4), read_table(path).columns
    for row in range(3):
        record = {name: values[row] for name, values in table.items() if name != "clicked"}
        assert task.from_record(record).equal(task.rows[0][row])
    name, value = record.popitem()
    with pytest.raises(DataError, match=f"none of {name}"):
        task.from_record(record)
    assert task.from_record({**record, name: value, "more": 1}).equal(task.rows[0][2])


def test_users_and_digits_as_records(tmp_path: Path) -> None:
    films = Recommend(str(ratings(tmp_path)))
    name = films.ratings.user_names[3]
    assert films.from_record({"user": name}).item() == 3
    with pytest.raises(DataError, match="there is no user nobody"):
        films.from_record({"user": "nobody"})
    digits = Mnist("cnn")
    image = digits.from_record({"pixels": [255] * 784})
    assert image.equal(torch.ones(1, 28, 28))
    (answer,) = digits.predict(digits.model().eval(), digits.collate([image]))
    assert 0 <= answer["digit"] <= 9
    with pytest.raises(DataError, match="3 pixels"):
        digits.from_record({"pixels": [1, 2, 3]})


def test_an_image_file_as_a_record(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    task = Vision(str(images(tmp_path)), epochs=1, width=4)
    size = task.images.train_images.shape[-1]
    image.new("RGB", (50, 40), (255, 255, 255)).save(tmp_path / "white.png")
    sample = task.from_record({"image": str(tmp_path / "white.png")})
    assert sample.equal(torch.full((1, size, size), 255, dtype=torch.uint8))
    with pytest.raises(DataError, match="a record is not an image"):
        task.from_record({"picture": "white.png"})


def test_label_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--label COLUMN"):
        Clicks(str(rows(tmp_path)), "income").model()


# With the real data: minutes each.

BARS = {"vision": ("accuracy", 0.91), "recommend": ("hr@10", 0.12), "clicks": ("auc", 0.90)}
DATA = {"vision": "fashion-mnist", "recommend": "movielens-100k", "clicks": "adult"}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_defaults_reach_what_the_recipe_promises(name: str, run_folder: str) -> None:
    fetch(DATA[name])
    result = lockstep.run(name, workers=2, shards=2, threads=1, out=run_folder, quiet=True)
    metric, bar = BARS[name]
    assert result.metrics[metric] >= bar
    assert result.metrics[metric] > result.baseline[metric]


def test_curve_of_a_run(tmp_path: Path) -> None:
    history = [{"step": 5 * n, "metrics": {"auc": 0.9 + n / 100}} for n in (1, 2, 3)]
    result = {"history": history, "baseline": {"auc": 0.85}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    drawn = curve(tmp_path, "auc")
    assert "auc: 0.93" in drawn
    assert "baseline: 0.85" in drawn
