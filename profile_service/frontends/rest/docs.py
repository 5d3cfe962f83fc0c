"""The API's description for people, at `/docs`: Swagger UI over `/openapi.json`, served from this package alone."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_HERE = Path(__file__).parent
# The page can try every operation: nothing but what this package ships may run in it.
_HEADERS = {
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def routes() -> list[BaseRoute]:
    """The page and the files it loads."""
    return [
        Route("/docs", _page),
        Mount("/docs/page", StaticFiles(directory=_HERE / "docs_page")),
        Mount("/docs/swagger_ui", StaticFiles(directory=_HERE / "swagger_ui")),
    ]


async def _page(request: Request) -> Response:
    return FileResponse(_HERE / "docs_page" / "index.html", headers=_HEADERS)
