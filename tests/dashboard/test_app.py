"""What the page's server answers, and to whom: attacks, requests to runs, what a stream says."""

from __future__ import annotations

import contextlib
import json
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra dashboard is not installed")
pytest.importorskip("uvicorn", reason="the extra dashboard is not installed")

from starlette.testclient import TestClient

from lockstep.coordinator.run_control import RunControl
from lockstep.dashboard.app import make_app
from lockstep.dashboard.security import address_file, new_token
from lockstep.dashboard.server import watch
from lockstep.errors import JobError, ResourceError
from lockstep.results.run_list import RunList
from tests.support.recorded_runs import (
    HOSTILE,
    append,
    began,
    line,
    make_run,
    pace,
    workers,
    write_ledger,
)

TOKEN = new_token()
PAGE = "http://127.0.0.1:8700"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    events = [began(), *workers(1, [0, 1]), *pace(2, 10), *pace(3, 20)]
    make_run(tmp_path / "secret")
    write_ledger(make_run(tmp_path / "runs" / "a", events), [1.0, 0.5, 0.25], end=False)
    finished = [line(4, "finished", steps=100, fingerprint="ab" * 32)]
    write_ledger(make_run(tmp_path / "runs" / "b", [*events, *finished], seed=3), [1.0, 0.5, 0.125])
    return tmp_path / "runs"


@pytest.fixture
def client(runs: Path) -> Iterator[TestClient]:
    with make_client(runs) as client:
        yield client


def make_client(path: Path, **options: Any) -> TestClient:
    app = make_app(RunList(path), TOKEN, frozenset({PAGE, "http://localhost:8700"}), **options)
    return TestClient(app, base_url=PAGE, headers=KNOWN)


# Who is answered.


@pytest.mark.parametrize("path", ["/api/runs", "/api/runs/a", "/api/runs/a/stream", "/api/compare"])
@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN,
     "Bearer \u00e9".encode("latin-1").decode("latin-1")],
)  # fmt: skip
def test_without_the_token_nothing_is_told(client: TestClient, path: str, shown: str) -> None:
    headers = {b"Authorization": shown.encode("latin-1")}
    answer = client.get(path, headers=headers)
    assert answer.status_code == 401
    assert "a" not in answer.json().get("runs", "")
    assert client.get(f"{path}?token={TOKEN}", headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8700", "127.0.0.1", "127.0.0.1:8701",
     "localhost:8700.evil.example", "", "127.0.0.1:8700, evil.example"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/app.js"])
def test_other_hosts_are_not_served(client: TestClient, path: str, host: str) -> None:
    """A name of somebody else's that leads here, as with DNS rebinding."""
    assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "https://127.0.0.1:8700", "http://127.0.0.1:9999", None],
)  # fmt: skip
def test_requests_of_other_pages_change_nothing(
    client: TestClient, runs: Path, origin: str | None
) -> None:
    with listening(runs / "a") as control:
        headers = {} if origin is None else {"Origin": origin}
        answer = client.post("/api/runs/a/request", json={"request": "stop"}, headers=headers)
        assert answer.status_code == 403
        form = {"Origin": PAGE, "Content-Type": "application/x-www-form-urlencoded"}
        answer = client.post("/api/runs/a/request", content='{"request":"stop"}', headers=form)
        assert answer.status_code == 415
        answer = client.post(
            "/api/runs/a/request", json={"request": "stop"},
            headers={"Origin": PAGE, "Authorization": ""},
        )  # fmt: skip
        assert answer.status_code == 401
        assert client.get("/api/runs/a/request").status_code == 405
        assert control.take() == []


