"""Written English as it is spoken: one reading of numbers, signs and abbreviations for synthesizers and aligners.

`read_words` says for every written word what is said for it, so that times of spoken words are times of written ones.
A synthesizer takes the first reading; an aligner takes all of them ("1905", "US") and finds the one that was said.
What is not said (a lone dash, a footnote mark, "[laughter]") has no reading; what cannot be read is refused.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from salad_ray.tables import BadInput

Reading = tuple[str, ...]
"""Spoken words in lower case, of letters and apostrophes."""
Token = tuple[Reading, ...]
"""One stretch of speech without a pause, and the ways it may be read; the usual one first."""


class Spoken(NamedTuple):
    """What is said for a written word.

    `text`: for a synthesizer, in letters and with the written punctuation; it may be several words, or none.
    `tokens`: for an aligner; none if nothing is said.
    `unsaid`: signs that are left out, such as emoji, "♪" and "「"; punctuation that a synthesizer is given is none.
    """

    text: str
    tokens: list[Token]
    unsaid: str = ""


@dataclass(frozen=True)
class _Context:
    """Of a word: its neighbours (""), whether the text is in capitals throughout, the number that stands before it,
    whether degrees do, and the word before the previous one."""

    previous: str
    following: str
    shouting: bool
    number: str = ""
    in_arc: bool = False
    earlier: str = ""


class _Piece(NamedTuple):
    """The written characters up to `end`, and what is said for them; `said` None is as written."""

    end: int
    tokens: list[Token]
    said: str | None


def _listed(*lines: str) -> dict[str, int]:
    """Words and their places, in order."""
    return {word: index for index, word in enumerate(" ".join(lines).split(), start=1)}


# --- What words, signs and abbreviations are called ------------------------------------------------------------------

# fmt: off
_SYMBOLS = {
    "&": "and", "+": "plus", "=": "equals", "@": "at", "%": "percent", "°": "degrees", "§": "section", "×": "times",
    "÷": "divided by", "±": "plus or minus", "−": "minus", "‰": "per thousand", "#": "number", "√": "square root of",
    "≈": "approximately", "≤": "at most", "≥": "at least", "≠": "is not", "→": "to", "⇒": "implies", "∞": "infinity",
    "∂": "partial", "∫": "integral of", "∑": "sum of", "∈": "in", "©": "copyright", "¶": "paragraph", "~": "about",
    "<": "less than", ">": "greater than", "*": "times", "¬": "not",
}
"""Other mathematical signs and signs of money have their Unicode names."""
_BETWEEN_NUMBERS = "<>*"
_BEFORE_NUMBERS = "~#"
_CURRENCIES = {
    "$": ("dollar", "dollars", "cents"), "£": ("pound", "pounds", "pence"), "€": ("euro", "euros", "cents"),
    "¥": ("yen", "yen", ""), "₹": ("rupee", "rupees", "paise"), "₩": ("won", "won", ""), "₽": ("ruble", "rubles", ""),
    "¢": ("cent", "cents", ""),
}
_COUNTRIES = {"us": "", "a": "australian", "au": "australian", "c": "canadian", "ca": "canadian", "hk": "hong kong",
              "nz": "new zealand"}
_SCALES = {"hundred": "hundred", "thousand": "thousand", "million": "million", "billion": "billion",
           "trillion": "trillion", "k": "thousand", "m": "million", "mn": "million", "bn": "billion", "b": "billion",
           "tn": "trillion"}
_UNITS = {
    "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "\u03bcm": "micrometer", "nm": "nanometer",
    "ft": "foot", "in": "inch", "yd": "yard", "yds": "yard", "mi": "mile", "kg": "kilogram", "g": "gram",
    "mg": "milligram", "\u03bcg": "microgram", "mcg": "microgram", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "l": "liter", "L": "liter", "dl": "deciliter", "dL": "deciliter", "ml": "milliliter", "mL": "milliliter",
    "cl": "centiliter", "tsp": "teaspoon", "tbsp": "tablespoon", "gal": "gallon", "s": "second", "sec": "second",
    "secs": "second", "ms": "millisecond", "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "yr": "year", "yrs": "year", "mph": "mile per hour", "kph": "kilometer per hour", "rpm": "revolution per minute",
    "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "W": "watt", "kW": "kilowatt",
    "MW": "megawatt", "GW": "gigawatt", "kWh": "kilowatt hour", "V": "volt", "kV": "kilovolt", "mA": "milliamp",
    "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte", "dB": "decibel",
    "kcal": "kilocalorie", "cal": "calorie", "kJ": "kilojoule", "kPa": "kilopascal", "hPa": "hectopascal",
    "mmHg": "millimeter of mercury", "ppm": "part per million", "ha": "hectare", "mol": "mole", "Ω": "ohm",
    "kΩ": "kilohm", "MΩ": "megohm", "kbit": "kilobit", "Mbit": "megabit", "Gbit": "gigabit",
    "°C": "degree celsius", "°F": "degree fahrenheit", "°": "degree", "%": "percent", "′": "foot", "″": "inch",
}
_PLURALS = {"foot": "feet", "inch": "inches", "percent": "percent"}
_POINTED_UNITS = {"ft", "in", "yd", "yds", "mi", "lb", "lbs", "oz", "tsp", "tbsp", "gal", "sec", "secs", "min", "mins",
                  "hr", "hrs", "yr", "yrs"}
_LENGTHS = ("meter", "foot", "inch", "yard", "mile")
"""Whose powers are square and cubic ones; a second is squared."""
_LONE_LETTERS = {"s", "h", "l", "L", "V", "W", "g", "m", "in", "°", "′", "″"}
"""Units that after a space are as likely something else."""
_ABBREVIATIONS = {
    "mr.": ("mister",), "mrs.": ("missus",), "ms.": ("miss", "miz"), "prof.": ("professor",), "jr.": ("junior",),
    "sr.": ("senior",), "vs.": ("versus",), "vs": ("versus",), "etc.": ("et cetera",), "&c.": ("et cetera",),
    "e.g.": ("for example", "e g"), "i.e.": ("that is", "i e"), "eg.": ("for example",), "ie.": ("that is",),
    "viz.": ("namely",), "cf.": ("compare",), "ca.": ("circa",), "approx.": ("approximately",), "vol.": ("volume",),
    "vols.": ("volumes",), "gen.": ("general",), "col.": ("colonel",), "capt.": ("captain",), "lt.": ("lieutenant",),
    "sgt.": ("sergeant",), "maj.": ("major",), "cmdr.": ("commander",), "adm.": ("admiral",), "gov.": ("governor",),
    "sen.": ("senator",), "rep.": ("representative",), "pres.": ("president",), "rev.": ("reverend",),
    "hon.": ("honorable",), "messrs.": ("messieurs",), "mt.": ("mount",), "ft.": ("fort",), "ave.": ("avenue",),
    "blvd.": ("boulevard",), "rd.": ("road",), "dept.": ("department",), "univ.": ("university",), "inc.": ("inc",),
    "ltd.": ("limited",), "corp.": ("corporation",), "bros.": ("brothers",), "ph.d.": ("p h d",), "ph.d": ("p h d",),
    "ph.ds": ("p h ds",), "b.sc.": ("b s c",), "m.sc.": ("m s c",), "d.phil.": ("d phil",), "jan.": ("january",),
    "feb.": ("february",), "apr.": ("april",), "aug.": ("august",), "sept.": ("september",), "oct.": ("october",),
    "nov.": ("november",), "dec.": ("december",), "w/": ("with",), "w/o": ("without",), "et al.": ("et al",),
    "24/7": ("twenty four seven",), "9/11": ("nine eleven",), "c#": ("c sharp",), "f#": ("f sharp",),
}
_BEFORE_DIGITS = {
    "no": "number", "nos": "numbers", "fig": "figure", "figs": "figures", "p": "page", "pp": "pages", "ch": "chapter",
    "sec": "section", "eq": "equation", "art": "article", "mar": "march", "jun": "june", "jul": "july", "c": "circa",
    "v": "version", "ver": "version", "st": "street", "pt": "part",
    "vol": "volume",
}
"""Abbreviations with a point that are words of their own unless a number follows."""
_MONTHS = _listed("january february march april may june july august september october november december")
_SHORT_MONTHS = {f"{month[:3]}." for month in _MONTHS} | {"sept."}
_COUNTED = _listed(
    "chapter part book volume act scene section article title phase type war figure table appendix class level stage",
    "grade bowl season canto psalm sonnet episode division corps region no number verse lecture problem page",
    "listing exercise example vol amendment apollo saturn mark rocky plate schedule session symphony concerto factor",
    "nerve",
)
_NAMED = _listed(
    "henry louis george edward charles james william richard elizabeth mary philip pius leo benedict clement innocent",
    "gregory urban paul john francis frederick ferdinand napoleon alexander nicholas peter catherine otto alfonso ivan",
    "christian gustav leopold wilhelm franz ramses rameses ptolemy darius xerxes cleopatra constantine theodosius",
    "robert david malcolm stephen sigismund selim mehmed murad haakon olaf harald margaret victoria emmanuel pope",
    "king queen emperor tsar sultan emir shah ali albert joseph julius sixtus boniface celestine carl gustaf",
    "mohammed muhammad abdullah abdallah ahmed faisal hassan hussein tupou pomare mswati rama menelik tewodros",
    "baldwin bela casimir ladislaus vladislaus afonso pedro felipe umberto rainier vajiravudh maximilian rudolf henri",
    "philippe carlos thomas michael walter arthur kamehameha",
)
"""First names and titles whose numerals are ordinals; after other names they are numbers: "Apple II", "MHC II"."""
_BEFORE_I = _listed("type class phase war")
"""Words in small letters whose "I" is a number: "type I"; "the part I like" has another."""
_PAGED = _listed("chapter page p pp book volume vol act scene canto part psalm")
"""Words whose "i", "v" and "x" are numbers."""
_AFTER_NAMES = _listed("of was had who and is in to reigned died became ruled")
_NO_NUMERALS = _listed("MIX DIM LI DI MI CI MD CD DC XL XXL CV CC DL ML CL DX MC CM MM")
"""Roman numerals that are more often something else."""
_STARTERS = _listed(
    "the a an in it this that these those he she they we you i but and or so if when while as at on for by to from",
    "with after before however although because there here what who why how where since during its his her their our",
    "my is was are were despite through until unlike under over between among then thus also another such both",
)
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
          "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ο": "omicron", "π": "pi",
          "ρ": "rho", "σ": "sigma", "ς": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi",
          "ω": "omega"}
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth"}
_SPELLED_K = _listed(
    "tv tvs television televisions video videos display displays screen monitor resolution uhd ultra hdr footage",
    "camera race run races runs",
)
"""Words before which "4K" and "10K" are no thousands."""
_CASH = _listed("bill bills note notes coin coins")
_COMPASS = _listed("n s e w nw ne sw se")
_OPERATOR = re.compile("[=+×÷*<>≈≤≥≠√±]|-|plus|minus|times|equals")
_EVENTS = (
    "laughter|laughs?|laughing|chuckles?|chuckling|giggles?|applause|clapping|cheers|cheering|music(?:al)?|noises?|"
    "coughs?|coughing|sighs?|sighing|sniffs?|sniffles|sneezes?|breath(?:ing|s|es)?|inhales|exhales|gasps?|silence|"
    "pause|beep(?:s|ing)?|static|inaudible|unintelligible|indistinct|crosstalk|foreign|groans?|crying|sobs|sobbing|"
    "screams?|screaming|barking|ringing|knocking|footsteps|singing|humming|background|noise|sound|sil|spn|nsn|vocalized"
    "|blank_audio|illustration|footnote|sic|edit|citation needed"
)
# fmt: on

_INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    r"\U000e0000-\U000e0fff\x00-\x08\x0e-\x1f\x7f-\x9f]"
)
_ALIKE = str.maketrans({**dict.fromkeys("’‘ʼ`´ʹ＇", "'"), **dict.fromkeys("‐‑﹣－", "-"), "−": "-", "―": "—", "″": "″",
                        "º": "°", "⁄": "/", "∕": "/", "⋯": "…", "№": "No.", "‿": "_", "⁀": "_", "⁔": "_"})  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT = "[⁰¹²³⁴-⁹⁺⁻ⁿ]"
_KEPT = re.compile(rf"({_SUPERSCRIPT}+|[″‴…])")
_BUILT = re.compile(r"(?<![⁰¹²³⁴-⁹])([⁰¹²³⁴-⁹]+)[⁄/]([₀-₉]+)")
_VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞]|[⁰¹²³⁴-⁹]+[⁄/][₀-₉])")
_LATIN = str.maketrans({"ł": "l", "ø": "o", "æ": "ae", "œ": "oe", "ß": "ss", "đ": "d", "ð": "d", "þ": "th", "ı": "i",
                        "ħ": "h", "ŋ": "ng", "ƒ": "f"})  # fmt: skip

_NUM = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGNS_OF_MONEY = "$£€¥₹₩₽"
_LETTER = r"[^\W\d_⁰¹²³⁴-⁹ⁿ]"
_PIECE = re.compile(
    rf"""
    (?P<iso>\d{{4}}-\d\d-\d\d(?!\d))
    |(?P<date>(?<![\d/])\d{{1,2}}/\d{{1,2}}/(?:\d{{4}}|\d\d)(?![\d/]))
    |(?P<digits>(?<![\w.])(?:\+?\d{{1,2}}[-.])?(?:\d{{3}}[-.])?\d{{3}}-\d{{4}}(?![\w-])|(?<![\w-])\d+(?:-\d+){{2,}})
    |(?P<version>\d+(?:\.\d+){{2,}})
    |(?:(?P<whole>\d+)(?:[ ]|-(?=\d/[2-8](?!\d)|\d\d?/(?:10|12|16|32|64)(?!\d))))?
     (?P<top>(?<![\d/.,])\d{{1,3}})/(?P<bottom>\d{{1,4}})(?:(?:th|rd|nd)s?(?!{_LETTER}))?(?![\d/])
    |(?P<hour>(?<![\d:])\d{{1,2}}):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?!\d)
    |(?P<feet>\d+)['′](?P<inches>\d+)(?:"|''|″)
    |(?P<sign>(?<![\w.,)\]%'’])[-–±+~≈](?=[{_SIGNS_OF_MONEY}]?\.?\d))?
     (?:(?P<country>(?<!\w)(?:US|AU?|CA?|HK|NZ))?(?P<currency>[{_SIGNS_OF_MONEY}]))?
     (?P<number>{_NUM})
     (?:[-–—](?P<money>[{_SIGNS_OF_MONEY}])?(?P<to>{_NUM})(?![-–/:\ ]?\d))?
     (?P<suffix>(?:st|nd|rd|th|'?s)(?!{_LETTER}))?
    |(?P<initials>(?:[A-Za-z]\.){{2,}}|(?:[A-Za-z]\.)+[A-Za-z](?!{_LETTER})|(?<!\w)[A-HJ-Z]\.(?=,?$))
    |(?P<letters>'?{_LETTER}+(?:'{_LETTER}+)*'?)
    |(?P<power>{_SUPERSCRIPT}+|\^-?\d+)
    |(?P<per>(?<=[\w%°.])/(?=\w))
    |(?P<range>(?<=\d):(?=\d)|(?<=\d)–(?=[A-Z]\d)|(?:(?<=[ap]\.m\.)|(?<=\d[ap]m))[-–](?=\d))
    |(?P<dot>(?<=[a-z0-9])\.(?=[a-z]{{2}}))
    |(?P<prime>[′″])
    |(?P<symbol>[^\w\s]|_)
    """,
    re.VERBOSE,
)
_UNIT = re.compile(
    "(?P<unit>" + "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True))) + r")(?P<power>[²³]|(?<=[mt])[23])?"
    r"(?:/(?P<per>" + "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True))) + r")(?P<under>[²³23])?)?"
    rf"(?!{_LETTER}|\d|')"
)  # fmt: skip
_TO = re.compile(
    rf"[-–—](?=(?:(?:US|AU?|CA?|HK|NZ)?[{_SIGNS_OF_MONEY}])?\.?\d)|(?<=[IVXLC])[-–](?=[IVXLC]+(?!\w))|(?<=[ivxlc])[-–](?=[ivxlc]+(?!\w))"
)
"""A dash between two amounts or numerals."""
_AMOUNT = re.compile(rf"[{_SIGNS_OF_MONEY}]\.?\d[\d.,]*$|\d(?:{'|'.join(filter(str.isalpha, _UNITS))})$")
_AFTER_MONEY = re.compile(rf"[{_SIGNS_OF_MONEY}][\d.,–-]+\Z")
_BEFORE_SCALE = re.compile(rf"([{_SIGNS_OF_MONEY}])\.?\d[\d.,]*[-–]?(?:\d[\d.,]*)?\Z")
_ROMAN = re.compile(r"(?=.)M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_GROUPED = re.compile(
    rf"(?P<before>[\"“(]*)(?P<sign>[{_SIGNS_OF_MONEY}])?(?P<digits>[1-9]\d{{0,2}}(?:\n\d{{3}}){{1,4}})"
    r"(?P<after>[.,;:!?)\"”]*)(?<!\d\n)(?:(?<=\d)(?=\n(?!\d)|\Z)|(?<!\d)(?=\n|\Z))"
)
_HALF_GROUPED = re.compile(
    rf"[\"“(]*[{_SIGNS_OF_MONEY}]?[1-9]\d{{0,2}}\n(?!\d{{3}},\d{{3}})(?:000(?!\w)|\d{{3}}[^\w]+\d)"
)
"""As "1 000.5", "10 000–20 000", "1 000 1 000"."""
_MARKS = frozenset(".,;:!?…—–-\"“”'()[]{}«»„‚")
"""Written punctuation that a synthesizer is given, for the prosody."""
_PAUSES = frozenset(".,;:!?…—–-")
"""Of them, those that are left of a word without letters."""
_SIMPLE = re.compile(r"[\"“(']*([A-Za-z]?[a-z]+(?:'[a-z]+)?)[,.;:!?\"”)]*")
_PLAIN = re.compile(r"[A-Za-z0-9\s.,;:!?…—–\-\"“”'‘’()]*", re.ASCII)
_LONE = re.compile(r"(?<!\S)[^\w\s]*[\"“”'‘’()][^\w\s]*(?!\S)")
_MAX_ACRONYM = 5
_MAX_DIGITS = 15
"""Of numbers that are said as such; the digits of longer ones are read one by one."""
_ASIDES = re.compile(
    r"[\[{<(*]+\s*(?!(?:the|an?|his|her|their|its|this|that|of)\b)(?:[^\[\]{}<>()*]{0,30}\b)?"
    rf"(?:{_EVENTS})\b[^\[\]{{}}<>()*]{{0,40}}[\]}})>*]+"
    r"|\[[\s*†]*(?:\d{1,3}(?:\s*[,–-]\s*\d{1,3})*[a-z]?)?\]|(?:(?<=\w)\[[a-z]\]|(?-i:\[[b-hj-np-z]\]))(?!\w)"
    r"|</?[a-z][^<>]{0,80}>",
    re.IGNORECASE,
)
_PARENTHETIC = re.compile(
    r"[(*](?:laughter|laughs?|laughing|chuckles?|applause|inaudible|unintelligible|crosstalk|coughs?|coughing|sighs?"
    r"|cheering|(?:(?:long|short|brief) )?pauses?)\.?[)*]",
    re.IGNORECASE,
)
_INSIDE = re.compile(r"\[(\w+)\](?=\w)|(?<=\w)\[(\w+)\]")
"""Letters that an editor changed: "[H]e"."""
_BRACKETED = re.compile(r"(?:(?<=\s)|^)\[[^\[\]]*\](?=[\s.,;:!?]|$)")


# --- Words -----------------------------------------------------------------------------------------------------------


def read_words(words: Sequence[str], in_brackets: bool = True) -> list[Spoken]:
    """What is said for each written word of a text.

    Args:
        words: `text.split()`.
        in_brackets: words in square brackets are said ("[the king]"); sounds ("[laughter]") and notes ("[12]") never.

    Raises:
        BadInput: a word that cannot be read: in another script, or of signs without a name.
    """
    shown = _without_asides(words, in_brackets)
    shouting = not any(char.islower() for word in words for char in word)
    plain = [_plain(_INSIDE.sub(r"\1\2", word) if "[" in word else word) for word in shown]
    result: list[Spoken] = []
    for index, word in enumerate(plain):
        if index < len(result):
            continue  # "000" of "1 000"
        previous = plain[index - 1] if index else ""
        if (simple := _SIMPLE.fullmatch(word)) and not _needs_context(simple[1], word, previous):
            result.append(Spoken(word, [((simple[1].lower(),),)]))
            continue
        following = next((other for other in plain[index + 1 :] if other), "")
        if following[:3].isdigit() and (groups := _groups(plain, index)):
            result += groups
            continue
        in_arc = "°" in previous or ("′" in previous and index > 1 and "°" in plain[index - 2])
        earlier = plain[index - 2] if index > 1 else ""
        context = _Context(previous, following, shouting, _number_before(plain, index), in_arc, earlier)
        result.append(_read(word, context))
    return result


def spoken_tokens(words: Sequence[str], in_brackets: bool = True) -> list[list[Token]]:
    """For each written word what an aligner looks for: 0 or more tokens (none for a lone dash)."""
    return [spoken.tokens for spoken in read_words(words, in_brackets)]


def unsaid_signs(text: str) -> str:
    """The signs of a text that can be read which are not said, such as emoji; those of asides are not among them."""
    if _PLAIN.fullmatch(text) and not _LONE.search(text):
        return ""
    return "".join(spoken.unsaid for spoken in read_words(text.split()))


def num_asides(text: str) -> int:
    """How many sounds and notes in brackets ("[laughter]", "[12]") and tags a text has, which are not said."""
    return len(_asides(" ".join(text.split())))


def transcript_tokens(words: Sequence[str]) -> list[list[list[Token]]]:
    """The ways in which a transcript may have been said: `spoken_tokens` with the words in square brackets and, if
    there are any, without. An editor's "[the king]" is said, "[door slams]" is not, and only the recording tells.
    """
    ways = [spoken_tokens(words)]
    if any("[" in word for word in words) and (without := spoken_tokens(words, in_brackets=False)) != ways[0]:
        ways.append(without)
    return ways


def unreadable(text: str) -> str:
    """The first part of a text that has no English reading, "" if there is none."""
    if text.isascii():
        return ""
    plain = _plain(text)
    return next((char for char in plain if not char.isascii() and not _has_reading(char)), "") or _greek_word(plain)


@lru_cache(maxsize=1 << 14)
def cardinal(number: int, conjunction: bool = False) -> Reading:
    """`cardinal(342)`: three hundred forty two; with `conjunction` three hundred and forty two."""
    from num2words import num2words

    if number >= 10**_MAX_DIGITS:
        return digits_of(str(number))
    words = re.findall("[a-z]+", num2words(number))
    return tuple(word for word in words if conjunction or word != "and")


def ordinal(reading: Reading) -> Reading:
    """The ordinal of a cardinal: twenty one → twenty first."""
    *head, last = reading
    if last in _ORDINALS:
        return (*head, _ORDINALS[last])
    return (*head, last.removesuffix("y") + "ieth" if last.endswith("y") else last + ("h" if last[-1] == "t" else "th"))


def _without_asides(words: Sequence[str], in_brackets: bool) -> list[str]:
    """The words without what nobody says: sounds and notes in brackets, and tags; or any words in square brackets."""
    text = " ".join(words)
    gone = _asides(text)
    if not in_brackets:
        gone += [match.span() for match in _BRACKETED.finditer(text)]
    if not gone:
        return list(words)
    kept = list(text)
    for start, end in gone:
        kept[start:end] = ["\x00" if char != " " else " " for char in text[start:end]]
    return ["".join(kept[start:end]).replace("\x00", "") for start, end in _bounds(words)]


def _asides(text: str) -> list[tuple[int, int]]:
    """Where sounds and notes in brackets, and tags, stand in a text."""
    if not any(sign in text for sign in "[<{(*"):
        return []
    found = _ASIDES.finditer(text)
    return [match.span() for match in found if match[0][0] not in "(*" or _PARENTHETIC.fullmatch(match[0])]


def _bounds(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    position = 0
    for word in words:
        yield position, position + len(word)
        position += len(word) + 1


def _plain(word: str) -> str:
    """One character for each sign: NFKC ("Ａ", "①", "℃"), without invisible ones; superscripts stay."""
    if word.isascii():
        return html.unescape(word) if "&" in word and ";" in word else word
    word = html.unescape(word) if "&" in word and ";" in word else word
    word = _VULGAR.sub(" ", _INVISIBLE.sub("", word))
    word = _BUILT.sub(lambda built: f"{built[1].translate(_SUPERSCRIPTS)}/{built[2]}", word).translate(_ALIKE)
    parts = _KEPT.split(word)
    parts[::2] = [unicodedata.normalize("NFKC", part).translate(_ALIKE) for part in parts[::2]]
    plain = "".join(parts).replace("′′", "″")
    return "".join(
        str(unicodedata.decimal(char)) if not char.isascii() and char.isdecimal() else char for char in plain
    )


def _fold(letters: str) -> str:
    """Letters a – z and apostrophes, without accents; Greek letters by name."""
    if letters.isascii():
        return letters.lower()
    lower = "".join(_GREEK.get(char, char) for char in letters.lower()).translate(_LATIN)
    return "".join(char for char in unicodedata.normalize("NFKD", lower) if not unicodedata.combining(char))


@lru_cache(maxsize=1 << 12)
def is_unsaid(char: str) -> bool:
    """Whether a character is a picture or another sign that has no name and is no punctuation: emoji, "♪"."""
    is_sign = unicodedata.category(char) in ("So", "Sk", "Me", "Cn") and not "\u2500" <= char <= "\u25ff"
    return is_sign and unicodedata.normalize("NFKC", char) == char and char not in _SYMBOLS and char not in "\ufffd`´"


@lru_cache(maxsize=1 << 12)
def _has_reading(char: str) -> bool:
    """Letters of the Latin alphabet, digits, signs with a name, punctuation, and pictures, which are not said."""
    category = unicodedata.category(char)
    if category[0] == "L":
        return bool(re.fullmatch("[a-z]+", _fold(char)))
    if category[0] == "N":  # of another script; those of ours are ASCII by now
        return re.fullmatch(_SUPERSCRIPT, char) is not None
    return char != "\ufffd" and (category[0] in "PZMS" or category in ("Cc", "Cf"))


def _greek_word(plain: str) -> str:
    found = re.search("[α-ωά-ώ]{2,}", plain.lower())
    return found[0] if found else ""


def _needs_context(core: str, word: str, previous: str) -> bool:
    """Whether a word of plain letters may be an abbreviation, a unit or a numeral."""
    lower = core.lower()
    return (
        len(core) == 1
        or core.isupper()
        or (f"{lower}." in _ABBREVIATIONS and "." in word)
        or lower in _ABBREVIATIONS
        or lower in _BEFORE_DIGITS
        or lower in ("st", "dr", "co", "al")
        or previous[-1:].isdigit()
        or (core in _UNITS and core != "in")
        or not lower.strip("ivxl")
        or not previous[-1:].isascii()
    )


def _number_before(plain: Sequence[str], index: int) -> str:
    """The number that the word before is or ends with, for a unit may follow; "" if there is none."""
    if index == 0:
        return ""
    previous = plain[index - 1].lstrip("(\"“'~-–±+≈")
    if previous.lower() in ("million", "billion", "trillion", "sq.", "square", "cubic", "half"):
        return "2"
    if fraction := re.fullmatch(r"(\d+ )?\d+/\d+", previous):
        return "2" if fraction[1] else "1"
    found = re.fullmatch(rf"(?:.*[-–—/xX×])?({_NUM})", previous)
    return found[1] if found else ""


# --- One word --------------------------------------------------------------------------------------------------------


def _read(plain: str, context: _Context) -> Spoken:
    if not plain.isascii() and (sign := unreadable(plain)):
        raise BadInput(f"'{sign[:20]}' in '{plain[:40]}' has no English reading")
    tokens: list[Token] = []
    text, unsaid, in_words = "", "", False  # the piece before was put in words
    for start, piece in _pieces(plain, context):
        written = plain[start : piece.end]
        said = written if piece.said is None else piece.said
        is_joined = text[-1:].isalnum() or (text[-1:] == ")" and piece.said is not None)
        if is_joined and said[:1].isalnum() and (in_words or piece.said is not None):
            text += " "
        text += said or (" " if piece.said is not None and plain[piece.end : piece.end + 1].isalnum() else "")
        in_words = (in_words and not piece.tokens) or piece.said is not None
        tokens += piece.tokens
        unsaid += "" if said or piece.tokens else written
    if tokens:
        return Spoken(" ".join(text.split()), tokens, unsaid)
    pauses = "".join(char for char in text if char in _PAUSES)
    return Spoken(pauses, [], "".join(char for char in plain if char not in _PAUSES))


def _pieces(plain: str, context: _Context) -> Iterator[tuple[int, _Piece]]:
    position, number, glued = 0, context.number, False
    abbreviation = _abbreviation(plain, context)
    while match := _PIECE.search(plain, position):
        start = match.start()
        if abbreviation and start >= abbreviation[0]:
            yield abbreviation
            position, abbreviation = abbreviation[1].end, None
            continue
        adjacent = glued and start == position
        if adjacent and _TO.match(plain, start):
            yield start, _said(start + 1, [(("to",),)])
            position = start + 1
            continue
        may_be_unit = number and (adjacent or not plain[:start].strip("-"))
        hyphen = bool(adjacent and plain[start] == "-")  # "21-cm"
        unit = _UNIT.match(plain, start + hyphen) if may_be_unit else None
        is_apart = hyphen or not adjacent
        if unit and is_apart and unit[0] in _LONE_LETTERS and not _is_unit_alone(unit[0], plain, context):
            unit = None
        if unit and unit[0].lower() in _SCALES and _AFTER_MONEY.search(plain, 0, start):
            unit = None  # "$5m"
        if unit:
            piece = _unit(unit, number, plain, context)
        else:
            piece = _piece(match, plain, context, number if adjacent else "")
        yield start, piece
        is_amount = match["number"] or match["bottom"] or match["hour"] or match["power"] or unit
        in_words = match["letters"] and piece.said and (adjacent or _ROMAN.fullmatch(match[0].upper()))  # "5k", "IV"
        glued = bool(is_amount or in_words)
        number = "" if unit else match["to"] or match["number"] or ""
        if match["bottom"] and not unit:  # "½ mile", "2½ miles"
            number = "2" if match["whole"] else "1"
        position = max(piece.end, start + 1)


def _piece(match: re.Match[str], plain: str, context: _Context, number: str) -> _Piece:
    """What is said for a piece of a word; `number` stands right before it."""
    end = match.end()
    if match["letters"]:
        return _letters(match, plain, context, number)
    if match["initials"]:
        if len(match[0]) == 2 and (numeral := _roman(match[0][0], plain[: match.start()], plain[end - 1 :], context)):
            return _said(end - 1, [numeral])  # "Chapter V."
        letters = tuple(_fold(char) for char in match[0] if char.isalpha())
        is_last = not context.following and match[0].endswith(".") and end == len(plain.rstrip("\"'”)"))
        return _Piece(end, [(letters,)], " ".join(letters).upper() + ("." if is_last else ""))
    if match["number"]:
        return _said(end, _quantity(match, plain, context))
    if match["bottom"]:
        return _said(end, _fraction(match, context))
    if match["hour"]:
        return _said(end, _time(match, plain, context))
    if match["iso"] or match["date"]:
        return _said(end, [_date(match[0])])
    if match["digits"]:
        return _said(end, [(digits_of(part),) for part in re.split("[-.]", match[0].lstrip("+"))])
    if match["version"]:
        first, *rest = match[0].split(".")
        return _said(end, [(cardinal(int(first)),), *[(("point", *_small(part)),) for part in rest]])
    if match["feet"]:
        feet, inches = cardinal(int(match["feet"])), cardinal(int(match["inches"]))
        return _said(end, [((*feet, "feet"),), ((*inches, "inches"), inches)])
    if match["power"]:
        return _said(end, _power(match, plain, context))
    if match["per"]:
        return _said(end, [(("per",), ("a",))] if _is_per(plain[: match.start()], plain[end:]) else [])
    if match["range"]:
        return _said(end, [(("to",),)])
    if match["dot"]:
        return _said(end, [(("dot",),)])
    return _symbol(match, plain, number)


def _said(end: int, tokens: list[Token]) -> _Piece:
    return _Piece(end, tokens, " ".join(word for token in tokens for word in token[0]))


def _abbreviation(plain: str, context: _Context) -> tuple[int, _Piece] | None:
    """A word that is an abbreviation as a whole, but for quotes and punctuation around it."""
    core = plain.lower().strip("\"'()[]{},;:!?“”«»")
    start = plain.lower().find(core) if core else 0
    readings = _ABBREVIATIONS.get(core) or _abbreviation_in_context(core, plain, context)
    if core in _SHORT_MONTHS and core.upper() in plain and not context.shouting:
        return None  # "AUG."
    if not readings or (core.endswith(".") and core in ("inc.", "ft.") and context.number):
        return None
    ends_text = core.endswith(".") and not context.following
    token = tuple(tuple(reading.split()) for reading in readings)
    is_spelled = all(len(word) == 1 for word in token[0][:2]) and len(token[0]) > 1
    first = readings[0].upper() if is_spelled else readings[0]
    capital = plain[start : start + 1].isupper() and not is_spelled
    said = (first[:1].upper() + first[1:] if capital else first) + ("." if ends_text else "")
    return start, _Piece(start + len(core), [token], said)


def _abbreviation_in_context(core: str, plain: str, context: _Context) -> Sequence[str]:
    stem, following, previous = core.removesuffix("."), context.following, context.previous
    named = following.lstrip("\"“'(")[:1].isupper() and _fold(following.strip(".,;:!?'\"")) not in _STARTERS
    if stem == "st" and (core != stem or named or not following[:1].isupper()):
        is_end = previous[:1].isupper() and plain.rstrip("\"'”)").endswith(",")  # "5 Elm St., Boston", "5th St. NW"
        is_end = is_end or _fold(following.strip(".,;:!?\"'”)")).replace(".", "") in _COMPASS
        return ("saint", "street") if named and not is_end else ("street", "saint")
    if stem == "dr" and core != stem:
        return ("doctor", "drive") if named or not previous[:1].isupper() else ("drive", "doctor")
    if "v." in plain and core == "v." and previous[:1].isupper() and named and _fold(previous) not in _PAGED:
        return ("versus", "v")
    if core == "al." and _fold(previous) == "et":
        return ("al",)
    if core == "co." and previous[:1].isupper():
        return ("company", "co")
    has_point = core != stem or (stem in ("no", "nos") and plain.lstrip("\"'(“")[:1] == "N" and not context.shouting)
    if stem in _BEFORE_DIGITS and has_point and not context.number:
        # "Vol. II", "p. xii", but "Larry P. v. Riles"
        numeral = re.split("[-–—]", following.strip(".,;:!?)\"'”"))[0].upper()
        is_numeral = _ROMAN.fullmatch(numeral) and numeral != "I" and numeral not in _NO_NUMERALS
        is_numeral = is_numeral and not following.istitle() and _is_short_of_counted(stem) and "P." not in plain
        if is_numeral or re.match(r"[\"'(]*[#$]?\d", following):
            return (_BEFORE_DIGITS[stem], stem)
    if core == "no." and re.match(r"[A-Z]?\d", following):
        return ("number", "no")
    return ()


def _is_short_of_counted(stem: str) -> bool:
    """Whether an abbreviation without its point is one of a thing with a number: "vol", "p", "nos"."""
    return _BEFORE_DIGITS.get(stem, "").removesuffix("s") in _COUNTED


def _letters(match: re.Match[str], plain: str, context: _Context, number: str) -> _Piece:
    """A word. A short one in capitals is also spelled or a Roman numeral; after a number it may be a scale."""
    written, end = match[0], match.end()
    folded = _fold(written)
    spoken = folded.removeprefix("'").removesuffix("'")
    if re.search(r"[A-Za-z][\d.,]*\d$", plain[: match.start()]):
        number = ""  # "B2B"
    if number and folded in ("am", "pm"):
        return _Piece(end, [(tuple(folded),)], " ".join(folded).upper())
    in_word = _BEFORE_SCALE.search(plain, 0, match.start())  # "$5bn", "$10-billion"
    money = in_word or (_BEFORE_SCALE.search(context.previous) if _is_scale(spoken) else None)
    if money and (number or _is_scale(spoken)) and spoken in _SCALES:
        before = context.previous if in_word else context.earlier
        units = _unit_of_money(money[1], before, plain[end:], context, plain[: match.start()].endswith("-"))
        scale = _SCALES[spoken]
        return _said(end, [tuple(dict.fromkeys((*((scale, *unit) for unit in units), (scale,), (folded,))))])
    if number and folded in _SCALES and (folded not in ("m", "b") or written.isupper()):
        is_letter = folded == "k" and (number == "401" or _fold(context.following.strip(".,;:!?")) in _SPELLED_K)
        readings: Token = ((_SCALES[folded],), (folded,))
        return _said(end, [readings[::-1] if is_letter else readings])
    if number and folded == "x":
        return _said(end, [(("times",), ("x",))])
    if folded == "no" and re.match(r"\s?\d", plain[end:]):
        return _said(end, [(("number",),)])
    if folded in _BEFORE_DIGITS and folded not in ("c", "v") and re.match(r"\.\d", plain[end:]):  # "p.12", not "C.1"
        return _said(end + 1, [((_BEFORE_DIGITS[folded],),)])
    if any(char in _GREEK for char in written.lower()):  # "Δx"
        apart = "".join(f" {char} " if char in _GREEK else char for char in written.lower())
        return _said(end, [(tuple(re.sub("[^a-z' ]", "", _fold(apart)).split()),)])
    if numeral := _roman(written, plain[: match.start()], plain[end:], context):
        return _said(end, [numeral])
    word = (re.sub("[^a-z']", "", spoken),)
    stem = written.removesuffix("'s").removesuffix("s") if len(written) > 2 else written
    if context.shouting or not (stem.isupper() and 2 <= len(stem) <= _MAX_ACRONYM):
        return _Piece(end, [(word,)] if word[0] else [], None)
    spelled = tuple(_fold(stem))
    ending = spoken[len(spelled) :]
    return _Piece(end, [((*spelled[:-1], f"{spelled[-1]}'s") if ending else spelled, word)], None)


def _is_scale(word: str) -> bool:
    return word in ("hundred", "thousand", "million", "billion", "trillion")


def _roman(written: str, head: str, rest: str, context: _Context) -> Token | None:
    """Readings of a Roman numeral: after a king's name an ordinal (Henry VIII), else a number (Apple II)."""
    numeral = written.removesuffix("'s")
    if (century := re.fullmatch("([IVXLCDM]{2,})(?:th|st|nd|rd)", written)) and _ROMAN.fullmatch(century[1]):
        return (ordinal(cardinal(sum(_roman_values(century[1])))),)
    if war := re.fullmatch("WW(I{1,2})", numeral):
        said = tuple((*words, *cardinal(len(war[1]))) for words in (("world", "war"), ("w", "w")))
        return tuple((*reading[:-1], reading[-1] + written.removeprefix(numeral)) for reading in said)
    before = "(" if head.endswith("(") else context.previous.strip("\"'“(")  # "intravenous (IV)"
    stem = before.lower().rstrip(".")
    stem = stem if stem in _COUNTED else stem.removesuffix("s")
    is_short = _is_short_of_counted(stem) and (before[-1:] == "." or stem in ("p", "pp")) and before not in ("P", "P.")
    counted = is_short or (stem in _COUNTED and not (before[-1:] == "." and len(numeral) == 1))
    if re.fullmatch("[ivx]{3,}|ii", numeral) or (
        counted and re.fullmatch("[ivxl]+", numeral) and (len(numeral) > 1 or stem in _PAGED)
    ):
        numeral = numeral.upper()
    if not (numeral.isascii() and _ROMAN.fullmatch(numeral)):
        return None
    named = before[:1].isupper() and before.isalpha()
    by_name = not {_fold(before), _fold(context.earlier)}.isdisjoint(_NAMED)
    regnal = named and (by_name or re.fullmatch(r"[A-Z]\.", context.earlier) is not None)  # "John D. Rockefeller III"
    following = _fold(context.following.strip(".,;:!?\"'“”"))
    is_initial = rest[:1] == "." and context.following[:1].isupper() and following not in _STARTERS
    is_century = following.startswith("centur")
    if written == "I":
        ends = rest[:1] in tuple(",.;:)'") or following in _AFTER_NAMES
        of_thing = counted and not is_short and (named or stem in _BEFORE_I)
        is_numeral = of_thing or (ends and (counted or (named and _fold(before) in _NAMED and not is_initial)))
    elif len(numeral) == 1:
        of_king = named and _fold(before) in _NAMED and not is_initial and (numeral, before) != ("X", "Malcolm")
        is_numeral = numeral in "IVX" and (counted or of_king)
    else:
        stands = len(numeral) > 2 or numeral == "II" or named or not before or is_century
        is_plain = len(numeral) > 3 or not set(numeral) & set("LCDM")
        is_numeral = numeral not in _NO_NUMERALS and (counted or (is_plain and stands))
    if not is_numeral:
        return None
    number = sum(_roman_values(numeral))
    in_digits: Token = (*_in_pairs(number), cardinal(number)) if number >= 1000 else (cardinal(number),)
    ordinals: Token = (("the", *ordinal(cardinal(number))),)
    first = (*ordinals, *in_digits) if regnal and not counted else (*in_digits, *ordinals)
    first = (tuple(ordinal(cardinal(number))), *first) if is_century else first
    spelled: Token = ((numeral.lower(),), tuple(numeral.lower()))
    if written.endswith("'s"):
        first = tuple((*reading[:-1], f"{reading[-1]}'s") for reading in first)
    return tuple(dict.fromkeys((*first, *spelled)))


def _roman_values(numeral: str) -> Iterator[int]:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[char] for char in numeral]
    for value, following in zip(values, [*values[1:], 0], strict=True):
        yield -value if value < following else value


def _symbol(match: re.Match[str], plain: str, number: str) -> _Piece:
    sign, start, end = match[0], match.start(), match.end()
    digit_follows = plain[end : end + 1].isdigit() or (plain[end : end + 1] == "" and sign in "<>")
    if sign in _CURRENCIES:
        return _said(end, [((_CURRENCIES[sign][0] if number == "1" else _CURRENCIES[sign][1],),)])
    if sign in _BETWEEN_NUMBERS and not (digit_follows and (start == 0 or plain[start - 1].isdigit())):
        return _Piece(end, [], "")
    if sign == "#" and plain[end : end + 1].isalpha():
        return _said(end, [(("hashtag",),)])
    if sign in _BEFORE_NUMBERS and not plain[end : end + 1].isdigit():
        return _Piece(end, [], "")
    name = _SYMBOLS.get(sign) or _unicode_name(sign)
    if name:
        return _said(end, [(tuple(name.split()),)])
    return _Piece(end, [], None if sign in _MARKS else "")


@lru_cache(maxsize=1 << 10)
def _unicode_name(sign: str) -> str:
    if unicodedata.category(sign) not in ("Sm", "Sc") or sign in "|¦":
        return ""
    name = unicodedata.name(sign, "").lower()
    return " ".join(re.findall("[a-z]+", name.removesuffix(" sign")))


# --- Numbers ---------------------------------------------------------------------------------------------------------


def digits_of(digits: str) -> Reading:
    return tuple(_ONES[int(digit)] for digit in digits)


def _small(digits: str) -> Reading:
    return cardinal(int(digits)) if len(digits) <= 2 and digits[0] != "0" else digits_of(digits)


def _plural(reading: Reading) -> Reading:
    *head, last = reading
    if last.endswith("y"):
        return (*head, last[:-1] + "ies")
    return (*head, last + ("es" if last.endswith("x") else "s"))


def _is_per(before: str, after: str) -> bool:
    """Whether a slash stands behind an amount ("$40/week"), or before a number ("births/1,000")."""
    if after[0].isdigit():
        return before[-1].isalpha() and not re.search(r"\d", before)
    return before in _UNITS or bool(_AMOUNT.search(before))


def _quantity(match: re.Match[str], plain: str, context: _Context) -> list[Token]:
    """A number, a range or an amount of money; what follows in the word (a unit) is not in it."""
    currency, rest = match["currency"] or match["money"], plain[match.end() :]
    followed = _scale_follows(rest, context) or bool(currency and _is_called(currency, context.following))
    # "$5-10" has its unit behind the second number.
    single = _stands_before_noun(context.previous, rest, context.following)
    is_money = match["currency"] and not followed and (not match["to"] or match["money"])
    if is_money:
        tokens = _money(match["number"], currency, match["country"], single)
    else:
        as_year = not (currency or _unit_follows(rest, context))
        tokens = _number(match["number"], match["suffix"] or "", context, as_year)
    if match["sign"] and tokens:
        names = {"-": ("minus", "negative"), "–": ("minus", "negative"), "±": ("plus or minus",), "+": ("plus",)}
        tokens[0] = _prefixed(names.get(match["sign"], ("about", "approximately")), tokens[0])
    if match["to"]:
        last = (
            _money(match["to"], currency, match["country"], single)
            if currency and not followed
            else _number(match["to"], match["suffix"] or "", context, as_year=len(match["number"]) == 4)
        )
        low, high = float(match["number"].replace(",", "")), float(match["to"].replace(",", ""))
        is_place = _fold(context.previous) in _COUNTED  # "Figure 3-4"
        is_range = (high > low and not is_place) or (len(match["number"]) == 4 and len(match["to"]) == 2)
        joined = _prefixed(("to",), last[0])
        tokens += [(*joined, *last[0]) if is_range else (*last[0], *joined), *last[1:]]
    return tokens


def _prefixed(prefixes: Sequence[str], token: Token) -> Token:
    return tuple((*prefix.split(), *reading) for prefix in prefixes for reading in token)


def _scale_follows(rest: str, context: _Context) -> bool:
    """Whether the amount goes on ("$3 million", "$5bn", "$10-billion"), so that its currency comes later."""
    if glued := re.match(r"(-?)([A-Za-z]+)", rest):
        return _is_scale(glued[2].lower()) if glued[1] else glued[2].lower() in _SCALES
    return not rest and _is_scale(re.split("[^a-z]", context.following.lower(), maxsplit=1)[0])


def _unit_follows(rest: str, context: _Context) -> bool:
    if rest:
        return bool(_UNIT.match(rest))
    return bool((unit := _UNIT.match(context.following)) and unit[0] not in _LONE_LETTERS - {"m"})


def _money(number: str, sign: str, country: str | None, single: bool) -> list[Token]:
    """An amount of money; `single`: its unit is first in the singular, as before a noun ("a five dollar bill")."""
    one, many, cents = _CURRENCIES[sign]
    prefix = tuple(_COUNTRIES.get((country or "").lower(), "").split())
    whole, _, small = number.replace(",", "").partition(".")
    amount = int(whole or 0)
    names = (one, many) if single or (amount == 1 and len(small) in (0, 2)) else (many, one)
    units = list(dict.fromkeys((*prefix, name) for name in names))
    if small and len(small) == 2 and cents and int(small) > 0:
        cent = (*cardinal(int(small)), cents.removesuffix("s") if int(small) == 1 and cents == "cents" else cents)
        if amount == 0:
            return [(cent,)]
        dollars = (*cardinal(amount), *units[0])
        return [((*dollars, "and", *cent), (*dollars, *cent), (*cardinal(amount), *cardinal(int(small))))]
    if small and not (len(small) == 2 and cents):
        return [tuple((*cardinal(amount), *_decimals(small), *unit) for unit in units)]
    readings = _integer(whole if small else number, as_year=False)
    if len(readings) == 1 and len(whole) > 4:
        return [*[((word,),) for word in readings[0]], tuple(units)]
    return [tuple((*reading, *unit) for unit in units for reading in readings)]


def _unit_of_money(sign: str, before: str, rest: str, context: _Context, hyphen: bool) -> list[Reading]:
    """What follows a scale: dollars, before a noun dollar, nothing if the text says it ("$5 billion dollars")."""
    if _is_called(sign, context.following):
        return [()]
    names = _CURRENCIES[sign][:2]
    single = hyphen or _stands_before_noun(before, rest, context.following)
    return [(name,) for name in dict.fromkeys(names if single else names[::-1])]


def _is_called(sign: str, word: str) -> bool:
    """Whether a word is the name of a currency: "$5 dollars"."""
    return _fold(word.strip(".,;:!?)\"'”")) in _CURRENCIES[sign][:2]


def _number(number: str, suffix: str, context: _Context, as_year: bool) -> list[Token]:
    """A number; a long one is read digit group by digit group, with room for pauses."""
    whole, point, decimals = number.partition(".")
    if point:
        tail = _decimals(decimals)
        if not whole:
            return [(tail, ("zero", *tail))]
        readings = tuple((*reading, *tail) for reading in _integer(whole, as_year=False))
        return [(*readings, tail)] if whole == "0" else [readings]
    readings = _integer(whole, by_digit=not suffix, as_year=as_year)
    if suffix.endswith("s"):
        return [tuple(_plural(reading) for reading in readings)]
    if suffix:
        return [tuple(ordinal(reading) for reading in readings)]
    month = _fold(context.previous.strip("\"'("))
    if len(whole) <= 2 and 0 < int(whole) <= 31 and (month in _MONTHS or month in _SHORT_MONTHS) and month != "may":
        return [(ordinal(readings[0]), ("the", *ordinal(readings[0])), *readings)]
    return [readings] if len(readings) > 1 or len(readings[0]) < 4 else [((word,),) for word in readings[0]]


def _decimals(decimals: str) -> Reading:
    return ("point", *digits_of(decimals))


def _integer(digits: str, by_digit: bool = True, as_year: bool = True) -> Token:
    """The readings of digits such as 7, 342, 1905 or 1,200,000; one only for long numbers."""
    plain = digits.replace(",", "")
    one_by_one = digits_of(plain)
    if (len(plain) > 6 and "," not in digits and plain.strip("0") != plain[0]) or len(plain) > _MAX_DIGITS:
        return (one_by_one,)
    number = int(plain)
    if len(plain) > 4:
        return (cardinal(number),)
    if len(plain) > 1 and plain[0] == "0":
        return one_by_one, tuple("oh" if word == "zero" else word for word in one_by_one), cardinal(number)
    readings = [cardinal(number), cardinal(number, conjunction=True)]
    in_pairs = _in_pairs(number) if len(plain) >= 3 else []
    if as_year and "," not in digits and (1100 <= number < 2000 or 2010 <= number < 2100):
        readings = [*in_pairs, *readings]
    if by_digit and len(plain) > 1:
        readings += [one_by_one, tuple("oh" if word == "zero" else word for word in one_by_one)]
    return tuple(dict.fromkeys([*readings, *in_pairs]))


def _in_pairs(number: int) -> list[Reading]:
    """1984 as nineteen eighty four, 1905 as nineteen oh five or nineteen hundred (and) five, 120 as one twenty."""
    high, low = divmod(number, 100)
    hundreds = (*cardinal(high), "hundred")
    if low == 0:
        return [hundreds]
    if low >= 10:
        return [(*cardinal(high), *cardinal(low)), (*hundreds, *cardinal(low))]
    return [(*cardinal(high), "oh", *cardinal(low)), (*hundreds, *cardinal(low)), (*hundreds, "and", *cardinal(low))]


def _groups(plain: Sequence[str], index: int) -> list[Spoken]:
    """What is said for each word of a number with spaces between its thousands: "1 000 000"; none if it is no such one.

    Raises:
        BadInput: it may be one number or several, as "12 345".
    """
    previous = _fold(plain[index - 1].rstrip(".")) if index else ""
    if previous[-1:].isdigit() or previous in _COUNTED or previous in _BEFORE_DIGITS or previous in _MONTHS:
        return []
    match = _GROUPED.match("\n".join(plain[index : index + 6]))
    if not match:
        if _HALF_GROUPED.match("\n".join(plain[index : index + 2])):
            raise BadInput(f"'{' '.join(plain[index : index + 2])}' may be one number or several")
        return []
    first, *groups = match["digits"].split("\n")
    if "000" not in groups and (len(groups) == 1 or len(first) == 3):
        raise BadInput(f"'{' '.join([first, *groups])}' may be one number or several")
    scales = ("", "thousand", "million", "billion", "trillion")[len(groups) :: -1]
    tokens: list[list[Token]] = []
    for group, scale in zip((first, *groups), scales, strict=True):
        both = {(*cardinal(int(group), conjunction), *scale.split()): None for conjunction in (False, True)}
        tokens.append([tuple(both)] if int(group) else [])
    if sign := match["sign"]:
        tokens[-1].append(((_CURRENCIES[sign][1],),))
    said = [_said(0, each).said or "" for each in tokens]
    last = max(place for place, text in enumerate(said) if text)
    said[0] = match["before"] + said[0]
    said[last] += match["after"]
    return [Spoken(text, each) for text, each in zip(said, tokens, strict=True)]


def _fraction(match: re.Match[str], context: _Context) -> list[Token]:
    top, bottom = int(match["top"]), int(match["bottom"])
    over: list[Reading] = [(*cardinal(top), "over", *cardinal(bottom)), (*cardinal(top), *cardinal(bottom))]
    readings = over[::-1] if not 0 < top < bottom <= 100 else [*_parts(top, bottom), *over]
    if match["whole"]:
        whole = _integer(match["whole"], as_year=False)
        return [whole, _mixed(readings)]
    return (
        [_mixed(readings)] if re.fullmatch(r"\d+", context.number or ".") and match.start() == 0 else [tuple(readings)]
    )


def _mixed(readings: Sequence[Reading]) -> Token:
    return (*[("and", *reading) for reading in readings], *readings)


def _parts(top: int, bottom: int) -> list[Reading]:
    """1/2 a half or one half, 3/4 three quarters or three fourths, 5/8 five eighths."""
    names = {2: ["half"], 4: ["quarter", "fourth"]}.get(bottom) or [" ".join(ordinal(cardinal(bottom)))]
    if top == 1:
        return [(article, *name.split()) for name in names for article in ("an" if name[0] == "e" else "a", "one")]
    plurals = ["halves" if name == "half" else " ".join(_plural(tuple(name.split()))) for name in names]
    return [(*cardinal(top), *name.split()) for name in plurals]


def _time(match: re.Match[str], plain: str, context: _Context) -> list[Token]:
    hour, minute = cardinal(int(match["hour"])), int(match["minute"])
    after = (plain[match.end() :] or context.following).lower().lstrip()
    if match["second"]:
        return [
            (hour,),
            (_minutes(minute),),
            (("and", *cardinal(int(match["second"])), "seconds"), _minutes(int(match["second"]))),
        ]
    if minute:
        return [((*hour, *_minutes(minute)),)]
    if re.match(r"[ap]\.?m", after):
        return [(hour, (*hour, "o'clock"))]
    return [((*hour, "o'clock"), hour, (*hour, "hundred"))]


def _minutes(minute: int) -> Reading:
    return cardinal(minute) if minute >= 10 else ("oh", *cardinal(minute))


def _date(written: str) -> Token:
    """2026-11-30, 11/30/2026; where the first number is no month, it is the day."""
    numbers = [int(part) for part in re.split("[-/]", written)]
    year, first, second = numbers if "-" in written else (numbers[2], numbers[0], numbers[1])
    year_reading = _integer(written.split("/")[-1] if "/" in written else str(year))[0]
    month, day = (first, second) if first <= 12 else (second, first)
    one_by_one = (*cardinal(first), *cardinal(second), *year_reading)
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return (one_by_one,)
    names = list(_MONTHS)
    in_words = (names[month - 1], *ordinal(cardinal(day)), *year_reading)
    british = ("the", *ordinal(cardinal(day)), "of", names[month - 1], *year_reading)
    return (in_words, british, one_by_one)


_BASE = re.compile(
    r"(?<![\d.,\w])(?<!\d[–-])(?P<ten>10)$|(?P<number>(?<![\d.,])\d{1,2})$|(?P<any>\d|\))$"
    r"|(?<![^\W\d_]|['.])(?!(?<=\d)(?:s|st|nd|rd|th)$)(?:(?P<letter>[^\W\d_]|[b-df-hj-np-tv-xzα-ω]{2}"
    rf"|{'|'.join(unit for unit in _UNITS if unit.isalpha() and unit != 'in')})|(?P<pair>[^\W\d_]{{2}}))$"
)


def _power(match: re.Match[str], plain: str, context: _Context) -> list[Token]:
    """A power, or nothing: the mark of a footnote.

    "¹" is no power. "x²", "mc²", "km²", "10⁵" and what is negative are. On other numbers, brackets and pairs of letters
    it is a power in a formula: beside "^", "=", "+", "times". Elsewhere a footnote belongs to words, amounts of money,
    dates, numbers of things ("Chapter 5²") and long numbers ("1812³"); on short ones it may be either.

    Raises:
        BadInput: either.
    """
    before, power = plain[: match.start()], match[0].removeprefix("^").translate(_SUPERSCRIPTS)
    base = _BASE.search(before)
    if not base or not re.fullmatch(r"-?\d{1,2}|n", power) or match[0] == "¹":
        return []
    in_formula = re.search(r"[\^=+×÷*<>≈≤≥≠√]", plain) or any(
        _OPERATOR.fullmatch(word.lower()) for word in (context.previous, context.following)
    )
    if not (in_formula or base["ten"] or base["letter"] or power[0] in "-n"):
        previous = _fold(context.previous.rstrip("."))
        is_apart = previous in _COUNTED or previous in _BEFORE_DIGITS or previous in _MONTHS
        if not base["number"] or is_apart or re.search(rf"[{_SIGNS_OF_MONEY}#§]\d+$", before):
            return []
        raise BadInput(f"'{match[0]}' in '{plain[:40]}' may be a power or the mark of a footnote")
    if power in ("2", "3"):
        return [((("squared",) if power == "2" else ("cubed",)),)]
    if power == "n":
        return [(("to", "the", "n"),)]
    number = int(power)
    if number < 0:
        return [(("to", "the", "minus", *cardinal(-number)),)]
    return [(("to", "the", *ordinal(cardinal(number))), ("to", "the", "power", "of", *cardinal(number)))]


def _is_unit_alone(unit: str, plain: str, context: _Context) -> bool:
    """Whether a short unit that stands by itself behind a number is one: "5 m", "5 in." and no "5 in the morning"."""
    if unit in ("in", "s", "h", "l") or (unit in ("L", "V", "W") and "-" not in plain):
        return unit == "in" and "in." in plain and context.following[:1].islower()
    return True


def _unit(match: re.Match[str], number: str, plain: str, context: _Context) -> _Piece:
    name, end = _UNITS[match["unit"]], match.end()
    if match["unit"] in "′″" and (context.in_arc or "°" in plain):  # 41°24′12″
        name = "minute" if match["unit"] == "′" else "second"
    before = context.previous if plain[: match.start()].strip("-\"'(“") else context.earlier
    single = plain[match.start() - 1 : match.start()] == "-"
    single = single or _stands_before_noun(before, plain[end:], context.following, is_money=False)
    first, *rest = name.split()
    plural = first if first.endswith("hertz") else _PLURALS.get(first, f"{first}s")
    many = ["kilowatt", "hours"] if name == "kilowatt hour" else [plural, *rest]
    under = _UNITS[match["per"]] if match["per"] else ""
    per = ["per", *_powered(under.split(), under, match["under"])] if under else []
    forms = [(*_powered(words, name, match["power"]), *per) for words in (name.split(), many)]  # "a 5 km run", "5 km"
    said, other = forms if single or re.fullmatch(r"1(?:\.0*)?", number) else forms[::-1]
    if (
        match["unit"] in _POINTED_UNITS
        and plain[end : end + 1] == "."
        and (context.following[:1].islower() or plain[end + 1 : end + 2])
    ):
        end += 1
    letters = _fold(re.sub("[^A-Za-z]", "", match["unit"]))
    readings: list[Reading] = [said, other, *([tuple(letters), (letters,)] if letters else [])]
    return _Piece(end, [tuple(dict.fromkeys(readings))], " ".join(said))


def _powered(words: list[str], name: str, power: str | None) -> list[str]:
    """Square meters, but seconds squared."""
    if not power:
        return words
    if name.endswith(_LENGTHS):
        return ["square" if power in "²2" else "cubic", *words]
    return [*words, "squared" if power in "²2" else "cubed"]


def _stands_before_noun(before: str, rest: str, following: str, is_money: bool = True) -> bool:
    """Whether an amount between two words stands before its noun, so that its unit has no plural: "an 80 km ride".

    So it does behind "a", and joined to a word: "a $5-bill", but "$5-a-day". Behind "the" it is not to be seen ("the
    $500 received"), but for bills and coins.
    """
    if rest:
        return bool(re.match("-(?!(?:a|an|per|plus|odd)\\b)[A-Za-z]", rest))
    noun = _fold(following.strip(".,;:!?)\"'”"))
    is_noun = noun.replace("-", "").isalpha() and noun not in _STARTERS
    return is_noun and (before.lower().strip("\"'(“") in ("a", "an") or (is_money and noun in _CASH))
