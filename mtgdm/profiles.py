"""Profiles and settings: default < profile (through `extends`) < environment < flag, each with its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mtgdm.errors import SettingError, nearest
from mtgdm.profile_yaml import compose, pairs, place, plain
from mtgdm.shipped import shipped
from mtgdm.stage import Flag, Runtime, Stage, StageConfig, expanded, key_of, marks

if TYPE_CHECKING:
    from mtgdm.manifest import SettingValue
# yaml and the manifest are imported where they are used: together a seventh of the time of `--help`.

PIPELINE = ("prompts", "teacher", "train", "report", "eval", "eval-report", "package")
"""The stages of `mtgdm all` where a profile names none."""

MAX_EXTENDS = 30
"""So long a chain of `extends` is no profile any more."""
_TOP_LEVEL = ("extends", "description", "domain", "workspace", "pipeline")


@dataclass(frozen=True)
class Sourced:
    """A value as it was written, and where: `default`, `ollama-32b.yaml:9`, `$MTGDM_TEACHER_URL`, `--url`."""

    value: Any
    source: str


@dataclass
class Profile:
    """A YAML file with everything it extends, merged key by key."""

    name: str
    path: Path | None
    description: str = ""
    top: dict[str, Sourced] = field(default_factory=dict)
    sections: dict[str, dict[str, Sourced]] = field(default_factory=dict)
    section_sources: dict[str, str] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        """The domain plugin's name."""
        return str(self.top["domain"].value) if "domain" in self.top else "tourism"

    @property
    def workspace(self) -> Path:
        """The folder that relative paths lie under, absolute."""
        value = self.top["workspace"].value if "workspace" in self.top else "."
        return expanded(Path(value)).absolute()

    @property
    def pipeline(self) -> list[str]:
        """The stages of `mtgdm all`, in order."""
        return list(self.top["pipeline"].value) if "pipeline" in self.top else list(PIPELINE)


@dataclass(frozen=True)
class Settings:
    """A stage's config with the source of every value."""

    config: StageConfig
    values: dict[str, SettingValue]

    def shaping(self) -> dict[str, Any]:
        """The values that change what the stage makes: the others are not looked at for staleness."""
        fields = type(self.config).model_fields
        runtime = {key_of(name, info) for name, info in fields.items() if marks(info, Runtime)}
        return {key: setting.value for key, setting in self.values.items() if key not in runtime}


# --- finding -------------------------------------------------------------------------------------


def profile_folders() -> list[Path]:
    """Where a profile is looked for by name: the workspace's own first, then the shipped ones."""
    return [Path("configs"), shipped("configs")]


def profile_files() -> dict[str, Path]:
    """Every profile that can be named, with its file."""
    found: dict[str, Path] = {}
    for folder in profile_folders():
        for path in sorted(folder.glob("*.y*ml")):
            found.setdefault(path.stem, path)
    return found


def find_profile(name: str, beside: Path | None = None) -> Path:
    """The file of a profile given by name or path; `beside` is the file whose `extends` names it."""
    if name.endswith((".yaml", ".yml")):
        path = expanded(Path(name))
        if beside is not None and not path.is_absolute():
            path = beside.parent / path
        if path.is_file():
            return path
        raise SettingError(
            f"there is no profile file {path}", hint="`mtgdm profiles` lists those that can be named"
        )
    if beside is not None and beside.parent == shipped("configs"):
        files = {path.stem: path for path in shipped("configs").glob("*.yaml")}
    else:
        files = profile_files()
    if beside is not None and beside.stem == name and beside.parent != shipped("configs"):
        # A profile of one's own may extend the shipped one of the same name.
        for ending in (".yaml", ".yml"):
            own = shipped("configs") / f"{name}{ending}"
            if own.is_file():
                return own
    if name in files:
        return files[name]
    if beside is not None:
        for ending in (".yaml", ".yml"):
            if (beside.parent / f"{name}{ending}").is_file():
                return beside.parent / f"{name}{ending}"
    raise SettingError(f"there is no profile '{name}'", hint=nearest(name, files))