@pytest.mark.parametrize(
    "name",
    ["..%2Fsecret", "%2e%2e%2fsecret", "..", "../secret", "%2Fetc", "a%2F..%2F..%2Fsecret",
     "secret", "a%00", "%ff"],
)  # fmt: skip
def test_no_path_leads_out(client: TestClient, name: str) -> None:
    for path in (f"/api/runs/{name}", f"/api/runs/{name}/stream", f"/api/compare?a={name}&b=a"):
        assert client.get(path).status_code == 404
    headers = {"Origin": PAGE}
    asked = client.post(f"/api/runs/{name}/request", json={"request": "stop"}, headers=headers)
    assert asked.status_code in (404, 405)
    for file in (
        "/static/..%2Fapp.py",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
    ):
        assert client.get(file).status_code == 404


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", '"stop"', '{"request":"launch"}', '{"request":"scale","number":1.5}',
     '{"request":"scale","number":true}', '{"request":"scale","number":-1}', "{" * 2000,
     '{"request":"stop","more":1}', '{"request":"scale","number":"2"}'],
)  # fmt: skip
def test_a_request_of_another_form_is_refused(client: TestClient, runs: Path, body: str) -> None:
    headers = {"Origin": PAGE, "Content-Type": "application/json"}
    with listening(runs / "a") as control:
        answer = client.post("/api/runs/a/request", content=body, headers=headers)
        assert answer.status_code in (400, 413)
        assert control.take() == []


def test_a_long_body_is_not_read(client: TestClient) -> None:
    headers = {"Origin": PAGE, "Content-Type": "application/json"}
    answer = client.post("/api/runs/a/request", content=b" " * 5000, headers=headers)
    assert answer.status_code == 413
    parts = iter([b"{}", b"{}"])  # of unknown length
    answer = client.post("/api/runs/a/request", content=parts, headers=headers)
    assert answer.status_code == 413


def test_the_headers_of_every_answer(client: TestClient) -> None:
    for path in (
        "/",
        "/run/a",
        "/compare",
        "/static/app.js",
        "/api/runs",
        "/nothing",
        "/api/runs/x",
    ):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
        assert "set-cookie" not in headers


def test_pages_have_no_script_of_their_own_and_ask_nobody_else(client: TestClient) -> None:
    page = client.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"\son\w+=", page)
    assert not re.search(r"style=", page)
    names = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    names += [f"/static/{name}" for name in ("charts.js", "timeline.js", "run_page.js", "dom.js")]
    for name in names:
        text = client.get(name).text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "innerHTML" not in text or "uplot" in name
        assert "eval(" not in text


# What is answered.


def test_the_list_of_runs(client: TestClient) -> None:
    found = {row["folder"]: row for row in client.get("/api/runs").json()["runs"]}
    assert {name: row["status"] for name, row in found.items()} == {"a": "running", "b": "finished"}
    assert found["a"]["step"] == 20


def test_a_run(client: TestClient) -> None:
    told = client.get("/api/runs/a").json()
    assert told["facts"]["workers"] == 2
    assert told["facts"]["ledger"] == {"steps": 3, "broken": None, "whole": False}
    assert len(told["rows"]["times"]) == 4
    assert told["details"]["reasons"] == ["2 workers, as asked"]


def test_two_runs_compared(client: TestClient) -> None:
    told = client.get("/api/compare?a=a&b=b").json()
    assert told["settings"] == [["setting seed", "0", "3"]]
    assert told["parting"]["step"] == 2
    assert [run["facts"]["folder"] for run in told["runs"]] == ["a", "b"]


def test_one_run_is_served_alone(runs: Path) -> None:
    with make_client(runs / "a") as client:
        assert [row["folder"] for row in client.get("/api/runs").json()["runs"]] == ["a"]
        assert client.get("/api/runs/b").status_code == 404


