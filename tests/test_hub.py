"""To the Hub: what would go there, what goes, and one clear line for each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils._paths import filter_repo_objects

from mtgdm.errors import SettingError, UserError
from mtgdm.export import hub

LEFT = ["README.md", ".DS_Store", "merged/.DS_Store", "merged/myThumbs.db"]


class Api:
    """The Hub as far as a push needs it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def whoami(self) -> None:
        self._called("whoami")

    def create_repo(self, repo: str, **how: Any) -> None:
        self._called("create_repo", repo=repo, **how)

    def upload_folder(self, **how: Any) -> None:
        self._called("upload_folder", **how)

    def _called(self, name: str, **how: Any) -> None:
        self.calls.append((name, how))
        if self.error is not None:
            raise self.error


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "merged").mkdir()
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    (tmp_path / "merged/model.safetensors").write_bytes(b"0" * 1000)
    return tmp_path


def refusal(status: int, said: str) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://huggingface.co/api")
    return HfHubHTTPError(said, response=httpx2.Response(status, request=request), server_message=said)


def test_the_list_has_every_file_with_its_size(package: Path) -> None:
    assert hub.listing(package) == [("README.md", 4), ("merged/model.safetensors", 1000)]


def test_a_push_makes_the_repository_private_and_uploads_the_folder(package: Path) -> None:
    api = Api()
    assert (
        hub.push(package, "me/guide", private=True, message="m", api=api) == "https://huggingface.co/me/guide"
    )
    ignored = api.calls[1][1].pop("ignore_patterns")
    listed = [str(path) for path in filter_repo_objects(LEFT, ignore_patterns=ignored)]
    assert listed == ["README.md", "merged/myThumbs.db"]
    assert api.calls == [
        ("create_repo", {"repo": "me/guide", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/guide", "folder_path": package, "commit_message": "m"}),
    ]


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (refusal(403, "no"), "does not let this token write to me/guide: HTTP 403", "HF_TOKEN"),
        (refusal(413, "too large"), "does not take me/guide: too large", "run the same command again"),
        (OfflineModeIsEnabled("offline mode"), "cannot be reached: offline mode", "HF_HUB_OFFLINE"),
        (httpx2.ConnectError("no route"), "cannot be reached: no route", "proxy"),
    ],
)
def test_what_the_hub_refuses_is_one_line(package: Path, error: Exception, why: str, hint: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        hub.push(package, "me/guide", private=True, message="m", api=Api(error))
    assert hint in (caught.value.hint or "")
    with pytest.raises(UserError, match=why):
        hub.check_access("me/guide", Api(error))


@pytest.mark.parametrize("name", ["guide", "me/gui de", "me/guide/more", "me/-guide"])
def test_what_names_no_repository_is_refused(name: str) -> None:
    with pytest.raises(SettingError):
        hub.check_name(name)
