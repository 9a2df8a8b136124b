"""The routes of the app. Nothing of a request reaches a page, a path or a log but as data."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Body, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmcl.evaluation.pages import page_file
from mmcl.search import Hit
from mmcl.serve.library import KINDS, Library
from mmcl.serve.uploads import Limits, TooLargeError, receive, upload_folder
from mmcl.types import ConfigError, SampleError

T = TypeVar("T")

ASSETS: dict[str, tuple[str, Callable[[], str]]] = {
    "page.css": ("text/css", partial(page_file, "page.css")),
    "media.js": ("text/javascript", partial(page_file, "media.js")),
    "serve.js": ("text/javascript", lambda: _own_file("serve.js")),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Top = Annotated[int, Query(ge=1)]
Text = Annotated[str, Body(embed=True, min_length=1)]


def build_app(library: Library, limits: Limits | None = None, *, hosts: Sequence[str] = ("127.0.0.1",)) -> FastAPI:
    """The app for one library.

    Args:
        hosts: names that requests may be addressed to; a page of another site, whose name was made to point here, is
            refused.
    """
    limits = limits or Limits()
    folder: list[Path] = []

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        with upload_folder() as made:
            folder.append(made)
            yield
            folder.clear()

    app = FastAPI(title="mmcl serve", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    turn = _Turn(limits)
    _add_guards(app, limits, hosts)

    @app.get("/")
    def start() -> Response:
        return Response(_own_file("index.html"), media_type="text/html")

    @app.get("/assets/{name}")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        kind, read = ASSETS[name]
        return Response(read(), media_type=kind)

    @app.get("/about")
    def about() -> dict[str, Any]:
        """What there is to search, and by what."""
        return {
            "items": len(library.index),
            "modalities": [name for name in library.index.modalities if library.index.count(name)],
            "default": library.index.default_modality,
            "by": [*(["text"] if library.takes_text() else []), *library.specs()],
            "upload_bytes": limits.upload_bytes,
        }

    @app.post("/search/text")
    async def by_text(text: Text, top: Top = 10, modality: str | None = None) -> dict[str, Any]:
        if len(text) > limits.text_letters:
            raise HTTPException(413, f"{len(text)} letters; at most {limits.text_letters} are taken")
        find = partial(library.by_text, text, min(top, limits.top), modality)
        return await turn.take(lambda: _found(library, find))

    @app.post("/search/file")
    async def by_file(request: Request, top: Top = 10, modality: str | None = None) -> dict[str, Any]:
        """The body is the file itself, whatever its name and the type that it is said to have."""

        async def answer() -> dict[str, Any]:
            path = folder[0] / secrets.token_hex(16)
            try:
                await receive(request.stream(), path, limits.upload_bytes)
                find = partial(library.by_upload, path, min(top, limits.top), modality, limits.decode_seconds)
                return await turn.one_at_a_time(lambda: _found(library, find))
            finally:
                path.unlink(missing_ok=True)

        return await turn.within(answer)

    @app.get("/media/{shard}/{index}/{kind}")
    def medium(shard: int, index: int, kind: str) -> Response:
        if kind not in KINDS or library.shards is None or not library.shards.holds(shard, index):
            raise HTTPException(404, "no such medium")
        made = library.shards.medium(shard, index, kind)
        if made is None:
            raise HTTPException(404, "it cannot be shown")
        # a drawing opened by its address is a document, and must run nothing
        return Response(made[0], media_type=made[1], headers={"Cache-Control": "private, max-age=3600"})

    return app


def _found(library: Library, find: Callable[[], list[Hit]]) -> dict[str, Any]:
    return {"hits": [library.shown(hit) for hit in find()]}


class _Turn:
    """Searches run one after another; those that wait are counted, and none lasts longer than its time."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.running = limits, 0
        self._lock = anyio.CapacityLimiter(1)

    async def take(self, work: Callable[[], T]) -> T:
        return await self.within(lambda: self.one_at_a_time(work))

    async def one_at_a_time(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._lock, abandon_on_cancel=True)

    async def within(self, work: Callable[[], Awaitable[T]]) -> T:
        if self.running >= self.limits.at_once:
            raise HTTPException(503, f"{self.running} searches are waiting; try again in a moment")
        self.running += 1
        try:
            with anyio.fail_after(self.limits.request_seconds):
                return await work()
        except TimeoutError:
            raise HTTPException(408, f"took longer than {self.limits.request_seconds:g} seconds") from None
        finally:
            self.running -= 1


def _add_guards(app: FastAPI, limits: Limits, hosts: Sequence[str]) -> None:
    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        declared = request.headers.get("content-length", "0")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            response: Response = _error(403, "requests from other sites are refused")
        elif declared.isdecimal() and int(declared) > limits.upload_bytes:
            response = _error(413, f"larger than {limits.upload_bytes >> 20} MiB, the most that is taken")
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(TooLargeError)
    async def too_large(*_: object) -> Response:
        return _error(413, f"larger than {limits.upload_bytes >> 20} MiB, the most that is taken")

    @app.exception_handler(SampleError)
    async def no_media(_: Request, error: SampleError) -> Response:
        words = {"timeout": f"decoding it took longer than {limits.decode_seconds:g} seconds"}
        known = error.detail if error.reason == "no_tower" else "the file cannot be read as a picture, video or sound"
        return _error(415, words.get(error.reason, known))

    @app.exception_handler(ConfigError)
    async def wrong(_: Request, error: ConfigError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        logging.getLogger("uvicorn.error").exception("a request failed", exc_info=error)
        return _error(500, "this request failed; the log says why")


def _error(status: int, words: str) -> Response:
    return JSONResponse({"error": words}, status_code=status, headers=HEADERS)


def _own_file(name: str) -> str:
    return resources.files("mmcl.serve").joinpath("page").joinpath(name).read_text(encoding="utf-8")


def allowed_hosts(host: str) -> list[str]:
    """Names that requests may be addressed to, for an app that listens at ``host``.

    >>> allowed_hosts("127.0.0.1")
    ['127.0.0.1', 'localhost']
    """
    if host in ("127.0.0.1", "localhost", "::1"):
        return ["127.0.0.1", "localhost", *(["[::1]"] if host == "::1" else [])]
    return ["*"] if host in ("0.0.0.0", "::") else [host, socket.gethostname()]


def serve(library: Library, *, host: str, port: int, limits: Limits | None = None) -> None:
    """Answers until it is interrupted.

    Raises:
        ConfigError: the port is taken, or may not be opened.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # who reads the address below may come at once
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    app = build_app(library, limits, hosts=allowed_hosts(host))
    shown = f"[{host}]" if ":" in host else host
    print(f"{len(library.index)} items at http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=5)).run(sockets=[listener])
