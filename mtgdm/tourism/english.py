"""English for the closed vocabularies of the domain: provinces, seasons, kinds of spots, ways to travel.

A word that is not here stays untranslated: the offline teacher never guesses.
"""

from __future__ import annotations

PROVINCES = {
    "北京": "Beijing", "天津": "Tianjin", "河北": "Hebei", "山西": "Shanxi", "内蒙古": "Inner Mongolia",
    "辽宁": "Liaoning", "吉林": "Jilin", "黑龙江": "Heilongjiang", "上海": "Shanghai", "江苏": "Jiangsu",
    "浙江": "Zhejiang", "安徽": "Anhui", "福建": "Fujian", "江西": "Jiangxi", "山东": "Shandong",
    "河南": "Henan", "湖北": "Hubei", "湖南": "Hunan", "广东": "Guangdong", "广西": "Guangxi",
    "海南": "Hainan", "重庆": "Chongqing", "四川": "Sichuan", "贵州": "Guizhou", "云南": "Yunnan",
    "西藏": "Tibet", "陕西": "Shaanxi", "甘肃": "Gansu", "青海": "Qinghai", "宁夏": "Ningxia",
    "新疆": "Xinjiang", "香港": "Hong Kong", "澳门": "Macao", "台湾": "Taiwan",
}  # fmt: skip

SEASONS = {
    "春季": "spring", "夏季": "summer", "初秋": "early autumn", "秋季": "autumn", "冬季": "winter",
    "全年": "all year", "春": "spring", "夏": "summer", "秋": "autumn", "冬": "winter",
    "春天": "spring", "夏天": "summer", "秋天": "autumn", "冬天": "winter", "四季皆宜": "all year",
    "初春": "early spring", "初夏": "early summer", "深秋": "late autumn",
}  # fmt: skip

KINDS = {
    "山岳": "mountain", "湖泊": "lake", "峡谷": "gorge", "古城": "old city", "红色旅游": "revolutionary site",
    "博物馆": "museum", "陵墓": "mausoleum", "喀斯特": "karst", "古建筑": "historic architecture",
    "历史遗址": "historic site", "城市公园": "city park", "海岛": "island", "雪山": "snow mountain",
    "考古遗址": "archaeological site", "湿地": "wetland", "长城": "Great Wall", "石窟": "grottoes",
    "民族文化": "ethnic culture", "园林": "garden", "古镇": "old town", "道教": "Taoism",
    "瀑布": "waterfall", "名人故里": "celebrity hometown", "皇家园林": "imperial garden",
    "佛教寺院": "Buddhist temple", "佛教名山": "sacred Buddhist mountain", "沙漠": "desert",
    "溶洞": "karst cave", "火山": "volcano", "主题公园": "theme park", "丹霞地貌": "Danxia landform",
    "关城": "fortress pass", "文化景观": "cultural landscape", "古村落": "old village",
    "名楼": "famous tower", "水利工程": "waterworks", "佛教文化": "Buddhist culture", "海滨": "seaside",
    "祭祀文化": "ritual culture", "森林": "forest", "地质公园": "geopark", "温泉": "hot spring",
    "草原": "grassland", "历史街区": "historic quarter", "寺庙": "temple", "冰雪": "ice and snow",
    "现代建筑": "modern architecture", "丹霞": "Danxia", "藏传佛教寺院": "Tibetan Buddhist monastery",
    "黄河": "Yellow River", "民俗": "folk customs", "运河": "canal", "古塔": "old pagoda",
    "民族村寨": "ethnic village", "植物园": "botanical garden", "军事遗址": "military site",
    "海洋公园": "ocean park", "古典园林": "classical garden", "历史社区": "historic community",
    "传统民居": "traditional houses", "儒家文化": "Confucian culture", "文化": "culture",
    "峰林": "peak forest", "湖岛": "lake island", "河流": "river", "宫殿": "palace",
    "藏传佛教": "Tibetan Buddhism", "遗址": "ruins", "太极文化": "tai chi culture",
    "城堡民居": "fortified houses", "移民文化": "migration culture", "边境口岸": "border port",
    "佛道寺观": "Buddhist and Taoist temples", "渔猎文化": "fishing and hunting culture",
    "雕塑艺术": "sculpture", "边境": "border", "界江": "border river", "泉水": "spring water",
    "河口": "river mouth", "避暑": "summer resort", "彩色丘陵": "coloured hills", "高原": "plateau",
    "雅丹": "yardang", "冰川": "glacier", "大熊猫": "giant panda", "名人故居": "former residence",
    "关隘": "mountain pass", "古道": "ancient road", "科普场馆": "science museum",
    "野生动物": "wildlife", "乡村": "countryside", "藏书楼": "library", "城市湖泊": "city lake",
    "徽派建筑": "Hui-style architecture", "祠堂": "ancestral hall", "江矶": "river cliff",
    "名亭": "famous pavilion", "道教石刻": "Taoist carvings", "花岗岩峰林": "granite peaks",
    "民间信仰": "folk belief", "陶瓷文化": "ceramic culture", "三国文化": "Three Kingdoms culture",
    "桥梁": "bridge", "田园": "pastoral scenery", "古火山": "ancient volcano", "碉楼": "watchtowers",
    "华侨文化": "overseas Chinese culture", "城市水系": "city waterways", "边境风光": "border scenery",
    "风雨桥": "covered bridge", "热带雨林": "tropical rainforest", "潜水": "diving",
    "暗河": "underground river", "科普": "science education", "高原湖泊": "plateau lake",
}  # fmt: skip

_TRAVEL = (
    (("地铁", "轻轨", "轨道交通", "快轨"), "metro"),
    (("高铁", "动车", "城际", "高速铁路"), "high-speed rail"),
    (("火车", "铁路", "列车"), "train"),
    (("公交",), "bus"),
    (("机场", "飞机", "航班", "飞抵"), "air"),
    (("轮渡", "渡船", "乘船", "登船", "坐船", "游船", "码头"), "boat"),
    (("索道",), "cable car"),
    (
        (
            "汽车",
            "乘车",
            "转车",
            "驾车",
            "驱车",
            "自驾",
            "班车",
            "坐车",
            "高速公路",
            "高速",
            "专线车",
            "公路",
            "国道",
        ),
        "road",
    ),
    (("步行", "徒步"), "on foot"),
)

_SUFFIXES = ("维吾尔自治区", "壮族自治区", "回族自治区", "特别行政区", "自治区", "省", "市")


def short_province(name: str) -> str:
    """A province without its suffix: 广西壮族自治区 -> 广西."""
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def province(name: str | None) -> str | None:
    """The English name of a province-level division, or None."""
    return PROVINCES.get(short_province(name)) if name else None


def season(words: str | None) -> str | None:
    """`春季、秋季` -> `spring and autumn`; None where a word is not known."""
    parts = [SEASONS.get(part) for part in (words or "").split("、")]
    return listed([part for part in parts if part]) if all(parts) else None


def kinds(words: list[str]) -> list[str]:
    """The kinds of spot that have an English word here."""
    return [KINDS[word] for word in words if word in KINDS]


def travel(texts: list[str]) -> list[str]:
    """The ways to travel that transport texts name."""
    text = "".join(texts)
    return [english for words, english in _TRAVEL if any(word in text for word in words)]


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
