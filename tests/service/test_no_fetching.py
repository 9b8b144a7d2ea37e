"""The service opens no connection that a client could name."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest

import engines
import service
from tests.service.helpers import Running, b64, error, png, random_image

pytestmark = pytest.mark.anyio

SERVICE = Path(*service.__path__)
# A client of the service is not a part of what serves.
CLIENT = {SERVICE / "client.py", *(SERVICE / "client").rglob("*.py")}
FILES = sorted({*Path(*engines.__path__).rglob("*.py"), *SERVICE.rglob("*.py")} - CLIENT)
CLIENTS = {"aiohttp", "ftplib", "http.client", "httpx", "requests", "smtplib", "urllib.request", "urllib3"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its head or within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_imports_a_client_of_urls(path: Path) -> None:
    found = imported(path)
    assert not {name for name in found for client in CLIENTS if name == client or name.startswith(f"{client}.")}


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "HTTP", "data:image/png;base64,http", "file"])
@pytest.mark.parametrize("field", ["image", "mask"])
async def test_an_address_in_place_of_an_image_is_refused_and_never_called(
    app: Running, scheme: str, field: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        fields = dict.fromkeys(("image", "mask"), b64(png(random_image())))
        fields[field] = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/image.png"
        error(await app.post("/inpaint", prompt="a cat", **fields), 400, "invalid_base64", field)
        with pytest.raises(TimeoutError):
            server.accept()
