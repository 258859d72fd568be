"""The tiny offline student: its tokenizer, its model, and where the shipped base lies.

The tokenizer is built by rule, not trained on texts: every copied piece of text has to have the same tokens
in the prompt and in the answer. So no token spans two Chinese characters, or a space or a mark and a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

TINY_BASE: Path = Path(__file__).parent / "tiny_base"
"""The folder of the base model that ships with the package."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

MAX_POSITIONS = 2048

ROPE_THETA = 1e7
"""Slower turns than Qwen2's own 1e6: more dimensions of a head stay still over a prompt, and match by content."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's own pre-tokenizer: transformers puts it in place of whatever a Qwen2 folder declares."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a system prompt of its own."""

# Characters of place names and relics that GB2312 does not count among its 3,755 common ones.
_PLACE_CHARACTERS = (
    "岷峨嵋岱鄱阆婺潼崆峒邛崃嵩衢亳芜歙黟璧琊琅瑶琼浔浦淮泗沂漳沅湘漓潇灞浐沣渭泾洮湟祁岐崂嵊泸沱涪沔汨衡郴"
    "邵醴澧荆郧襄樊蕲黟婺邕钦梧贺濮邯邢沧廊郸磁蔚涿蓟滦昌忻朔汾晋绛霍闽莆漳泉汀邵瓯台衢婺睦严姑苏锡沛邳睢宿颍"
    "滁濠巢庐皖舒潜浮鄂皋赣虔袁筠洪饶信抚吉琼儋崖黎峒黔滇洱巂昆曲靖蜀蓉渝夔涪泸叙嘉眉雅茂羌陇秦凉甘肃"
    "敦煌玉嘉峪瀚戈壁祁连疆喀什伊犁阗龟兹焉耆楼兰唐古拉藏那曲雍布宗嘎噶巴卓玛喇嘛佛塔窟寺庙观阁亭榭轩斋庵祠"
    "堂殿阙陵墓碑碣坊牌楼桥堰渠坝湖泊潭瀑泉溪涧峡谷峰峦岭崖洞穴岩坪坳垭峁塬砀棣峥嵘巍峻岫岵崮嶂嶙峋麓幽邃"
    "翡翠琉璃珐琅鎏镌篆隶楷帖拓卷轴缂绣绢帛缎绫纱珏璋琮瑗璜瑾瑜琛琏璀璨玥玺圭簋鼎尊彝觚爵罍钺戟钟磬笙箫琴瑟"
    "鹮鹤鹭鸥鹊鹂鹃鹦鹉鹰隼鸢鸳鸯凫雁麋麓獐麂猕猴猿貂獾狍鲟鲵鲑鳜鲤莼菱藕荷莲菡萏芙蓉茉莉蔷薇茶芍药杜"
    "樟楠桧榕槐榉椿楸桦榆枫杉松柏檀梓橡桉栎竹篁芦苇蕨苔藓禅梵僧尼刹钵曼荼罗弥勒菩萨罗汉伽蓝舍利"
    "妈祖娲羲炎黄尧舜禹鲧夔皋陶孔孟荀庄墨韩嬴刘曹孙诸葛亮瑜懿羽飞祚祯熙雍乾隆嘉庆胤禛弘历昶珣颢顼喾皞"
)

_CHINESE_MARKS = "，。、；：？！“”‘’（）《》〈〉「」『』【】—…·－～％℃°′″×→　"

_ENGLISH_WORDS_TEXT = """
the of and in to is are was were at by on for with from as its this that place known built first
before after The A In It At By On For With From This That Best See Take palace museum garden temple
mountain mountains lake river island scenic area park national forest town old ancient city great
wall tomb tombs mausoleum cave caves grottoes valley gorge canyon waterfall waterfalls bay beach sea
coast village street square bridge tower pagoda hall house residence memorial site ruins resort
tourist zone spot world heritage culture cultural history historic historical nature natural geopark
wetland desert grassland snow hot spring springs summer autumn winter season early late year all
north south east west northern southern eastern western new royal imperial classical former home
hometown revolutionary science technology theme water sky heaven jade dragon phoenix tiger white
black red yellow green blue golden silver stone rock peak peaks cliff plain island peninsula check
opening hours prices advice transport train rail high speed metro bus air road boat cable car listed
rated told above Chinese not recorded culture kinds landform karst Danxia Buddhist Taoist Confucian
sacred famous ethnic folk volcano glacier canal waterworks seaside historic architecture site
sculpture art works custom plateau border fortress pass shrine monastery botanical zoo ocean ship
port farm rice tea silk salt iron copper coal glass paper wood flower tree bird fish horse panda
deer crane bear people party road army war peace hero youth sun moon star cloud mist wind
"""
ENGLISH_WORDS = tuple(_ENGLISH_WORDS_TEXT.split())

