"""The file of keys and the rate of each: what is read, what is refused, what is never said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fewstep import main
from service.security.api_keys import (
    ApiKey,
    KeyFile,
    KeyFileError,
    digest_of,
    find_key,
    new_key,
    parse_keys,
)

DIGEST = digest_of("one")


def test_a_file_has_keys_comments_and_blank_lines() -> None:
    other = digest_of("other")
    found = parse_keys(f"# our keys\n\nann:{DIGEST}\n  ben:{other}:7.5:admin  \n")
    assert found == (ApiKey("ann", DIGEST), ApiKey("ben", other, 7.5, admin=True))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True), st.none() | st.floats(1, 1e5), st.booleans())
def test_a_key_comes_back_from_its_line(name: str, per_minute: float | None, admin: bool) -> None:
    [found] = parse_keys(ApiKey(name, DIGEST, per_minute, admin).line)
    assert (found.name, found.digest, found.admin) == (name, DIGEST, admin)
    assert found.per_minute == per_minute


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("secret", "SHA-256"),
        ("ann:secret", "SHA-256"),
        (f"ann:{DIGEST.upper()}", "SHA-256"),
        (f"a b:{DIGEST}", "name"),
        (f":{DIGEST}", "name"),
        (f"ann:{DIGEST}:secret", "a minute"),
        (f"ann:{DIGEST}:-1", "a minute"),
        (f"ann:{DIGEST}:nan", "a minute"),
        (f"ann:{DIGEST}:inf", "a minute"),
        (f"ann:{DIGEST}:", "a minute"),
        (f"ann:{DIGEST}:1:2", "PER_MINUTE"),
        (f"ann:{DIGEST}:admin:1", "PER_MINUTE"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(line: str, says: str) -> None:
    with pytest.raises(KeyFileError, match=says) as caught:
        parse_keys(f"# one\n{line}")
    assert "line 2" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert DIGEST not in str(caught.value)


@pytest.mark.parametrize("second", [f"ann:{digest_of('two')}", f"ben:{DIGEST}"])
def test_a_name_and_a_key_are_there_once(second: str) -> None:
    with pytest.raises(KeyFileError, match="line 2"):
        parse_keys(f"ann:{DIGEST}\n{second}")


def test_a_key_is_found_by_its_hash_alone() -> None:
    keys = [ApiKey(f"{index}", digest_of(f"key {index}")) for index in range(3)]
    assert [find_key(keys, f"key {index}") for index in range(3)] == keys
    for offer in ("", "key", "key 3", "KEY 1", keys[0].digest, "\udcff"):
        assert find_key(keys, offer) is None


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr("hmac.compare_digest", lambda kept, offered: bool(compared.append(kept)) or kept == offered)
    keys = [ApiKey(f"{index}", digest_of(f"key {index}")) for index in range(3)]
    assert find_key(keys, "key 0") == keys[0]
    assert compared == [key.digest for key in keys]


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"ann:{digest_of('one')}\n")
    keys = KeyFile(path)
    assert keys.find("one") is not None
    path.write_text(f"ann:{digest_of('two')}\n# changed\n")
    assert keys.find("one") is None
    assert keys.find("two") is not None
    # As a tool that replaces files does it: same size, same time, another file.
    times = path.stat()
    other = tmp_path / "other"
    other.write_text(f"ann:{digest_of('six')}\n# changed\n")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert keys.find("two") is None
    assert keys.find("six") is not None


@pytest.mark.parametrize("damage", ["gone", "half", "binary"])
def test_a_file_that_is_damaged_leaves_the_keys_and_one_line(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"ann:{DIGEST}\n")
    keys = KeyFile(path)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"ann:" if damage == "half" else b"\xff\xfe")
    for _ in range(3):
        assert keys.find("one") is not None
    assert [record.getMessage() for record in caplog.records] == ["the keys stay as they were"]
    path.write_text("")
    assert keys.find("one") is None


def test_a_file_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyFile(tmp_path / "none")


def test_the_command_prints_a_key_once_and_the_line_that_knows_it() -> None:
    result = CliRunner().invoke(main, ["keys", "new", "ann", "--per-minute", "60", "--admin"])
    assert result.exit_code == 0
    key = result.stderr.split()[-1]
    [found] = parse_keys(result.stdout)
    assert found == ApiKey("ann", digest_of(key), 60, admin=True)
    assert key not in result.stdout


def test_the_command_makes_the_line_of_a_key_that_is_there() -> None:
    key = new_key()
    result = CliRunner().invoke(main, ["keys", "hash", "ann"], input=f"{key}\n")
    assert parse_keys(result.stdout.splitlines()[-1]) == (ApiKey("ann", digest_of(key)),)
    assert key not in result.output


@pytest.mark.parametrize(
    ("arguments", "typed", "says"),
    [
        (["new", "a b"], "", "a name has letters"),
        (["new", "a:b"], "", "a name has letters"),
        (["new", "#ann"], "", "a name has letters"),
        (["hash", " ann"], "a key that nobody can guess\n", "a name has letters"),
        (["new", "ann", "--per-minute", "0"], "", "a minute"),
        (["hash", "ann"], "short\n", "20 characters"),
        (["hash", "ann"], "a key with \u00e9 that nobody guesses\n", "visible ASCII"),
    ],
)
def test_the_command_refuses_what_the_service_would(arguments: list[str], typed: str, says: str) -> None:
    result = CliRunner().invoke(main, ["keys", *arguments], input=typed)
    assert result.exit_code != 0
    assert says in result.output


def test_keys_are_long_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 40
