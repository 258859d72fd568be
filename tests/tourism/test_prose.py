from __future__ import annotations

import pytest

from mtgdm.tourism import Tourism

CHINESE = (
    "甲山位于山东省泰安市，1420年建成道观，历史悠久，文化丰富。可乘高铁到泰安站，再换乘公交。"
    "最佳季节是春季和秋季，建议提前查好天气。"
)
ENGLISH = (
    "Mount Jia is in Shandong. Its temple was built in 1420. Take a high-speed train and change to a bus. "
    "The best seasons are spring and autumn; check the weather before you go."
)
GOOD = {
    "two paragraphs": f"{CHINESE}\n{ENGLISH}",
    "a blank line between": f"{CHINESE}\n\n{ENGLISH}\n",
    "headings": f"**中文讲解**\n{CHINESE}\n\n**English**\n{ENGLISH}",
    "Chinese headings": f"中文：\n{CHINESE}\n\n英文：\n{ENGLISH}",
    "several paragraphs each": f"{CHINESE}\n另外，山顶有亭。\n\n{ENGLISH}\nThere is a pavilion on the top.",
    "one line": f"{CHINESE}{ENGLISH}",
    "Latin at the end of the Chinese": f"{CHINESE}它是5A景区，英文名为Mount Jia。\n{ENGLISH}",
    "Chinese names in the English": f"{CHINESE}\n{ENGLISH} Its name is 甲山 (Jiǎ Shān).",
    "quotation at the end": f"{CHINESE}\n{ENGLISH} People call it “the roof.”",
    "a name three times": f"{CHINESE}\n{ENGLISH} Mount Jia is high. Mount Jia is old. Mount Jia is near.",
}
BAD = {
    "English first": (f"{ENGLISH}\n{CHINESE}", "not Chinese first and then English"),
    "in turns": (
        f"{CHINESE}\n{ENGLISH}\n{CHINESE[:-1]}啊。\n{ENGLISH}",
        "not Chinese first and then English",
    ),
    "no English": (CHINESE, "there is no English"),
    "no Chinese": (ENGLISH, "there is no Chinese"),
    "little Chinese": (f"甲山在泰安，可乘高铁。\n{ENGLISH}", "the Chinese part is too short: 9 characters"),
    "little English": (f"{CHINESE}\nMount Jia is good in spring.", "the English part is too short: 6 words"),
    "English cut off": (f"{CHINESE}\n{ENGLISH[:-10]}", "the English part does not end with a whole sentence"),
    "Chinese cut off": (f"{CHINESE[:-4]}\n{ENGLISH}", "the Chinese part does not end with a whole sentence"),
    "a sentence again and again": (
        f"{CHINESE}{'山中古观始建于明代永乐年间。' * 3}\n{ENGLISH}",
        "the text goes round in circles",
    ),
    "a clause again and again": (
        f"{CHINESE}{'与颐和园承德山庄并称名园，好，' * 3}完。\n{ENGLISH}",
        "the text goes round in circles",
    ),
    "words again and again": (
        f"{CHINESE}{'很好' * 4}。\n{ENGLISH}",
        "the text goes round in circles: '很好'",
    ),
    "English again and again": (
        f"{CHINESE}\n{ENGLISH} {'It is a very good place. ' * 3}",
        "the text goes round in circles",
    ),
    "no transport": (
        f"{CHINESE.replace('可乘高铁到泰安站，再换乘公交', '山上有许多石头和松树')}\n{ENGLISH}",
        "the Chinese part says nothing of transport",
    ),
    "no season in English": (
        f"{CHINESE}\n{ENGLISH.replace('The best seasons are spring and autumn; check', 'Check')}",
        "the English part says nothing of the best season",
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_whole_guide_passes(case: str, tourism: Tourism) -> None:
    assert tourism.prose_problem("bilingual", GOOD[case]) is None


@pytest.mark.parametrize("case", BAD)
def test_a_broken_guide_is_named(case: str, tourism: Tourism) -> None:
    text, reason = BAD[case]
    assert (tourism.prose_problem("bilingual", text) or "").startswith(reason)


def test_a_type_that_is_not_known_has_no_prose_contract(tourism: Tourism) -> None:
    assert tourism.prose_problem("poem", "a") is None