_FIELD_WORDS_TEXT = """
name province city history culture logistics tickets hours photo spots theme spot note attractions
type desc lat lon routes duration steps myths geo hint route total from to direction distance notes
time tips guide text title author price color size weight height width length owner maker brand
model code number date start end place address phone email page level rank score count unit cost tax
rate speed power state status label tag group part item list data value key info detail summary body
content source origin target result reason effect method tool material use user role team leader
member school class subject teacher student book chapter story song film actor food drink taste menu
animal plant habitat season weather wind rain temperature area depth volume age birth death job
skill hobby language null true false system user assistant json JSON
"""
FIELD_WORDS = tuple(_FIELD_WORDS_TEXT.split())

_JSON_MARKS = (
    ['":"'] * 90 + ['","'] * 90 + ['":["'] * 40 + ['"],"'] * 40 + ['":[{"'] * 25 + ['"}],"'] * 22 + ['"},{"'] * 20
    + ['":{"'] * 20 + ['"},"'] * 18 + ['{"'] * 60 + ['"}'] * 50 + ['":'] * 60 + [',"'] * 60 + ['":[],"'] * 30
    + ['},"'] * 14 + ['}],"'] * 14 + ['},{"'] * 14 + ['"]'] * 14 + ['"]}'] * 14 + ['"}]'] * 14 + ['"}}'] * 14
    + ['}}'] * 10 + ['}]'] * 10 + ['"}]}'] * 10 + [']}'] * 10 + ['":[]}'] * 10
)  # fmt: skip

_INITIALS_TEXT = "b p m f d t n l g k h j q x zh ch sh r z c s y w"
_INITIALS = ("", *_INITIALS_TEXT.split())
_FINALS_TEXT = (
    "a o e ai ei ao ou an en ang eng ong i ia ie iao iu ian in iang ing iong u ua uo uai ui uan un uang ue"
)
_FINALS = tuple(_FINALS_TEXT.split())

ASCII_TOKENS = 900
"""Merged tokens of ASCII words and JSON marks."""


def common_characters() -> list[str]:
    """The Chinese characters that have a token of their own: GB2312's first level and those of place names."""
    first_level = [
        character
        for row in range(0xB0, 0xD8)
        for cell in range(0xA1, 0xFF)
        if (character := bytes((row, cell)).decode("gb2312", "ignore"))
    ]
    return list(dict.fromkeys([*first_level, *_PLACE_CHARACTERS]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in Qwen2's form; a Chinese character without a token is two tokens."""
    from transformers import PreTrainedTokenizerFast

    specials = [END_OF_TEXT, TURN_START, TURN_END]
    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(special, special=True, normalized=False) for special in specials]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges by rule: bytes, ASCII words and JSON marks, Chinese characters out of their bytes."""
    tokens: dict[str, None] = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = dict.fromkeys(_ascii_merges())
    # All first two bytes of U+4E00 to U+9FFF, so that a rare character is two tokens.
    every = [chr(code) for code in range(0x4E00, 0xA000, 64)]
    for character in [*_CHINESE_MARKS, *every]:
        first, second, _ = _three(character) if len(character.encode()) == 3 else ("", "", "")
        if first:
            merges[first, second] = None
    for character in [*_CHINESE_MARKS, *common_characters()]:
        pieces = _three(character)
        merges["".join(pieces[:-1]), pieces[-1]] = None
    for left, right in merges:
        tokens[left + right] = None
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def _three(character: str) -> list[str]:
    """The bytes of a character as the byte-level alphabet writes them."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
    return list(spelled[0][0])


def _ascii_merges() -> list[tuple[str, str]]:
    """Merges inside words and inside JSON marks, learnt from word lists: never across the two, never a space."""
    words = [*ENGLISH_WORDS, *(word.capitalize() for word in ENGLISH_WORDS), *FIELD_WORDS, *FIELD_WORDS]
    syllables = [initial + final for initial in _INITIALS for final in _FINALS]
    pieces = [word for word in words for _ in range(12)] + _JSON_MARKS * 4
    pieces += [spelled for syllable in syllables for spelled in (syllable, syllable.capitalize())]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=len(pre_tokenizers.ByteLevel.alphabet()) + ASCII_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(pieces, trainer)
    found = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in found]


def build_model(
    vocabulary: int,
    *,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 3,
    feed_forward: int = 256,
    positions: int = MAX_POSITIONS,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights, float32; with `hidden=32, layers=1, heads=1` it is built in milliseconds."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.02,
        use_sliding_window=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        # Tied embeddings of length one: the logits of a copied token then stand out by sqrt(hidden).
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=hidden**-0.5)
    return model
