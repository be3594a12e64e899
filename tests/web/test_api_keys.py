"""Who may come in: keys, wherever they are from, and the doors that are closed without them."""

import http.client
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import web.server
from core.errors import RequestError
from tests.helpers.serving import server
from web.api_keys import ApiKeys
from web.server import programs_closed

KEY, OTHER = "the-first-key", "the/second+key="
NONE = ApiKeys()


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the office\n\n key-in-a-file \n", encoding="utf-8")
    keys = ApiKeys.collect([KEY], str(file), {"Z_IMAGE_API_KEYS": f"{OTHER}, key-of-the-environment"})
    owners = {keys.owner(f"Bearer {key}") for key in (KEY, OTHER, "key-in-a-file", "key-of-the-environment")}
    assert len(owners) == 4
    assert None not in owners
    assert KEY not in str(vars(keys))
    assert [keys.owner(header) for header in ("", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x")] == [None] * 5
    assert keys.owner(f"bearer  {KEY}")
    assert not ApiKeys.collect(environ={})


@pytest.mark.parametrize("key", ["", "short", "with a space", "with,a,comma", "schlüssel-schlüssel", "x" * 201])
def test_what_is_no_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(RequestError, match=r"api_key: '\*\*\*' is not possible; allowed: keys of 8 to 200"):
        ApiKeys([key])


@pytest.mark.parametrize("text", [None, "# nothing else\n"])
def test_a_file_without_keys_is_refused(text: str | None, tmp_path: Path) -> None:
    if text:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(RequestError, match=r"api_keys: .*one key a line"):
        ApiKeys.collect(file=str(tmp_path / "keys"), environ={})


@pytest.mark.parametrize(
    ("host", "auth", "insecure", "keys", "closed"),
    [
        ("127.0.0.1", None, False, NONE, False),
        ("127.0.0.1", "ann:secret", False, NONE, True),  # a proxy may let others in, as the password says
        ("0.0.0.0", "ann:secret", False, NONE, True),
        ("0.0.0.0", "ann:secret", False, ApiKeys([KEY]), False),
        ("0.0.0.0", None, True, NONE, False),
    ],
)
def test_programs_are_let_in_where_the_page_is_open_or_they_have_keys(
    host: str, auth: str | None, insecure: bool, keys: ApiKeys, closed: bool
) -> None:
    assert programs_closed(host, auth, insecure, keys) is closed


def test_a_space_is_open_to_programs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    assert not programs_closed("0.0.0.0", None, False, NONE)


def test_with_keys_alone_the_page_lets_nobody_in() -> None:
    options = web.server.launch_options("0.0.0.0", 7860, None, False, (), ApiKeys([KEY]))
    assert options["auth"]("", "") is False
    assert "auth" not in web.server.launch_options("127.0.0.1", 7860, None, False, (), ApiKeys([KEY]))


def test_on_this_machine_a_header_with_a_key_is_ignored() -> None:
    assert httpx.get(f"{server().url}v1/models", headers={"Authorization": "Bearer anything"}).status_code == 200


def test_a_server_with_keys_asks_for_one_and_never_writes_it_down() -> None:
    served = server("--host", "0.0.0.0", "--api-key", KEY, "--api-key", OTHER, "--verbose")
    models = f"{served.url}v1/models"
    for key in (KEY, OTHER):
        assert httpx.get(models, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for headers in ({}, {"Authorization": "Bearer not-this-one"}, {"Authorization": KEY}):
        refused = httpx.get(models, headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
    # Nothing of a request without a key is read: this one announces a body that never comes.
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(served.url).port)
    connection.putrequest("POST", "/v1/images/generations")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()
    assert httpx.get(f"{served.url}config").status_code == 401  # the page's own
    assert httpx.post(f"{served.url}login", data={"username": "ann", "password": KEY}).status_code == 400
    log = served.log.read_text()
    assert log
    assert KEY not in log
    assert OTHER not in log


def test_a_page_of_another_site_may_not_ask() -> None:
    models = f"{server().url}v1/models"
    assert httpx.get(models, headers={"Origin": server().url.rstrip("/")}).status_code == 200
    for origin in ("https://example.com", "null", "http://[", f"{server().url.rstrip('/')}.example.com"):
        refused = httpx.get(models, headers={"Origin": origin})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "other_site")