def test_what_hostile_files_say_stays_text(client: TestClient, runs: Path) -> None:
    """It comes as JSON, which the page sets as text."""
    append(
        runs / "a", [line(5, "died", worker=0, how=HOSTILE), line(6, HOSTILE, **{HOSTILE: HOSTILE})]
    )
    with (runs / "a" / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"event":"died","worker":' + b"9" * 5000 + b"}\n[1]\n{")
    answer = client.get("/api/runs/a")
    assert answer.headers["content-type"] == "application/json"
    texts = [row[3] for row in answer.json()["rows"]["events"]]
    assert any(HOSTILE in text for text in texts)


def test_a_folder_that_cannot_be_read_is_an_answer(client: TestClient, runs: Path) -> None:
    (runs / "a" / "manifest.json").write_text("[")
    assert client.get("/api/runs/a").status_code == 409
    assert [row["folder"] for row in client.get("/api/runs").json()["runs"]] == ["b"]


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[RunControl]:
    """Somebody who takes the requests of a run, as its coordinator does."""
    with RunControl() as control:
        control.open(folder, 4)
        yield control


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"request": "scale", "number": 3}, ("scale", 3)),
        *(({"request": name}, (name, 0)) for name in ("checkpoint", "pause", "go_on", "stop")),
    ],
)
def test_requests_reach_the_run(
    client: TestClient, runs: Path, asked: dict[str, Any], expected: tuple[str, int]
) -> None:
    taken: list[Any] = []
    done = threading.Event()
    with listening(runs / "a") as control:

        def take() -> None:
            while not done.wait(0.02):
                taken.extend(control.take())

        thread = threading.Thread(target=take)
        thread.start()
        try:
            answer = client.post("/api/runs/a/request", json=asked, headers={"Origin": PAGE})
            most = {"request": "scale", "number": 9}
            refused = client.post("/api/runs/a/request", json=most, headers={"Origin": PAGE})
        finally:
            done.set()
            thread.join()
    assert answer.json() == {"max_workers": 4}
    assert [(request.name, request.number) for request in taken] == [expected]
    assert refused.status_code == 409
    assert "9 workers" in refused.json()["what"]


def test_nobody_takes_the_request_of_a_run_that_has_ended(client: TestClient) -> None:
    headers = {"Origin": PAGE}
    answer = client.post("/api/runs/b/request", json={"request": "stop"}, headers=headers)
    assert answer.status_code == 409
    assert "nothing runs" in answer.json()["what"]


def test_a_stream_says_what_is_new(runs: Path) -> None:
    """And a last time when the server closes, so that a page has the end of its run."""
    messages: list[dict[str, Any]] = []
    looks = iter(range(1000))

    def closing() -> bool:
        number = next(looks)
        if number == 3:
            append(runs / "a", [line(7, "died", worker=0, host="x", step=20)])
        if number == 6:
            append(runs / "a", [line(8, "finished", steps=100, fingerprint="ab")])
        return number == 6

    with make_client(runs, closing=closing) as client:
        answer = client.get("/api/runs/a/stream")
    messages = [json.loads(each) for each in answer.text.splitlines()]
    assert messages[0]["anew"]
    assert [row[2] for each in messages[1:] for row in each["rows"].get("events", [])] == [
        "died", "finished"
    ]  # fmt: skip
    assert not any("progress" in each["rows"] for each in messages[1:])
    assert messages[-1]["closing"]
    assert messages[-1]["facts"]["status"] == "finished"


# The server.


def test_the_address_is_for_its_owner_alone(tmp_path: Path) -> None:
    with address_file(tmp_path, "http://127.0.0.1:1/#token=x") as path:
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text() == "http://127.0.0.1:1/#token=x\n"
        with address_file(tmp_path, "http://127.0.0.1:2/#token=y"):
            pass  # the last one has the file
    assert not path.exists()
    with address_file(tmp_path / "gone", "x") as path:
        assert path is None
    assert len(new_token()) >= 43
    assert new_token() != new_token()


def test_addresses_that_are_not_served(runs: Path) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(JobError):
            watch(runs, host=host, port=0, say=print)
    with pytest.raises(ResourceError):
        watch(runs, host="192.0.2.1", port=0, say=print)


def test_halves_of_characters_and_numbers_that_are_none(client: TestClient, runs: Path) -> None:
    manifest = runs / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"digits"', '"\\ud800"'))
    with (runs / "a" / "events.jsonl").open("a") as file:
        file.write('{"time":"","event":"note","text":"\\udfff"}\n')
        file.write('{"time":"","event":"progressed","steps":1,"loss":1e999}\n')
    assert client.get("/api/runs/a").json()["facts"]["name"] == "\ud800"
    assert len(client.get("/api/runs").json()["runs"]) == 2
