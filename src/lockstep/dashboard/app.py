"""App: what the server answers: pages, runs, a run's stream, comparisons, requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lockstep.coordinator.run_control import RequestName, ask
from lockstep.dashboard.feed import Feed
from lockstep.dashboard.security import Guard
from lockstep.errors import LockstepError
from lockstep.results.run_comparison import differing_settings, find_parting
from lockstep.results.run_list import RunList
from lockstep.results.run_reader import RunReader
from lockstep.system.json_files import plain

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page asks of a run."""

    request: RequestName
    number: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0


def make_app(
    run_list: RunList,
    token: str,
    origins: frozenset[str],
    closing: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The application. `closing` says whether the server is about to end."""
    site = Site(run_list, closing)
    routes = [
        *(Route(path, site.page) for path in ("/", "/run/{name}", "/compare")),
        Route("/static/{name:path}", site.static),
        Route("/api/runs", site.runs),
        Route("/api/runs/{name}", site.run),
        Route("/api/runs/{name}/stream", site.stream),
        Route("/api/runs/{name}/request", site.request, methods=["POST"]),
        Route("/api/compare", site.compare),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, origins=origins)],
        exception_handlers={LockstepError: _refused, HTTPException: _not_there},
    )


class Site:
    """Site: the answers, over the runs of a run_list."""

    def __init__(self, run_list: RunList, closing: Callable[[], bool]) -> None:
        self._run_list, self._closing = run_list, closing
        self._feeds: dict[str, Feed] = {}
        self._files = _static_files()
        self._listing = asyncio.Lock()

    # Pages: the same for everybody; what they show they ask for, with the token.

    async def page(self, request: Request) -> Response:
        return Response(self._files["index.html"], media_type=KINDS[".html"])

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise HTTPException(404, "there is no such file")
        return Response(self._files[name], media_type=KINDS[name[name.rindex(".") :]])

    # Runs.

    async def runs(self, request: Request) -> Response:
        async with self._listing:
            rows = await run_in_threadpool(self._run_list.summaries)
        return _json({"single": self._run_list.single, "runs": rows})

    async def run(self, request: Request) -> Response:
        return _json(await self._feed(request).whole())

    async def stream(self, request: Request) -> Response:
        """A line of JSON for what there is, and one whenever something is new."""
        feed = self._feed(request)

        async def lines() -> AsyncIterator[bytes]:
            try:
                async for message in feed.watch(self._closing):
                    yield _encode(message) + b"\n"
            except LockstepError as error:
                yield _encode({"error": _error(error)}) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def request(self, request: Request) -> Response:
        """Leave a request with the run, as `lockstep scale` and `stop` do."""
        folder = self._run_list.find(request.path_params["name"])
        if folder is None:
            raise HTTPException(404, "there is no such run")
        try:
            asked = msgspec.json.decode(await request.body(), type=Asked)
        except msgspec.DecodeError:
            raise HTTPException(400, "a request has a name, and a number at need") from None
        taken = await run_in_threadpool(ask, folder, asked.request, asked.number)
        return _json({"max_workers": taken.max_workers})

    async def compare(self, request: Request) -> Response:
        folders = []
        for side in ("a", "b"):
            folder = self._run_list.find(request.query_params.get(side, ""))
            if folder is None:
                raise HTTPException(404, "there is no such run")
            folders.append(folder)
        return _json(await run_in_threadpool(_compare, *folders))

    def _feed(self, request: Request) -> Feed:
        name = request.path_params["name"]
        folder = self._run_list.find(name)
        if folder is None:
            raise HTTPException(404, "there is no such run")
        return self._feeds.setdefault(name, Feed(name, folder))


def _compare(*folders: Any) -> dict[str, Any]:
    sides, manifests = [], []
    for folder in folders:
        reader = RunReader(folder)
        reader.refresh()
        manifests.append(reader.manifest)
        sides.append({
            "facts": reader.summary(folder.name),
            "progress": reader.history.progress.rows,
            "evaluations": reader.history.evaluations.rows,
        })  # fmt: skip
    parting = find_parting(*(folder / "ledger.jsonl" for folder in folders))
    return {
        "runs": sides,
        "settings": differing_settings(*manifests),
        "parting": asdict(parting),
    }


def _static_files() -> dict[str, bytes]:
    """The files of the page, by name."""
    root = resources.files("lockstep.dashboard") / "static"
    files = {}
    for folder, prefix in ((root, ""), (root / "uplot", "uplot/")):
        for file in folder.iterdir():
            if any(file.name.endswith(ending) for ending in KINDS):
                files[prefix + file.name] = file.read_bytes()
    return files


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)  # a number that is not finite becomes null
    except UnicodeEncodeError:  # half of a character, from an escape in a file
        return json.dumps(plain(value)).encode()


def _json(value: Any, status: int = 200) -> Response:
    return Response(_encode(value), status, media_type="application/json")


def _error(error: LockstepError) -> dict[str, str]:
    return {
        "what": error.what, "expected": error.expected, "found": error.found, "fix": error.fix
    }  # fmt: skip


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, LockstepError)
    return _json(_error(error), 409)


def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"what": error.detail}, error.status_code)
