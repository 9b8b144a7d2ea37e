"""A service with keys, and what its two kinds of clients make of it: OpenAI's and ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from service.app import create_app
from service.client import Client, Retries, ServiceError
from service.security.api_keys import ApiKey, digest_of
from service.settings import Settings
from tests.service.helpers import listening

GOOD, SLOW = "key of ann", "key of slow"


@pytest.fixture
def url(bundle_path: Path, tmp_path: Path) -> Iterator[str]:
    keys = [ApiKey("ann", digest_of(GOOD)), ApiKey("slow", digest_of(SLOW), per_minute=1)]
    path = tmp_path / "keys"
    path.write_text("\n".join(key.line for key in keys))
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", api_keys_file=path))
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_openais_client_sends_its_key(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=GOOD, max_retries=0) as client:
        assert client.images.generate(prompt="a cat", extra_body={"steps": 1}).data
        assert [model.id for model in client.models.list()] == ["tiny"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.images.generate(prompt="a cat")
        assert caught.value.code
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=f"{url}/v1", api_key=SLOW, max_retries=0) as client:
        assert client.images.generate(prompt="a cat", extra_body={"steps": 1}).data
        with pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="a cat")


def test_our_client_sends_its_key(url: str) -> None:
    with Client(url, api_key=GOOD) as client:
        assert client.generate("a cat", steps=1).images
    with Client(url.replace("http://", "http://user:password@"), api_key=GOOD) as client:
        assert client.generate("a cat", steps=1).images
    with httpx.Client(headers={"Authorization": "Basic proxy"}) as http, Client(url, api_key=GOOD, http=http) as client:
        assert client.generate("a cat", steps=1).images
        assert http.headers["authorization"] == "Basic proxy"
    for key in (None, "another"):
        with Client(url, api_key=key) as client, pytest.raises(ServiceError) as caught:
            client.generate("a cat")
        assert (caught.value.status, caught.value.retryable) == (401, False)
    with Client(url, api_key=SLOW, retries=Retries(tries=1)) as client:
        assert client.generate("a cat", steps=1).images
        with pytest.raises(ServiceError) as caught:
            client.generate("a cat")
        assert (caught.value.status, caught.value.retryable) == (429, True)
        assert (caught.value.retry_after_s or 0) > 1
