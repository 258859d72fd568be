"""Variables of the environment that no connection can be made with: named with their value, secrets left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtgdm import network
from mtgdm.errors import UserError


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SSL_CERT_FILE", "/none/ca.pem", "there is no such file"),
        ("REQUESTS_CA_BUNDLE", "/none/ca.pem", "there is no such file"),
        ("ALL_PROXY", "socks://127.0.0.1:7890", "no kind of proxy"),
        ("https_proxy", "ftp://127.0.0.1:21", "no kind of proxy"),
        ("HTTP_PROXY", "http://127.0.0.1:port", "no address"),
        ("HTTPS_PROXY", "http://", "names no host"),
        ("HF_ENDPOINT", "hf-mirror.example", "no address"),
        ("HF_ENDPOINT", "", "no address"),
        ("HF_ENDPOINT", "https:/hf-mirror.example", "no address"),
    ],
)
def test_a_variable_that_cannot_work_is_named_with_its_value(variable: str, value: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        network.check_hub({variable: value})
    assert caught.value.message.startswith(f"{variable} is '{value}'")
    assert said in caught.value.message
    assert variable in str(caught.value.hint)


def test_a_file_without_certificates_and_a_cache_below_a_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate", encoding="utf-8")
    with pytest.raises(UserError, match=r"SSL_CERT_FILE is .* no certificate can be read"):
        network.check({"SSL_CERT_FILE": str(file)})
    with pytest.raises(UserError, match=r"HF_HOME is .* nothing may be written"):
        network.check_hub({"HF_HOME": str(file / "cache")})


@pytest.mark.parametrize("token", ["hf_a b", "hf_\u4e2d", "hf_a\x07"])
def test_a_token_that_no_header_takes_is_named_and_not_shown(token: str) -> None:
    with pytest.raises(UserError) as caught:
        network.check_hub({"HF_TOKEN": token})
    assert caught.value.message.startswith("HF_TOKEN holds a character")
    assert token not in f"{caught.value} {caught.value.hint}"


def test_a_password_of_a_proxy_is_not_shown() -> None:
    with pytest.raises(UserError) as caught:
        network.check({"ALL_PROXY": "socks4://me:secret@127.0.0.1:1"})
    assert "secret" not in f"{caught.value} {caught.value.hint}"
    assert network.told({"HTTPS_PROXY": "http://me:secret@127.0.0.1:1"}) == "HTTPS_PROXY=http://127.0.0.1:1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTP_PROXY": "127.0.0.1:7890", "HTTPS_PROXY": "http://u:p@127.0.0.1:1", "NO_PROXY": "::1"},
        {"HF_ENDPOINT": "https://hf-mirror.example/", "HF_TOKEN": "hf_abc\n"},
        {"ALL_PROXY": "", "SSL_CERT_FILE": ""},
    ],
)
def test_what_can_work_is_let_through(environment: dict[str, str]) -> None:
    network.check_hub(environment)
    assert isinstance(network.told(environment), str)
