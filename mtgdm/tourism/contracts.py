"""The answers a prompt asks for, as models: one declaration gives prompt text, schema and validation.

A field's docstring is the placeholder that `layout` writes into the prompt and the description in the
schema, so it is in Chinese and short.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UNKNOWN = "未知"


def _inside(limit: float) -> AfterValidator:
    # A validator instead of `ge`/`le`: not every server's grammar takes minimum and maximum.
    def check(value: float) -> float:
        if not -limit <= value <= limit:
            raise ValueError(f"{value} is not between -{limit:g} and {limit:g}")
        return value

    return AfterValidator(check)


# A bound is about three times the longest such text of real answers, so that none is lost and a model that
# loops inside a string soon comes to its end.
Name = Annotated[str, Field(max_length=100)] | None
Phrase = Annotated[str, Field(max_length=200)] | None
Text = Annotated[str, Field(max_length=600)] | None
Speech = Annotated[str, Field(max_length=1500)] | None
Texts = Annotated[list[Annotated[str, Field(max_length=400)]], Field(max_length=30)] | None
Latitude = Annotated[float, Field(allow_inf_nan=False), _inside(90)] | Literal["未知"] | None
Longitude = Annotated[float, Field(allow_inf_nan=False), _inside(180)] | Literal["未知"] | None


class Answer(BaseModel):
    """A JSON answer: every key is required, none may be added, no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Viewpoint(Answer):
    """A photo spot of a general introduction."""

    theme: Name
    """主题"""
    spot: Phrase
    """地点"""
    note: Text
    """说明"""


class Attraction(Answer):
    """A sight inside a spot, or the spot itself."""

    name: Name
    """名称"""
    type: Name
    """类型"""
    desc: Text
    """简介"""
    lat: Latitude
    """纬度"""
    lon: Longitude
    """经度"""


class Route(Answer):
    """A walk through a spot."""

    name: Name
    """路线名"""
    duration: Phrase
    """时长"""
    steps: Texts
    """步骤"""


class Geo(Answer):
    """Where a spot lies."""

    lat: Latitude
    """纬度"""
    lon: Longitude
    """经度"""
    hint: Phrase
    """位置"""


class General(Answer):
    """The introduction of a spot."""

    name: Name
    """名称"""
    province: Name
    """省份"""
    history: Texts
    """历史，带年份"""
    culture: Texts
    """文化"""
    logistics: Texts
    """交通"""
    tickets_hours: Texts
    """票价、开放时间"""
    photo_spots: Annotated[list[Viewpoint], Field(max_length=30)] | None
    """拍摄点"""
    attractions: Annotated[list[Attraction], Field(max_length=30)] | None
    """看点"""
    routes: Annotated[list[Route], Field(max_length=30)] | None
    """路线"""
    myths: Texts
    """传说"""
    geo: Geo | None
    """坐标"""


class Step(Answer):
    """One leg of an itinerary."""

    from_: Phrase = Field(alias="from")
    """起点"""
    to: Phrase
    """终点"""
    direction: Phrase
    """方向"""
    distance: Phrase
    """距离"""
    duration: Phrase
    """用时"""
    lat: Latitude
    """终点纬度"""
    lon: Longitude
    """终点经度"""
    notes: Text
    """怎么走"""


class PhotoStop(Answer):
    """A photo spot of an itinerary."""

    theme: Name
    """主题"""
    spot: Phrase
    """地点"""
    time: Phrase
    """时间"""


class Itinerary(Answer):
    """A visit, step by step."""

    name: Name
    """名称"""
    route_name: Phrase
    """路线名"""
    total_duration: Phrase
    """总时长"""
    steps: Annotated[list[Step], Field(max_length=30)] | None
    """步骤"""
    photo_spots: Annotated[list[PhotoStop], Field(max_length=30)] | None
    """拍摄点"""
    tips: Texts
    """建议"""
    guide_text: Speech
    """讲解词"""


def layout(model: type[BaseModel]) -> str:
    """The compact answer layout of a model: quoted placeholders for text, bare ones for numbers."""
    parts = [
        f'"{field.alias or name}":{_placeholder(field.annotation, field.description or "文本")}'
        for name, field in model.model_fields.items()
    ]
    return "{" + ",".join(parts) + "}"


def _placeholder(annotation: Any, words: str) -> str:
    if get_origin(annotation) is list:
        return f"[{_placeholder(get_args(annotation)[0], words)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return layout(annotation)
    if get_origin(annotation) is Annotated:
        return _placeholder(get_args(annotation)[0], words)
    if annotation is float:
        return words
    if annotation is str:
        return f'"{words}"'
    if isinstance(annotation, type(str | None)) or get_origin(annotation) is Union:
        return _placeholder(get_args(annotation)[0], words)
    raise TypeError(f"no layout for {annotation!r}")
