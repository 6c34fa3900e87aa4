"""A task's file that parses the command line when it is imported."""

from __future__ import annotations

from pathlib import Path

from tests.support import command

TRAIN = """
import argparse, sys, torch, lockstep
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
args = parser.parse_args()

class T(lockstep.Task):
    def model(self): return torch.nn.Linear(4, 2)
    def train_data(self): return [(torch.ones(4), 1)] * 32
    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    def optimizer(self, params):
        print(sys.argv, args.lr, file=sys.stderr)
        return torch.optim.SGD(params, lr=args.lr)
"""
RUN = "import train, lockstep; lockstep.run(train.T(), workers=1, shards=1, threads=1, quiet=True)"


def test_argparse_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "go.py").write_text(RUN)
    options = ("--workers=1", "--shards=1", "--threads=1", "--batch-size=8", "--quiet")
    ended = command.lockstep("run", "train.py:T", *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"['{tmp_path}/train.py'] 0.1" in ended.stderr


def test_a_script_with_options_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "go.py").write_text(RUN.replace("workers=1", "batch_size=8, workers=1"))
    ended = command.python("go.py", "--lr", "0.5", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "['go.py', '--lr', '0.5'] 0.5" in ended.stderr