# --- reading -------------------------------------------------------------------------------------


def load_profile(name: str, known_sections: Iterable[str]) -> Profile:
    """Read a profile with all it extends; SettingError with file:line for whatever is wrong."""
    return _load(find_profile(name), set(known_sections), ())


def describe(path: Path) -> str:
    """The `description` of one file, or why it cannot be read."""
    import yaml

    try:
        node = compose(path)
    except SettingError as error:
        return f"(cannot be read: {error.message})"
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "description" and isinstance(value, yaml.ScalarNode):
            return str(value.value).strip()
    return ""


def _load(path: Path, known: set[str], above: tuple[Path, ...]) -> Profile:
    if path.resolve() in above:
        raise SettingError("a profile extends itself", where=path)
    if len(above) > MAX_EXTENDS:
        raise SettingError(f"a chain of more than {MAX_EXTENDS} profiles", where=path)
    import yaml

    node = compose(path)
    profile = Profile(name=path.stem, path=path)
    if node is None:
        return profile
    if not isinstance(node, yaml.MappingNode):
        raise SettingError("a profile is a mapping of settings", where=place(path, node))
    found = pairs(path, node)
    if "extends" in found:
        base_node = found["extends"][1]
        base_name = plain(path, base_node)
        if not isinstance(base_name, str):
            raise SettingError("`extends` takes the name of one profile", where=place(path, base_node))
        try:
            base_path = find_profile(base_name, beside=path)
        except SettingError as error:
            raise SettingError(error.message, hint=error.hint, where=place(path, base_node)) from error
        base = _load(base_path, known, (*above, path.resolve()))
        profile.top, profile.sections = base.top, base.sections
        profile.section_sources = base.section_sources
        profile.top.pop("description", None)
    for key, (key_node, value_node) in found.items():
        if key in _TOP_LEVEL:
            profile.top[key] = Sourced(plain(path, value_node), place(path, key_node))
            continue
        section = key.replace("-", "_")
        if section not in known:
            raise SettingError(
                f"unknown key '{key}'",
                where=place(path, key_node),
                hint=nearest(section, {*known, *_TOP_LEVEL}),
            )
        profile.section_sources.setdefault(section, place(path, key_node))
        target = profile.sections.setdefault(section, {})
        if isinstance(value_node, yaml.ScalarNode) and plain(path, value_node) is None:
            continue
        if not isinstance(value_node, yaml.MappingNode):
            raise SettingError(f"the section '{key}' is a mapping of settings", where=place(path, value_node))
        for name, (name_node, setting_node) in pairs(path, value_node).items():
            target[name] = Sourced(plain(path, setting_node), place(path, name_node))
    _check_top(profile, path)
    return profile


def _check_top(profile: Profile, path: Path) -> None:
    for key in ("description", "domain", "workspace"):
        if key in profile.top and not isinstance(profile.top[key].value, str):
            raise SettingError(f"`{key}` is a text", where=profile.top[key].source)
    if "workspace" in profile.top:
        expanded(Path(profile.top["workspace"].value), where=profile.top["workspace"].source)
    if "pipeline" in profile.top:
        value = profile.top["pipeline"].value
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            raise SettingError("`pipeline` is a list of stage names", where=profile.top["pipeline"].source)
    profile.description = (
        str(profile.top["description"].value).strip() if "description" in profile.top else ""
    )


# --- merging -------------------------------------------------------------------------------------


