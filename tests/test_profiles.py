"""Settings: where they come from, and how a wrong one is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mtgdm.errors import SettingError
from mtgdm.profiles import PIPELINE, load_profile, profile_files, profile_schema, settings_for
from mtgdm.registry import discover
from mtgdm.shipped import shipped
from tests.conftest import CommandLine

REGISTRY = discover()
SHIPPED = sorted(path.stem for path in shipped("configs").glob("*.yaml"))


def test_the_promised_profiles_are_shipped() -> None:
    assert {"default", "quickstart", "ollama-32b", "vllm", "qwen2.5-3b", "qwen2.5-32b-qlora"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_whole(name: str) -> None:
    profile = load_profile(name, REGISTRY.sections)
    assert profile.description
    assert profile.pipeline == list(PIPELINE)
    for stage in REGISTRY.stages.values():
        settings_for(stage, profile, {}, environment={})


def test_shipped_profiles_are_found_from_any_folder(mtgdm: CommandLine) -> None:
    found = mtgdm("profiles", "--json").json
    assert set(SHIPPED) <= {one["profile"] for one in found}
    assert all(one["description"] and Path(one["path"]).is_absolute() for one in found)


def a_profile(folder: Path, text: str, name: str = "mine") -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{name}.yaml").write_text(text, encoding="utf-8")


def shown(mtgdm: CommandLine, key: str, env: dict[str, str] | None = None) -> tuple[object, str]:
    ran = mtgdm("config", "show", "prompts", "--profile", "mine", "--json", env=env)
    assert ran.code == 0, ran.err
    value = ran.json["prompts"][key]
    return value["value"], value["source"]


def test_a_value_comes_from_default_profile_environment_flag_in_this_order(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "extends: default\nprompts:\n  limit: 3\n")
    assert shown(mtgdm, "skip_bad") == (False, "default")
    value, source = shown(mtgdm, "limit")
    assert (value, Path(source).name) == (3, "mine.yaml:3")
    assert shown(mtgdm, "limit", {"MTGDM_PROMPTS_LIMIT": "4"}) == (4, "$MTGDM_PROMPTS_LIMIT")


def test_extending_merges_key_by_key_and_keeps_the_source(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "prompts:\n  limit: 3\n  seed: 5\n", name="lower")
    a_profile(mtgdm.folder, "extends: lower\nprompts:\n  limit: 9\n")
    assert shown(mtgdm, "limit")[0] == 9
    value, source = shown(mtgdm, "seed")
    assert (value, Path(source).name) == (5, "lower.yaml:3")


def test_a_profile_of_ones_own_may_extend_the_shipped_one_of_its_name(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "extends: quickstart\nprompts:\n  limit: 2\n", name="quickstart")
    ran = mtgdm("config", "show", "prompts", "--profile", "quickstart", "--json")
    assert ran.json["prompts"]["limit"]["value"] == 2
    assert ran.json["prompts"]["spots"]["value"] == "shipped:data/sample/spots.jsonl"


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("promts:\n  limit: 3\n", "mine.yaml:1", "'prompts'"),
        ("prompts:\n  limitt: 3\n", "mine.yaml:2", "'limit'"),
        ("prompts:\n  limit: many\n", "mine.yaml:2", "valid integer"),
        ("prompts:\n  limit: -1\n", "mine.yaml:2", "greater than or equal to 0"),
        ("prompts:\n  limit: 1\n  limit: 2\n", "mine.yaml:3", "stands twice"),
        ("prompts: 3\n", "mine.yaml:1", "mapping"),
        ("- 1\n", "mine.yaml:1", "mapping"),
        ("prompts:\n  limit: [1\n", "mine.yaml", "not YAML"),
        ("description: 2024-13-45\n", "mine.yaml:1", "not a plain value"),
        ("a: &x 1\nextends: nothing\n", "mine.yaml:2", "no profile 'nothing'"),
        ("extends: mine.yaml\n", "mine.yaml", "extends itself"),
        ("workspace: 3\n", "mine.yaml:1", "`workspace` is a text"),
        ("pipeline: prompts\n", "mine.yaml:1", "list of stage names"),
        ("domain: [tourism]\n", "mine.yaml:1", "`domain` is a text"),
        ("prompts:\n  limit: !!python/name:os.system\n", "mine.yaml:2", "could not determine a constructor"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named_with_its_line(
    mtgdm: CommandLine, text: str, place: str, said: str
) -> None:
    a_profile(mtgdm.folder, text)
    ran = mtgdm("config", "show", "--profile", "mine")
    assert ran.code == 2
    assert place in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_typo_in_another_stages_section_stops_every_command(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "train:\n  epocks: 6\n")
    ran = mtgdm("prompts", "--profile", "mine")
    assert (ran.code, "mine.yaml:2" in ran.err, "'epochs'" in ran.err) == (2, True, True)


def test_a_default_of_ones_own_may_extend_a_shipped_profile(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "extends: quickstart\nprompts:\n  limit: 2\n", name="default")
    ran = mtgdm("config", "show", "teacher", "--json")
    assert ran.json["teacher"]["backend"]["value"] == "offline", ran.err


def test_a_pipeline_with_an_unknown_stage_is_refused_before_anything_runs(mtgdm: CommandLine) -> None:
    a_profile(mtgdm.folder, "extends: quickstart\npipeline: [prompts, teachr]\n")
    ran = mtgdm("all", "--profile", "mine")
    assert (ran.code, "mine.yaml:2" in ran.err, "'teacher'" in ran.err) == (2, True, True)
    assert not (mtgdm.folder / "data").exists()


def test_a_typo_in_the_environment_is_refused(mtgdm: CommandLine) -> None:
    ran = mtgdm("config", "show", env={"MTGDM_PROMPTS_LIMITS": "3"})
    assert (ran.code, "MTGDM_PROMPTS_LIMIT'" in ran.err) == (2, True)


def test_a_wrong_value_in_the_environment_is_named(mtgdm: CommandLine) -> None:
    ran = mtgdm("config", "show", env={"MTGDM_PROMPTS_LIMIT": "many"})
    assert (ran.code, "$MTGDM_PROMPTS_LIMIT" in ran.err) == (2, True)


def test_an_unknown_profile_is_answered_with_the_nearest(mtgdm: CommandLine) -> None:
    ran = mtgdm("status", "--profile", "quickstrat")
    assert (ran.code, "'quickstart'" in ran.err) == (2, True)


def test_every_stage_stands_in_the_schema() -> None:
    schema = profile_schema(REGISTRY.stages.values())
    assert {stage.section for stage in REGISTRY.stages.values()} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    limit = schema["properties"]["prompts"]["anyOf"][0]["properties"]["limit"]
    assert (limit["type"], limit["description"]) == ("integer", "Only the first N spots; 0 takes all.")
    json.dumps(schema)


def test_the_profile_files_of_the_folder_come_before_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_profile(tmp_path, "description: mine\n", name="quickstart")
    monkeypatch.chdir(tmp_path)
    assert profile_files()["quickstart"] == Path("configs/quickstart.yaml")


def test_merge_keys_are_merged_and_their_values_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "prompts: &a\n  seed: 1\n  limit: 2\nteacher: &b\n  limit: 3\n  <<: [*a]\n"
        "train: {<<: [*b, *a], limit: 4}\neval:\n  <<: *b\n",
        encoding="utf-8",
    )
    sections = load_profile(str(path), {"prompts", "teacher", "train", "eval"}).sections
    values = {name: {key: one.value for key, one in found.items()} for name, found in sections.items()}
    assert values["teacher"] == {"seed": 1, "limit": 3}
    assert values["train"] == {"seed": 1, "limit": 4}
    assert values["eval"] == {"seed": 1, "limit": 3}
    assert sections["eval"]["seed"].source == f"{path}:2"
    assert sections["eval"]["limit"].source == f"{path}:5"


EXPANDING = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("train:\n  <<: 5\n", ":2", "`<<` takes an anchor"),
        ("train: &a\n  <<: *a\n", ":", "holds itself"),
        (EXPANDING, ":", "more than 10,000 values"),
        (f"description: {'[' * 200}{']' * 200}\n", ":1", "nested more than 50 deep"),
        (f"description: {'[' * 5000}{']' * 5000}\n", "", "nested too deeply"),
        ("train:\n  seed: !!bool x\n", ":2", "not a plain value"),
        ("train:\n  seed: !!timestamp x\n", ":2", "not a plain value"),
        ("train:\n  seed: 010\n", ":2", "010 would be read as an octal number"),
        ("train:\n  seed: 1:30\n", ":2", "base of 60"),
        ('workspace: "a\\0b"\n', ":1", "U+0000"),
        ('workspace: "\\uD800"\n', ":1", "U+D800"),
        ("workspace: ~nosuchuser/x\n", ":1", "no user of this machine"),
        ("extends: ~nosuchuser/x.yaml\n", ":1", "no user of this machine"),
    ],
)
def test_what_no_profile_should_hold_is_one_line(tmp_path: Path, text: str, place: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=re.escape(said)) as caught:
        load_profile(str(path), {"train"})
    assert str(caught.value.where).startswith(f"{path}{place}")
    assert len(str(caught.value)) < 400


def test_a_thousand_profiles_one_on_another_are_one_line(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"e{number}.yaml").write_text(f"extends: ./e{number + 1}.yaml\n", encoding="utf-8")
    with pytest.raises(SettingError, match="a chain of more than 30 profiles") as caught:
        load_profile(str(tmp_path / "e0.yaml"), set())
    assert len(str(caught.value)) < 400


def test_a_path_of_nobodys_home_is_one_line(mtgdm: CommandLine) -> None:
    ran = mtgdm("prompts", "--out", "~nosuchuser/x.jsonl")
    assert (ran.code, "no user of this machine" in ran.err) == (2, True), ran.err
