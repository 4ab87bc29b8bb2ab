"""Written English as it is spoken: numbers, symbols, abbreviations and acronyms, for word alignment.

Where a written form can be read in several ways ("1905", "US"), all of them are given: the aligner takes the one that
was said.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

Reading = tuple[str, ...]
"""Spoken words in lower case, of letters and apostrophes."""
Token = tuple[Reading, ...]
"""One stretch of speech without a pause, and the ways it may be read."""

# fmt: off
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth"}
_FRACTIONS = {"1/2": ("one half", "a half"), "1/3": ("one third", "a third"), "2/3": ("two thirds",),
              "1/4": ("one quarter", "a quarter", "one fourth"), "3/4": ("three quarters", "three fourths")}
_SYMBOLS = {"&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "°": "degrees", "§": "section",
            "×": "times", "½": "a half", "¼": "a quarter", "¾": "three quarters", "#": "number"}
_CURRENCIES = {"$": ("dollar", "dollars", "cents"), "£": ("pound", "pounds", "pence"), "€": ("euro", "euros", "cents")}
_ABBREVIATIONS = {
    "mr.": ("mister",), "mrs.": ("missus",), "ms.": ("miss", "miz"), "dr.": ("doctor", "drive"),
    "prof.": ("professor",),
    "st.": ("saint", "street"), "jr.": ("junior",), "sr.": ("senior",), "vs.": ("versus",), "etc.": ("et cetera",),
    "e.g.": ("e g", "for example"), "i.e.": ("i e", "that is"), "no.": ("no", "number"), "nos.": ("numbers",),
    "vol.": ("volume",), "fig.": ("figure", "fig"), "gen.": ("general",), "col.": ("colonel",), "capt.": ("captain",),
    "lt.": ("lieutenant",), "sgt.": ("sergeant",), "rev.": ("reverend",), "mt.": ("mount",), "ave.": ("avenue",),
}
# fmt: on
_PIECES = re.compile(
    r"(?P<fraction>(?<!\d)\d/\d(?!\d))"
    r"|(?P<time>\d{1,2}:\d\d(?!\d))"
    r"|(?P<currency>[$£€])?(?P<number>\d+(?:,\d{3})*)(?P<decimals>\.\d+)?(?P<suffix>(?:st|nd|rd|th|'?s)(?![a-z]))?"
    r"|(?P<initials>(?:[a-z]\.){2,}|(?:[a-z]\.)+[a-z](?![a-z]))"
    r"|(?P<letters>'?[a-z]+(?:'[a-z]+)*'?)"
    r"|(?P<symbol>[&%+=@°§×½¼¾#$£€])"
)
_MAX_ACRONYM = 5


def spoken_tokens(words: Sequence[str]) -> list[list[Token]]:
    """For each written word what is said for it: 0 or more tokens (none for a lone dash)."""
    shouting = not any(char.islower() for word in words for char in word)
    tokens: list[list[Token]] = []
    for index, word in enumerate(words):
        following = _plain(words[index + 1]).lower() if index + 1 < len(words) else ""
        previous = words[index - 1] if index else ""
        tokens.append(_word_tokens(word, previous, following, shouting))
    return tokens


def cardinal(number: int, conjunction: bool = False) -> Reading:
    """`cardinal(342)`: three hundred forty two; with `conjunction` three hundred and forty two."""
    if number < 20:
        return (_ONES[number],)
    if number < 100:
        return (_TENS[number // 10], *((_ONES[number % 10],) if number % 10 else ()))
    scale, name = next((scale, name) for scale, name in _SCALES if number >= scale)
    rest = number % scale
    link = ("and",) if conjunction and 0 < rest < 100 else ()
    return (*cardinal(number // scale, conjunction), name, *link, *(cardinal(rest, conjunction) if rest else ()))


def ordinal(reading: Reading) -> Reading:
    """The ordinal of a cardinal: twenty one → twenty first."""
    *head, last = reading
    if last in _ORDINALS:
        return (*head, _ORDINALS[last])
    return (*head, last.removesuffix("y") + "ieth" if last.endswith("y") else last + ("h" if last[-1] == "t" else "th"))


def _plural(reading: Reading) -> Reading:
    *head, last = reading
    if last.endswith("y"):
        return (*head, last[:-1] + "ies")
    return (*head, last + ("es" if last.endswith("x") else "s"))


def _plain(word: str) -> str:
    """Without accents and with plain apostrophes."""
    letters = unicodedata.normalize("NFKD", re.sub("[½¼¾]", lambda match: f" {match[0]} ", word))
    decomposed = "".join(char for char in letters if not unicodedata.combining(char))
    return re.sub("[’‘ʼ`´]", "'", decomposed)


def _word_tokens(word: str, previous: str, following: str, shouting: bool) -> list[Token]:
    plain = _plain(word)
    bare = plain.lower().strip("\"'()[]{},;:!?“”«»")
    if bare in _ABBREVIATIONS:
        return [tuple(tuple(reading.split()) for reading in _ABBREVIATIONS[bare])]
    scale = bare.rstrip(".")
    if _is_scale(scale) and re.match(r"\W*[$£€]\d", previous):
        unit = _CURRENCIES[next(char for char in previous if char in _CURRENCIES)][1]
        return [((scale, unit), (scale,))]
    return [
        token
        for match in _PIECES.finditer(plain.lower())
        for token in _piece_tokens(match, plain[match.start() : match.end()], following, shouting)
    ]


def _is_scale(word: str) -> bool:
    return word.strip(".,;:!?") in [name for _, name in _SCALES]


def _piece_tokens(match: re.Match[str], written: str, following: str, shouting: bool) -> list[Token]:
    piece = match[0]
    if match["letters"]:
        return [_letters(piece, written, shouting)]
    if match["initials"]:
        return [(tuple(char for char in piece if char.isalpha()),)]
    if match["symbol"]:
        names = _CURRENCIES[piece][1] if piece in _CURRENCIES else _SYMBOLS[piece]
        return [(tuple(names.split()),)]
    if match["fraction"]:
        top, bottom = (int(part) for part in piece.split("/"))
        default = (" ".join((*cardinal(top), "over", *cardinal(bottom))),)
        return [tuple(tuple(reading.split()) for reading in _FRACTIONS.get(piece, default))]
    if match["time"]:
        return [_time(*(int(part) for part in piece.split(":")))]
    if match["currency"] and not _is_scale(following):
        return [_money(match)]
    return _number(match)


def _letters(piece: str, written: str, shouting: bool) -> Token:
    """A word; a short one in capitals amid other text is also spelled."""
    word = (piece.removeprefix("'").removesuffix("'"),)
    stem = written.removesuffix("'s").removesuffix("s") if len(written) > 2 else written
    if shouting or not (stem.isupper() and 2 <= len(stem) <= _MAX_ACRONYM):
        return (word,)
    spelled = tuple(stem.lower())
    ending = piece[len(stem) :]
    return ((*spelled[:-1], f"{spelled[-1]}'s") if ending else spelled, word)


def _time(hour: int, minute: int) -> Token:
    if minute == 0:
        return ((*cardinal(hour), "o'clock"), cardinal(hour), (*cardinal(hour), "hundred"))
    minutes = cardinal(minute) if minute >= 10 else ("oh", *cardinal(minute))
    return ((*cardinal(hour), *minutes),)


def _money(match: re.Match[str]) -> Token:
    one, many, cents = _CURRENCIES[match["currency"]]
    amount = int(match["number"].replace(",", ""))
    if match["decimals"] and len(match["decimals"]) == 3:
        small = cardinal(int(match["decimals"][1:]))
        whole = (*cardinal(amount), many)
        return (*whole, *small, cents), (*whole, "and", *small, cents), (*cardinal(amount), *small)
    if match["decimals"]:
        return ((*cardinal(amount), *_decimals(match["decimals"]), many),)
    unit = one if amount == 1 else many
    return tuple((*reading, unit) for reading in _integer(match["number"]))


def _number(match: re.Match[str]) -> list[Token]:
    """A number; a long one is read digit group by digit group, with room for pauses."""
    suffix = match["suffix"] or ""
    if match["decimals"]:
        tail = _decimals(match["decimals"])
        whole = tuple((*reading, *tail) for reading in _integer(match["number"]))
        return [(*whole, tail)] if match["number"] == "0" else [whole]
    readings = _integer(match["number"], by_digit=not suffix)
    if suffix.endswith("s"):
        return [tuple(_plural(reading) for reading in readings)]
    if suffix:
        return [tuple(ordinal(reading) for reading in readings)]
    return [readings] if len(readings) > 1 else [((word,),) for word in readings[0]]


def _decimals(decimals: str) -> Reading:
    return ("point", *(_ONES[int(digit)] for digit in decimals[1:]))


def _integer(digits: str, by_digit: bool = True) -> Token:
    """The readings of digits such as 7, 342, 1905 or 1,200,000; one only for long numbers."""
    plain = digits.replace(",", "")
    one_by_one = tuple(_ONES[int(digit)] for digit in plain)
    if (len(plain) > 6 and "," not in digits and plain.strip("0") != plain[0]) or len(plain) > 15:
        return (one_by_one,)
    number = int(plain)
    if len(plain) > 4:
        return (cardinal(number),)
    readings = [cardinal(number), cardinal(number, conjunction=True)]
    if by_digit and len(plain) > 1:
        readings += [one_by_one, tuple("oh" if word == "zero" else word for word in one_by_one)]
    if len(plain) >= 3 and plain[0] != "0":
        readings += _in_pairs(number)
    return tuple(dict.fromkeys(readings))


def _in_pairs(number: int) -> list[Reading]:
    """1984 as nineteen eighty four, 1905 as nineteen oh five or nineteen hundred (and) five, 120 as one twenty."""
    high, low = divmod(number, 100)
    hundreds = (*cardinal(high), "hundred")
    if low == 0:
        return [hundreds]
    if low >= 10:
        return [(*cardinal(high), *cardinal(low)), (*hundreds, *cardinal(low))]
    return [(*cardinal(high), "oh", *cardinal(low)), (*hundreds, *cardinal(low)), (*hundreds, "and", *cardinal(low))]
