"""What the environment says of the network, checked before the first connection: libraries fail on it in riddles."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from mtgdm.errors import UserError
from mtgdm.manifest import without_password

_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SOCKS = ("socks5", "socks5h")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ENDPOINT = "HF_ENDPOINT"


def check(environment: Mapping[str, str] = os.environ) -> None:
    """UserError that names a variable for certificates or proxies which no connection can be made with."""
    for name in _CERTIFICATES:
        if value := environment.get(name):
            _check_certificates(name, value)
    for name in _PROXIES:
        for written in (name.lower(), name):
            if value := environment.get(written):
                _check_proxy(written, value)


def check_hub(environment: Mapping[str, str] = os.environ) -> None:
    """The same before the Hugging Face Hub is asked: its address, its token and its cache too."""
    check(environment)
    if (address := environment.get(_ENDPOINT)) is not None and not _is_address(address):
        raise UserError(
            f"{_ENDPOINT} is '{without_password(address)}', which is no address",
            hint=f"{_ENDPOINT}=https://{address.rpartition('://')[2] or 'huggingface.co'}, or unset it",
        )
    for name in _TOKENS:
        token = environment.get(name, "").strip()
        if not token.isascii() or any(letter.isspace() or not letter.isprintable() for letter in token):
            raise UserError(
                f"{name} holds a character that no token has (its value is not shown)",
                hint="copy the token anew from https://huggingface.co/settings/tokens",
            )
    _check_cache(environment)


def told(environment: Mapping[str, str] = os.environ) -> str:
    """The variables that lead connections elsewhere, for the hint of an error; empty where none is set."""
    names = [_ENDPOINT, *(written for name in _PROXIES for written in (name.lower(), name))]
    found = [f"{name}={without_password(environment[name])}" for name in names if environment.get(name)]
    found += [f"{name} (not shown)" for name in _TOKENS if environment.get(name)]
    return ", ".join(found)


def token_variable(environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable that holds a token for the Hub."""
    return next((name for name in _TOKENS if environment.get(name)), None)


def _check_certificates(name: str, value: str) -> None:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(
            f"{name} is '{value}', and there is no such file",
            hint=f"name the file of the certificates, or unset {name}",
        )
    if path.is_dir():
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"{name} is '{value}', from which no certificate can be read: {error}",
            hint=f"name a file of certificates in PEM, or unset {name}",
        ) from error


def _check_proxy(name: str, value: str) -> None:
    shown = without_password(value)
    unset = f"{name}=http://HOST:PORT, or unset it"
    # Without a scheme it is taken for one of HTTP.
    address = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{name} is '{shown}', which is no address: {error}", hint=unset) from error
    scheme = parts.scheme.lower()
    if scheme in _SOCKS and find_spec("socksio") is None:
        raise UserError(
            f"{name} is '{shown}', and SOCKS needs a package", hint=f"pip install socksio, or {unset}"
        )
    if scheme not in ("http", "https", *_SOCKS):
        socks = f"pip install socksio and {name}=socks5://{shown.partition('://')[2]}, or {unset}"
        known = socks if scheme.startswith("socks") else unset
        raise UserError(f"{name} is '{shown}', and '{scheme}' is no kind of proxy that is known", hint=known)
    if not host:
        raise UserError(f"{name} is '{shown}', which names no host", hint=unset)


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _check_cache(environment: Mapping[str, str]) -> None:
    """UserError where a folder that was named for models cannot be written."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        if not (value := environment.get(name)):
            continue
        folder = Path(os.path.expandvars(value)).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            may = os.access(folder, os.W_OK)
        except OSError:
            may = False
        if not may:
            raise UserError(
                f"{name} is '{value}', where nothing may be written",
                hint=f"name a folder of your own, or unset {name}",
            )
        return