def settings_for(
    stage: Stage[Any],
    profile: Profile,
    flags: Mapping[str, Sourced],
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings of one stage; SettingError with the source of the value that is wrong.

    `flags` holds what the command line gave, by key.
    """
    from mtgdm.manifest import SettingValue, without_password

    check_section(stage, profile)
    fields = keys_of(stage.config)
    chosen = {fields[key]: sourced for key, sourced in profile.sections.get(stage.section, {}).items()}
    chosen.update(_from_environment(stage, fields, environment))
    chosen.update(flags)
    config = _validate(stage, {key: sourced.value for key, sourced in chosen.items()}, chosen)
    values = config.model_dump(mode="json", by_alias=True)
    return Settings(
        config,
        {
            key: SettingValue(
                value=without_password(value), source=chosen[key].source if key in chosen else "default"
            )
            for key, value in values.items()
        },
    )


def check_section(stage: Stage[Any], profile: Profile) -> None:
    """SettingError for a key of the stage's section that is none of its settings."""
    fields = keys_of(stage.config)
    for key, sourced in profile.sections.get(stage.section, {}).items():
        if key not in fields:
            raise SettingError(
                f"unknown key '{key}' in the section '{stage.section}'",
                where=sourced.source,
                hint=nearest(key, {*fields.values()}),
            )


def keys_of(config: type[StageConfig]) -> dict[str, str]:
    """Every key a section may hold, with the key it stands for (itself, or the one it is another name of)."""
    keys: dict[str, str] = {}
    for name, info in config.model_fields.items():
        key = key_of(name, info)
        keys[key] = key
        for flag in marks(info, Flag):
            keys.update(dict.fromkeys(flag.also, key))
    return keys


def check_environment(stages: Iterable[Stage[Any]], environment: Mapping[str, str] = os.environ) -> None:
    """SettingError for a variable `MTGDM_<STAGE>_<KEY>` whose stage exists and whose key does not."""
    by_prefix = {f"MTGDM_{stage.section.upper()}_": stage for stage in stages}
    for variable in sorted(environment):
        prefixes = [prefix for prefix in by_prefix if variable.startswith(prefix)]
        if not prefixes:
            continue
        known = {f"{prefix}{key.upper()}" for prefix in prefixes for key in keys_of(by_prefix[prefix].config)}
        if variable not in known:
            raise SettingError(
                f"unknown setting in the environment: {variable}", hint=nearest(variable, known)
            )


def _from_environment(
    stage: Stage[Any], fields: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, Sourced]:
    found: dict[str, Sourced] = {}
    for key, target in fields.items():
        variable = f"MTGDM_{stage.section.upper()}_{key.upper()}"
        if variable in environment:
            found[target] = Sourced(environment[variable], f"${variable}")
    return found


def _validate(stage: Stage[Any], values: dict[str, Any], chosen: Mapping[str, Sourced]) -> StageConfig:
    validate: Callable[[dict[str, Any]], StageConfig] = stage.config.model_validate
    try:
        return validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        source = chosen[key].source if key in chosen else f"section '{stage.section}'"
        message = first["msg"].removeprefix("Value error, ")
        wrong = f"{stage.section}.{key} = {first['input']!r}: {message}" if key else message
        raise SettingError(
            wrong, where=source, hint=f"`mtgdm {stage.name} --help` lists the settings"
        ) from error


# --- schema --------------------------------------------------------------------------------------


def profile_schema(stages: Iterable[Stage[Any]]) -> dict[str, Any]:
    """The JSON Schema of a profile with a section for each of these stages."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "extends": {"type": "string", "description": "The profile this one starts from."},
        "description": {"type": "string", "description": "One line of what the profile is for."},
        "domain": {"type": "string", "description": "The domain plugin.", "default": "tourism"},
        "workspace": {
            "type": "string",
            "description": "The folder relative paths lie under.",
            "default": ".",
        },
        "pipeline": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The stages of `mtgdm all`, in order.",
            "default": list(PIPELINE),
        },
    }
    for stage in stages:
        schema = stage.config.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        schema["description"] = stage.help
        for name, text in stage.config.descriptions().items():
            schema["properties"][key_of(name, stage.config.model_fields[name])]["description"] = text
        for name, info in stage.config.model_fields.items():
            for flag in marks(info, Flag):
                own = schema["properties"][key_of(name, info)]
                schema["properties"].update(dict.fromkeys(flag.also, own))
        properties[stage.section] = {"anyOf": [schema, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mtgdm profile",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }
