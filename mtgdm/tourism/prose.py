"""What makes a bilingual answer whole: Chinese, then English, both finished, on the subject, no loops."""

from __future__ import annotations

import re
from collections import Counter

MIN_HAN = 30
MIN_WORDS = 20
CHINESE_FIRST = 1.7
"""Share of the Han characters before the best cut plus share of the Latin letters behind it, of 2.

Two paragraphs give nearly 2, with foreign names on both sides 1.8; alternating ones 1.5, English first 1."""

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z]")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_CUT = re.compile(r"\n+|(?<=[。！？”）])")
_ENDS = (".", "!", "?", "。", "！", "？", "…")
_TRAILING = " \t\r\n*_`\"'”’）)」』】"
_HEADING = re.compile(r"\n[^\S\n]*[#*\-\s]*(?:English|英文)[^\n。.]{0,30}$", re.IGNORECASE)
_REPEATED = re.compile(r"(.{2,60}?)\1{3,}", re.DOTALL)
_REPEATED_SHORT = re.compile(r"(.{2,5}?)\1{3,}", re.DOTALL)
_SENTENCE = re.compile(r"[^。！？.!?\n]{8,}[。！？.!?]")

_CLAUSE = re.compile("[㐀-鿿“”《》、\\d]{10,}(?=[，；。：！？])")

_CHINESE_SUBJECTS = (
    ("history", re.compile(r"历史|年|代|世纪|始建|建于|古|相传|传说|朝|沿革")),
    ("transport", re.compile(
        r"交通|地铁|公交|高铁|火车|铁路|机场|自驾|驾车|驱车|乘|车站|换乘|码头|步行|公路|前往|抵达|到达")),
    ("the best season", re.compile(r"季|春|夏|秋|冬|全年|[一二三四五六七八九十\d]月")),
    ("advice", re.compile(
        r"建议|提示|提醒|注意|提前|最好|宜|请|不妨|可以|记得|务必|适合|避开|预约|准备|推荐|应")),
)  # fmt: skip
_ENGLISH_SUBJECTS = (
    ("history", re.compile(
        r"histor|century|dynast|built|founded|ancient|year|\d{3,4}|origin|\bold|legend|era\b", re.I)),
    ("transport", re.compile(
        r"transport|train|metro|subway|\bbus|rail|driv|\bcar\b|airport|flight|\bfly|station|boat|ferry|reach|access"
        r"|getting|arriv|travel|road|taxi|coach|shuttle|walk", re.I)),
    ("the best season", re.compile(
        r"season|spring|summer|autumn|\bfall\b|winter|year[- ]round|all year|any time|throughout the year"
        r"|January|February|March|April|May|June|July|August|September|October|November|December", re.I)),
    ("advice", re.compile(
        r"advi[cs]e|recommend|suggest|should|tip|remember|check|book|plan|bring|wear|avoid|allow|please"
        r"|best to|be sure|make sure|consider|need to|visitors? (?:can|may|are)|prepare|worth", re.I)),
)  # fmt: skip


def problem(text: str) -> str | None:
    """Why a text is no whole bilingual guide, or None."""
    chinese, english, cut = _halves(text)
    if wrong := _languages_problem(text, chinese, english, cut):
        return wrong
    if loop := _loop(text):
        return f"the text goes round in circles: '{loop}'"
    for part, language in ((chinese, "Chinese"), (english, "English")):
        if not _finished(part):
            return f"the {language} part does not end with a whole sentence"
    for part, language, subjects in (
        (chinese, "Chinese", _CHINESE_SUBJECTS),
        (english, "English", _ENGLISH_SUBJECTS),
    ):
        for subject, pattern in subjects:
            if not pattern.search(part):
                return f"the {language} part says nothing of {subject}"
    return None


def languages_right(text: str) -> bool:
    """Whether a text is Chinese first and then English, a few sentences of each at least."""
    return _languages_problem(text, *_halves(text)) is None


def _languages_problem(text: str, chinese: str, english: str, cut: float) -> str | None:
    han, words = len(_HAN.findall(chinese)), len(_WORD.findall(english))
    if not _HAN.search(text):
        return "there is no Chinese"
    if not _WORD.search(text):
        return "there is no English"
    if cut < CHINESE_FIRST:
        return "not Chinese first and then English"
    if han < MIN_HAN:
        return f"the Chinese part is too short: {han} characters, at least {MIN_HAN}"
    if words < MIN_WORDS:
        return f"the English part is too short: {words} words, at least {MIN_WORDS}"
    return None


def _halves(text: str) -> tuple[str, str, float]:
    """The text cut where Chinese ends and English begins, and how clean that cut is (0 to 2)."""
    all_han, all_latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    best, where = 0.0, len(text)
    han = latin = start = 0
    for match in _CUT.finditer(text):
        place = match.end()
        part = text[start:place]
        han, latin, start = han + len(_HAN.findall(part)), latin + len(_LATIN.findall(part)), place
        score = han / (all_han or 1) + (all_latin - latin) / (all_latin or 1)
        if score > best:
            best, where = score, place
    return text[:where].strip(), text[where:].strip(), best


def _finished(part: str) -> bool:
    bare = _HEADING.sub("", part).rstrip(_TRAILING)
    return bare.endswith(_ENDS)


def _loop(text: str) -> str | None:
    """The beginning of words that come again and again, or None."""
    chunks = _repeated(text, 16)
    # Four times six characters or more repeat a chunk of 16: without one, only the shortest are looked for.
    for repeated in (_REPEATED if chunks else _REPEATED_SHORT).finditer(text):
        if str(repeated[1]).strip(" -=*_.…—\n"):  # a rule of dashes is no loop
            return str(repeated[1]).strip()[:24]
    for pattern in (_SENTENCE, _CLAUSE):
        counted = Counter(str(found).strip() for found in pattern.findall(text))
        for words, count in counted.items():
            if count >= 3:
                return words[:24]
    for chunk in chunks:
        # An English name of 16 letters may well occur three times.
        if len(_HAN.findall(chunk)) >= 8 and text.count(chunk) >= 4:
            return chunk[:24]
    for chunk in _repeated(text, 60) if chunks else ():
        if text.count(chunk) >= 4:
            return chunk[:24]
    return None


def _repeated(text: str, length: int) -> list[str]:
    """The chunks of so many characters that stand in a text more than once, in their order."""
    counted = Counter(text[place : place + length] for place in range(len(text) - length + 1))
    return [chunk for chunk, count in counted.items() if count > 1]
