"""Make the tiny base: a warm-up on random records that teaches a new model to find and to copy.

The corpus is drawn at random: records of random labels and values, and tasks that ask for them back as JSON, as
lists or inside sentences. It holds no contract of a domain, no teacher's answer and no real record.

    python -m mtgdm.student.warmup --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, Qwen2ForCausalLM

from mtgdm.student import tiny

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "未知"

# The words that hold Chinese sentences together: without them every pair of characters would be unique, and
# finding one's place in a text would be easier than it is.
_FREQUENT = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多"
    "定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还"
    "因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反明看原又么利比或但质气第向道命此变条只没结"
    "建月公无系情者最立代已通并提直题程展五果料位入常文总次品式活设及管特件长求老基资边流路级少图山统接知较将组见"
    "站区县市省城镇村河湖海江北南东西"
)
_UNITS = (
    "年",
    "月",
    "日",
    "米",
    "公里",
    "元",
    "座",
    "处",
    "号",
    "时",
    "分",
    "人",
    "平方公里",
    "级",
    "A",
    "世纪",
    "%",
)
_SYMBOLS = string.punctuation + "‘’〈〉「」『』…－～％℃°′″×→　•éüā①²√"
_PAIRS = {
    "标题": "title", "作者": "author", "价格": "price", "颜色": "color", "尺寸": "size", "重量": "weight",
    "高度": "height", "宽度": "width", "长度": "length", "主人": "owner", "厂家": "maker", "品牌": "brand",
    "型号": "model", "代码": "code", "编号": "number", "日期": "date", "开头": "start", "结尾": "end",
    "地点": "place", "地址": "address", "电话": "phone", "邮箱": "email", "页码": "page", "级别": "level",
    "排名": "rank", "分数": "score", "件数": "count", "单位": "unit", "成本": "cost", "税额": "tax",
    "速度": "speed", "功率": "power", "状态": "status", "标签": "label", "分组": "group", "零件": "part",
    "条目": "item", "数值": "value", "摘要": "summary", "正文": "body", "内容": "content", "来源": "source",
    "结果": "result", "原因": "reason", "效果": "effect", "方法": "method", "工具": "tool", "材料": "material",
    "用途": "use", "角色": "role", "队伍": "team", "组长": "leader", "成员": "member", "学校": "school",
    "班级": "class", "科目": "subject", "老师": "teacher", "学生": "student", "书名": "book", "章节": "chapter",
    "故事": "story", "歌曲": "song", "电影": "film", "演员": "actor", "食物": "food", "饮料": "drink",
    "味道": "taste", "菜单": "menu", "动物": "animal", "植物": "plant", "栖息地": "habitat", "天气": "weather",
    "风力": "wind", "雨量": "rain", "气温": "temperature", "面积": "area", "深度": "depth", "体积": "volume",
    "年龄": "age", "生日": "birth", "职业": "job", "技能": "skill", "爱好": "hobby", "语言": "language",
}  # fmt: skip
"""Field words and their English: a key need not be spelled like the label it asks for."""

_GLOSSARY = {
    "北京": "Beijing", "天津": "Tianjin", "河北": "Hebei", "山西": "Shanxi", "内蒙古": "Inner Mongolia",
    "辽宁": "Liaoning", "吉林": "Jilin", "黑龙江": "Heilongjiang", "上海": "Shanghai", "江苏": "Jiangsu",
    "浙江": "Zhejiang", "安徽": "Anhui", "福建": "Fujian", "江西": "Jiangxi", "山东": "Shandong",
    "河南": "Henan", "湖北": "Hubei", "湖南": "Hunan", "广东": "Guangdong", "广西": "Guangxi",
    "海南": "Hainan", "重庆": "Chongqing", "四川": "Sichuan", "贵州": "Guizhou", "云南": "Yunnan",
    "西藏": "Tibet", "陕西": "Shaanxi", "甘肃": "Gansu", "青海": "Qinghai", "宁夏": "Ningxia",
    "新疆": "Xinjiang", "香港": "Hong Kong", "澳门": "Macao", "台湾": "Taiwan",
    "春季": "spring", "夏季": "summer", "秋季": "autumn", "冬季": "winter", "全年": "all year",
    "山岳": "mountain", "湖泊": "lake", "峡谷": "gorge", "古城": "old city", "博物馆": "museum",
    "陵墓": "mausoleum", "喀斯特": "karst", "古建筑": "historic architecture", "海岛": "island",
    "雪山": "snow mountain", "湿地": "wetland", "长城": "Great Wall", "石窟": "grottoes", "园林": "garden",
    "古镇": "old town", "道教": "Taoism", "瀑布": "waterfall", "沙漠": "desert", "溶洞": "karst cave",
    "火山": "volcano", "古村落": "old village", "海滨": "seaside", "森林": "forest", "草原": "grassland",
    "地铁": "metro", "高铁": "high-speed rail", "火车": "train", "公交": "bus", "机场": "air",
    "码头": "boat", "索道": "cable car", "自驾": "road", "城市公园": "city park", "民族文化": "ethnic culture",
    "寺庙": "temple", "温泉": "hot spring", "运河": "canal", "古塔": "old pagoda", "河流": "river",
    "宫殿": "palace", "遗址": "ruins", "主题公园": "theme park", "地质公园": "geopark",
}  # fmt: skip
"""General words and their English."""

_SUFFIX = ("省", "市", "自治区")


class Writer:
    """Random text of one document: its characters, its words, and a name that other texts share pieces of."""

    def __init__(
        self, rng: random.Random, common: list[str], ascii_tokens: list[str], entangled: int
    ) -> None:
        self.entangled = entangled
        self.numbers: list[str] = []
        self.phrases: list[str] = []
        self.rng, self.common, self.ascii_tokens = rng, common, ascii_tokens
        self.pool = rng.choices(common, k=rng.choice((40, 120, 400)))
        self.frequent = rng.choice((0.1, 0.3, 0.5))
        self.rare = rng.choice((0.0, 0.0, 0.02, 0.02, 0.1))
        self.words = [self.han(rng.randint(2, 3)) for _ in range(rng.randint(4, 10))]
        self.name = self.title()
        self.shared = rng.choice((0.0, 0.25, 0.5))
        if entangled:
            self.shared = rng.choice((0.3, 0.6, 0.9))
            self.numbers = [self.digits() for _ in range(3)]
            self.numbers += [number[:-1] + rng.choice(string.digits) for number in self.numbers]
            self.phrases = [self._phrase() for _ in range(rng.randint(3, 8))]
        if entangled > 1:
            self.phrases += [self._fork(rng.choice(self.phrases)) for _ in range(3)]
            stem = self.clause()
            self.phrases += [self._fork(stem) for _ in range(rng.randint(1, 3))]

    def _phrase(self) -> str:
        form = self.rng.random()
        if form < 0.3:
            return self.rng.choice(self.numbers) + self.rng.choice(_UNITS) + self.han(self.rng.randint(0, 3))
        if form < 0.6:
            return self.fragment() + self.han(self.rng.randint(1, 2))
        return self.han(self.rng.randint(2, 8))

    def _fork(self, text: str) -> str:
        """A text that begins like another one and goes on otherwise."""
        return text[: self.rng.randint(1, len(text))] + self.han(self.rng.randint(1, 4))

    def han(self, length: int) -> str:
        """Characters, some of them rare, some of them so frequent that they say nothing of the place."""
        return "".join([self._character() for _ in range(length)])

    def _character(self) -> str:
        dice = self.rng.random()
        if dice < self.rare:
            # One in twelve from extension A: three tokens each, and the bytes that nothing else has.
            return chr(
                self.rng.randrange(*((0x4E00, 0x9FA6) if self.rng.random() < 0.92 else (0x3400, 0x4DB6)))
            )
        if dice < self.rare + self.frequent:
            return self.rng.choice(_FREQUENT)
        return self.rng.choice(self.pool)

    def title(self) -> str:
        """A name: a few characters, sometimes two parts or a bracket."""
        rng = self.rng
        name = self.han(rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 8))) + rng.choice(("", rng.choice(self.words)))
        form = rng.random()
        if form < 0.12:
            return f"{name}{rng.choice('-·—')}{self.han(rng.randint(2, 5))}"
        if form < 0.22:
            return f"{name}（{self.han(rng.randint(2, 5))}）"
        return name

    def fragment(self) -> str:
        """A piece of the name, from one of its ends."""
        cut = self.rng.randint(1, len(self.name))
        return self.name[:cut] if self.rng.random() < 0.7 else self.name[-cut:]

    def digits(self) -> str:
        """A number: a year, a count, a time, a decimal."""
        rng = self.rng
        if self.numbers and rng.random() < 0.6:
            return rng.choice(self.numbers)
        form = rng.random()
        if form < 0.4:
            return str(rng.randint(200, 2029))
        if form < 0.6:
            return str(rng.randint(0, 99))
        if form < 0.8:
            return self.decimal()
        if form < 0.9:
            return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
        return str(rng.randint(1000, 10**7))

    def decimal(self) -> str:
        """A number with a fraction, of the size of coordinates at most."""
        return str(round(self.rng.uniform(0, self.rng.choice((10, 55, 140))), self.rng.randint(1, 4)))

    def english(self) -> str:
        """A few words with capitals; parts of words make up names that no list holds."""
        rng = self.rng
        words = []
        for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5))):
            form = rng.random()
            if form < 0.45:
                word = "".join(rng.choices(self.ascii_tokens, k=rng.randint(1, 3)))
            elif form < 0.5:
                word = "".join(rng.choices(string.ascii_letters, k=rng.randint(1, 6)))
            else:
                word = rng.choice(tiny.ENGLISH_WORDS)
            words.append(word if rng.random() < 0.3 else word[:1].upper() + word[1:])
        if len(words) > 2 and rng.random() < 0.2:
            words[-1] = f"({words[-1]})"
        return rng.choice((" ", " ", " ", " ", " ", "-", ", ", "'s ", " & ")).join(words)

    def clause(self) -> str:
        """Characters with numbers, quotations, lists and pieces of the name between them."""
        rng = self.rng
        parts = []
        if rng.random() < self.shared:
            parts.append(self.fragment())
        parts.append(self.han(rng.randint(2, 9)))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            if self.phrases and rng.random() < 0.4:
                parts.append(rng.choice(self.phrases))
            form = rng.random()
            if form < 0.3:
                parts.append(self.digits() + rng.choice(_UNITS))
            elif form < 0.38:
                parts.append(f"（{self.digits()}{rng.choice(_UNITS)}）")
            elif form < 0.5:
                parts.append(f"“{self.han(rng.randint(2, 7))}”")
            elif form < 0.56:
                parts.append(f"《{self.han(rng.randint(2, 5))}》")
            elif form < 0.66:
                parts.append("、".join(self.han(rng.randint(1, 4)) for _ in range(rng.randint(2, 4))))
            elif form < 0.71:
                parts.append(self.english())
            elif form < 0.73:
                parts.append("".join(rng.choices(_SYMBOLS, k=rng.randint(1, 4))))
            elif form < 0.85:
                parts.append(rng.choice(self.words))
            else:
                parts.append(self.fragment() if rng.random() < self.shared else rng.choice(self.words))
            parts.append(self.han(rng.randint(1, 6)))
        return "".join(parts)

    def sentence(self) -> str:
        """One to three clauses and an end mark."""
        clauses = [self.clause() for _ in range(self.rng.choice((1, 2, 2, 3)))]
        return self.rng.choice("，，，，；：").join(clauses) + self.rng.choice("。。。。。。。。！？")

    def value(self) -> tuple[str, str]:
        """The kind of a value and its text."""
        rng = self.rng
        if self.entangled > 1 and rng.random() < 0.12:
            place = rng.choice(list(_GLOSSARY)[:34]) + rng.choice(_SUFFIX)
            return rng.choice((("word", self.english()), ("word", self.english()), ("glossary", place)))
        form = rng.random()
        if form < 0.4:
            return "text", "".join(self.sentence() for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
        if form < 0.48:
            own = self.fragment() if rng.random() < self.shared * 1.5 else ""
            if self.phrases and rng.random() < 0.4:
                own = rng.choice((self.name, *self.phrases))
            return "word", own + self.han(rng.randint(1 - bool(own), 6)) or own
        if form < 0.55:
            return "word", self.title()
        if form < 0.62:
            return "words", "、".join(self.han(rng.randint(2, 4)) for _ in range(rng.randint(1, 4)))
        if form < 0.70:
            return "pair", f"{self.decimal()},{self.decimal()}"
        if form < 0.76:
            return "word", self.digits() + rng.choice((*_UNITS, ""))
        if form < 0.85:
            return "word", self.english()
        if form < 0.88:
            return "word", rng.choice("是否有无")
        if form < 0.92:
            return "glossary", "、".join(rng.sample(list(_GLOSSARY), rng.choice((1, 1, 2, 2, 3))))
        if form < 0.96:
            place = rng.choice(list(_GLOSSARY)[:34])
            return "glossary", place + rng.choice(_SUFFIX)
        return "text", self.clause()


@dataclass
class Field:
    """One line of a random record: its label, the key that asks for it, its text."""

    label: str
    key: str
    kind: str
    text: str


@dataclass
class Document:
    """One conversation: a system text or none, and turns of question and answer."""

    system: str | None
    turns: list[tuple[str, str]] = field(default_factory=list)


def document(
    rng: random.Random, common: list[str], ascii_tokens: list[str], longest: int, entangled: int = 0
) -> Document:
    """A random record and the tasks on it, of about `longest` characters at most.

    `entangled` records repeat pieces, so whoever copies one has to remember where it began: 1 repeats words and
    numbers, 2 has longer texts too that begin alike, and more texts that join Chinese and English.
    """
    write = Writer(rng, common, ascii_tokens, entangled)
    fields = _record(write, rng.randint(2, 14), longest * 0.5)
    system = None
    if rng.random() < 0.75:
        system = "".join(write.sentence() for _ in range(rng.choice((1, 1, 2))))[: longest // 4]
    shown = _shown(rng, fields)
    result = Document(system)
    length = len(shown) + len(system or "")
    for turn in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        task, answer = _task(write, fields)
        if turn == 0:
            head = rng.choice(("资料：\n", "资料：\n", "", "记录：\n", "Data:\n", f"{write.han(2)}：\n"))
            question = f"{task}\n{head}{shown}" if rng.random() < 0.15 else f"{head}{shown}\n{task}"
        else:
            question = task
        length += len(task) + len(answer)
        if turn and length > longest:
            break
        result.turns.append((question, answer))
    return result


def _record(write: Writer, count: int, longest: float) -> list[Field]:
    rng = write.rng
    named = rng.random() < 0.8
    fields: list[Field] = []
    taken: set[str] = set()
    total = 0
    for number in range(count):
        label, key = _label(write)
        kind, text = ("word", write.name) if named and number == 0 else write.value()
        if label in taken or key in taken or (number and total + len(text) > longest):
            continue
        total += len(text) + len(label) + 2
        taken |= {label, key}
        fields.append(Field(label, key, kind, text))
    return fields


def _label(write: Writer) -> tuple[str, str]:
    rng = write.rng
    form = rng.random()
    if form < 0.4:
        label, key = rng.choice(list(_PAIRS.items()))
        return label, key if rng.random() < 0.75 else label
    if form < 0.7:
        label = write.han(rng.randint(2, 4))
    elif form < 0.78:
        label = f"{rng.choice(write.words)} {write.han(2)}"
    else:
        label = rng.choice(tiny.FIELD_WORDS)
        if rng.random() < 0.3:
            label += "_" + rng.choice(tiny.FIELD_WORDS)
    return label, label


def _shown(rng: random.Random, fields: list[Field]) -> str:
    form = rng.random()
    if form < 0.06:
        return _compact({item.label: item.text for item in fields})
    mark = rng.choice(("：", "：", "：", "：", "：", "：", ": ", "=", "｜"))
    left, right = rng.choice((("", ""), ("", ""), ("", ""), ("- ", ""), ("【", "】"), ("<", ">")))
    return rng.choice(("\n", "\n", "\n", "\n", "\n\n", "；\n")).join(
        f"{left}{item.label}{right}{mark}{item.text}" for item in fields
    )


def _task(write: Writer, fields: list[Field]) -> tuple[str, str]:
    if write.entangled > 1 and write.rng.random() < 0.25:
        return _prose_task(write, fields)
    form = write.rng.random()
    if form < 0.62:
        return _json_task(write, fields)
    if form < 0.82:
        return _prose_task(write, fields)
    if form < 0.92:
        return _copy_task(write, fields)
    return _glossary_task(write, fields)


def _json_task(write: Writer, fields: list[Field]) -> tuple[str, str]:
    rng = write.rng
    notes, value = _object(write, fields, depth=0, size=rng.choice((2, 4, 6, 8, 10, 14)))
    skeleton = rng.random() < 0.12
    layout = _compact(_emptied(value)) if skeleton else notes
    opening = rng.choice(
        ("任务：输出JSON。", "写JSON，键：", "JSON ", "只输出JSON：", "输出：", f"{write.han(4)}，JSON：")
    )
    opening += rng.choice(("", "", "\n"))
    return f"{opening}{layout}", _compact(value)


def _object(write: Writer, fields: list[Field], depth: int, size: int) -> tuple[str, dict[str, Any]]:
    """The notation of an object, `a,b[],c{d,e},f[{g}],h=label`, and its value."""
    rng = write.rng
    notes: list[str] = []
    value: dict[str, Any] = {}
    chosen = rng.sample(fields, min(size, len(fields)))
    if rng.random() < 0.4:
        chosen.sort(key=fields.index)
    if chosen[0] is not fields[0] and rng.random() < 0.4:
        chosen.insert(0, fields[0])
    for item in chosen:
        form = rng.random()
        if form < 0.16 and depth == 0:
            key = _new_key(write, value)
            inner, part = _object(write, fields, depth + 1, rng.randint(1, 4))
            if rng.random() < 0.35:
                notes.append(f"{key}{{{inner}}}")
                value[key] = part
            else:
                parts = [part]
                if rng.random() < 0.3:
                    more, second = _object(write, fields, depth + 1, rng.randint(1, 3))
                    parts.append(second)
                    inner += "},{" + more
                notes.append(f"{key}[{{{inner}}}]")
                value[key] = parts
            continue
        if form < 0.34:
            key = _new_key(write, value)
            note, empty = rng.choice((("", UNKNOWN), ("", UNKNOWN), ("[]", []), ("[]", []), ("#", None)))
            if not any(item.key == key or item.label == key for item in fields):
                notes.append(key + note)
                value[key] = empty
            continue
        key, note, leaf = _leaf(write, item)
        if key not in value:
            notes.append(note)
            value[key] = leaf
            if item.kind == "pair" and rng.random() < 0.7:
                other = _new_key(write, value)
                if other not in value:
                    notes.append(f"{other}=2{item.label}")
                    value[other] = _number(item.text.split(",")[1])
    return ",".join(notes), value


def _new_key(write: Writer, taken: dict[str, Any]) -> str:
    key = _label(write)[1]
    return key if key not in taken else key + "_" + write.rng.choice(tiny.FIELD_WORDS)


def _leaf(write: Writer, item: Field) -> tuple[str, str, Any]:
    rng = write.rng
    renamed = rng.random() < 0.25
    key = _new_key(write, {}) if renamed else item.key
    mark = f"={item.label}" if renamed else ""
    form = rng.random()
    if item.kind == "pair" and form < 0.8:
        return key, f"{key}#{mark}", _number(item.text.split(",")[0])
    if item.kind in {"words", "glossary"} and form < 0.4:
        return key, f"{key}[]{mark}", item.text.split("、")
    if item.kind == "text" and form < 0.6:
        return key, f"{key}[]{mark}", _sentences(item.text)
    if item.kind == "text" and form < 0.75:
        return key, f"{key}^{mark}", _sentences(item.text)[0]
    if form < 0.15:
        return key, f"{key}[]{mark}", [item.text]
    if form < 0.25:
        return key, f"{key}+{mark}", f"{item.label}：{item.text}"
    return key, f"{key}{mark}", item.text


def _number(text: str) -> float:
    return float(text)


def _sentences(text: str) -> list[str]:
    found: list[str] = []
    start = 0
    for place, character in enumerate(text):
        if character in "。！？":
            found.append(text[start : place + 1])
            start = place + 1
    return [*found, text[start:]] if start < len(text) else found


def _emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _emptied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_emptied(value[0])] if value and isinstance(value[0], dict) else []
    return 0 if isinstance(value, float) else "" if isinstance(value, str) else None


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _prose_task(write: Writer, fields: list[Field]) -> tuple[str, str]:
    """A text with places to fill: `<label>` for a value, `<label@en>` for its English."""
    rng = write.rng
    chosen = rng.sample(fields, min(rng.randint(2, 9), len(fields)))
    asked, told = [], []
    english = rng.random() < 0.35
    for item in chosen:
        if english:
            joint = " ".join(rng.choices(tiny.ENGLISH_WORDS, k=rng.randint(1, 4))) + rng.choice(
                (" ", ": ", " is ", " (")
            )
        else:
            joint = write.han(rng.randint(1, 6)) + rng.choice(("", "", "：", "，"))
        end = (
            rng.choice((". ", ", ", "; ", "\n", "). "))
            if english
            else rng.choice(("，", "。", "；", "\n", ""))
        )
        if write.entangled > 1 and rng.random() < 0.4:
            joint = ""
            end = rng.choice((end, "\n", "。\n"))
        text, slot = item.text, item.label
        translated = _english_of(item)
        if translated and english and rng.random() < 0.9:
            text, slot = translated, slot + "@en"
        elif item.kind == "pair" and rng.random() < 0.5:
            text, slot = text.replace(",", ", "), slot + "@,"
        asked.append(f"{joint}<{slot}>{end}")
        told.append(f"{joint}{text}{end}")
    opening = rng.choice(("填写：", "写：\n", "任务：写一段：", f"{write.han(3)}：", "Fill in:\n"))
    return opening + "".join(asked).strip(), "".join(told).strip()


def _english_of(item: Field) -> str | None:
    if item.kind != "glossary":
        return None
    words = [_GLOSSARY.get(word.removesuffix("自治区").rstrip("省市")) for word in item.text.split("、")]
    return _listed([word for word in words if word]) if all(words) else None


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _copy_task(write: Writer, fields: list[Field]) -> tuple[str, str]:
    rng = write.rng
    form = rng.random()
    if form < 0.2:
        item = rng.choice(fields)
        return f"{rng.choice(('抄写', '复述', '照抄'))}：{item.label}", item.text
    chosen = rng.sample(fields, min(rng.randint(2, 12), len(fields)))
    names = "、".join(item.label for item in chosen)
    if form < 0.7:
        return f"列出：{names}", "\n".join(f"{item.label}：{item.text}" for item in chosen)
    return f"连写：{names}", "".join(item.text for item in chosen)


def _glossary_task(write: Writer, fields: list[Field]) -> tuple[str, str]:
    rng = write.rng
    words = rng.sample(list(_GLOSSARY), rng.randint(1, 4))
    return f"{rng.choice(('英译', '译成英文', 'English'))}：{'、'.join(words)}", _listed(
        [_GLOSSARY[word] for word in words]
    )


class Corpus:
    """The endless stream of documents as tokens, from one seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int, entangled: int = 0) -> None:
        self.tokenizer, self.rng, self.entangled = tokenizer, random.Random(seed), entangled
        self.common = tiny.common_characters()
        self.ascii_tokens = sorted(
            token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and len(token) > 1
        )

    def rows(self, longest: Callable[[], int]) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens and labels, -100 where nothing is learnt."""
        while True:
            limit = longest()
            size = self.rng.randint(limit // 4, limit)
            conversation = document(self.rng, self.common, self.ascii_tokens, size, self.entangled)
            tokens, labels = self.encode(conversation)
            if len(tokens) <= limit * 1.2:
                yield tokens, labels

    def encode(self, conversation: Document) -> tuple[list[int], list[int]]:
        """As the chat template renders it; the answer and its end mark are learnt."""
        tokens: list[int] = []
        labels: list[int] = []
        before = (
            f"{tiny.TURN_START}system\n{conversation.system}{tiny.TURN_END}\n" if conversation.system else ""
        )
        for question, answer in conversation.turns:
            asked = f"{before}{tiny.TURN_START}user\n{question}{tiny.TURN_END}\n{tiny.TURN_START}assistant\n"
            for text, learnt in ((asked, False), (answer + tiny.TURN_END, True)):
                ids = self.tokenizer.encode(text).ids
                tokens += ids
                labels += ids if learnt else [-100] * len(ids)
            before = "\n"
        return tokens, labels


def batches(
    corpus: Corpus, positions: int, longest: Callable[[], int]
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Rows of like length together, `positions` with their padding at most."""
    rows = corpus.rows(longest)
    while True:
        drawn = sorted((next(rows) for _ in range(160)), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in drawn:
            if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > positions:
                groups.append([])
            groups[-1].append(row)
        corpus.rng.shuffle(groups)
        for group in groups:
            yield [tokens for tokens, _ in group], [labels for _, labels in group]


def start_copying(model: Qwen2ForCausalLM, seed: int = 0) -> None:
    """Set the weights of a circuit that copies: it is built by hand, and the training starts from it.

    The three heads of layer 0 look 1, 2 and 3 tokens back and store a code of what they see. The heads of
    layer 1 look where the tokens before fit the last three tokens here, and fetch the token that stands there.
    """
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads
    half = size // 2
    generator = torch.Generator().manual_seed(seed)
    frequency = tiny.ROPE_THETA ** (-torch.arange(half).double() / half)
    slow = [place for place in range(half) if frequency[place] < 5e-4]
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    code = basis[:size]  # what a token looks like in the slots, `size` dimensions of it
    slots = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    stored, sharp, look, fetched = 1.5, 9.0, 16.0, 2.5
    with torch.no_grad():
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            fast = torch.arange(half) < 10
            angle = (frequency * -(head + 1)).float()
            first.q_proj.weight[rows] *= 0.3
            first.k_proj.weight[rows] *= 0.3
            first.q_proj.bias[rows] = sharp * torch.cat([torch.cos(angle) * fast, torch.sin(angle) * fast])
            first.k_proj.bias[rows] = sharp * torch.cat([torch.ones(half) * fast, torch.zeros(half)])
            first.v_proj.weight[rows] = code
            first.o_proj.weight[:, rows] = stored * hidden**-0.5 * slots[:, rows]
        places = torch.tensor([*slow, *(place + half for place in slow)])
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            query = torch.zeros(size, hidden)
            key = torch.zeros(size, hidden)
            for back in range(heads):
                mixed = torch.linalg.qr(torch.randn(size, len(places), generator=generator)).Q.T
                weight = look**0.5 * (1.0, 0.9, 0.8)[back]
                here = code * 1.0 if back == 0 else slots[:, (back - 1) * size : back * size].T / stored
                there = slots[:, back * size : (back + 1) * size].T / stored
                query[places] += weight * mixed @ here
                key[places] += weight * mixed @ there
            second.q_proj.weight[rows] = query * 0.35
            second.k_proj.weight[rows] = key * 0.35
            second.v_proj.weight[rows] = basis[rows]
            second.o_proj.weight[:, rows] = fetched * hidden**-0.5 * basis[rows].T


def answer_loss(
    model: Qwen2ForCausalLM, tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the answers' tokens, and the share that is guessed right; logits are made for these alone."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != -100
    logits = model.lm_head(hidden[kept])
    wanted = wanted[kept]
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
    return loss, (logits.argmax(-1) == wanted).float().mean()


def rate(done: float, peak: float) -> float:
    """The learning rate when a share of the positions is done: a short rise, flat to the half, then down."""
    if done < 0.01:
        return peak * done / 0.01
    return peak if done < 0.5 else peak * (1 - 0.98 * (done - 0.5) / 0.5)


def train(
    model: Qwen2ForCausalLM,
    corpus: Corpus,
    *,
    positions: int,
    batch_positions: int = 3072,
    peak: float = 1.5e-3,
    longest: int = 1000,
    device: str = "cpu",
    log_every: int = 50,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Train on the stream until so many positions are seen; the losses of all steps."""
    model.to(device).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    seen, losses, rights = 0, [], []
    began = time.perf_counter()
    # Short documents first: finding and copying are learnt there at less cost.
    stream = batches(
        corpus, batch_positions, lambda: 260 if seen < 0.15 * positions and not corpus.entangled else longest
    )
    while seen < positions:
        rows, learnt = next(stream)
        width = max(map(len, rows))
        # Padding on the right needs no attention mask: nothing that counts looks at it.
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in learnt], device=device)
        for group in optimizer.param_groups:
            group["lr"] = rate(seen / positions, peak)
        with torch.autocast(device, torch.bfloat16):
            loss, right = answer_loss(model, tokens, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(map(len, rows))
        losses.append(loss.item())
        rights.append(right.item())
        if len(losses) % log_every == 0:
            seconds = time.perf_counter() - began
            log(
                f"step {len(losses)} positions {seen / 1e6:.2f}M seconds {seconds:.0f} ({seen / seconds / 1e3:.1f}k/s) "
                f"loss {math.fsum(losses[-log_every:]) / log_every:.3f} "
                f"right {math.fsum(rights[-log_every:]) / log_every:.3f}"
            )
    model.to("cpu").eval()  # type: ignore[arg-type]
    return losses


def save(model: Qwen2ForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Weights in half precision, tokenizer, configuration: what `from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mtgdm.student.warmup", description="Make the tiny base anew."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new base")
    parser.add_argument("--start", type=Path, help="go on from this base, not from new weights")
    parser.add_argument(
        "--entangled", type=int, default=0, help="0, 1 or 2: how much the values of a record share"
    )
    parser.add_argument("--positions", type=float, default=6e6, help="tokens to train on, prompts included")
    parser.add_argument("--batch-positions", type=int, default=3072)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--longest", type=int, default=1000, help="about the longest document, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    tokenizer = tiny.build_tokenizer()
    if options.start:
        model = Qwen2ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        model = tiny.build_model(len(tokenizer), seed=options.seed)
        start_copying(model, options.seed)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, torch {torch.__version__}")
    train(
        model,
        Corpus(tokenizer.backend_tokenizer, options.seed, options.entangled),
        positions=int(options.positions),
        batch_positions=options.batch_positions,
        peak=options.lr,
        longest=options.longest,
        device=options.device,
        log=lambda line: print(line, flush=True),
    )
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
