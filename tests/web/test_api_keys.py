"""Who may come in: keys, wherever they are from."""

from pathlib import Path

import pytest

from core.errors import RequestError
from web.api_keys import ApiKeys

KEY, OTHER = "the-first-key", "the/second+key="


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
